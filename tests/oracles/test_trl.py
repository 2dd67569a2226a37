"""Loss and gradient norm against TRL 1.16 on the same weights and batch, through TRL's own trainers."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import nn

from rlhf_lit.algorithms import DPO, SFT, RewardModel
from rlhf_lit.batches import PreferenceBatch, Sequences
from rlhf_lit.losses.bradley_terry import BradleyTerryLoss
from rlhf_lit.losses.preference import DPOLoss, IPOLoss, PreferenceLoss
from rlhf_lit.models.loading import Base, LoRA, load_tokenizer

trl = pytest.importorskip("trl", reason="TRL is a test extra")
pytestmark = pytest.mark.filterwarnings("ignore")

TOLERANCE = 1e-4
COMMON: dict[str, Any] = {
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "max_steps": 1,
    "learning_rate": 1e-8,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "disable_tqdm": True,
    "max_length": None,
}
BUDGETS = (30, tiny.EVERYTHING)


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model whose dropout is 0, since TRL trains with it."""
    none = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0} if request.param == "gpt2" else {}
    return tiny.save_model(tmp_path_factory.mktemp(request.param), request.param, spread=0.1, **none)


def rows(sequences: Sequences) -> list[tuple[list[int], list[bool]]]:
    """Tokens and masks without padding."""
    columns = zip(sequences.tokens, sequences.mask, sequences.lengths, strict=True)
    return [(tokens[:n].tolist(), mask[:n].tolist()) for tokens, mask, n in columns]


def first_log(trainer: Any) -> tuple[float, float]:
    """Loss and gradient norm of one step, as TRL logs them."""
    trainer.train()
    log = trainer.state.log_history[0]
    return float(log["loss"]), float(log["grad_norm"])


def assert_equal(module: Any, batch: Any, loss: float, norm: float) -> None:
    from dataclasses import replace

    for budget in BUDGETS:
        step = tiny.Step(module, replace(batch, micro_batch_tokens=budget))
        assert step.totals["loss"] == pytest.approx(loss, rel=TOLERANCE, abs=TOLERANCE)
        assert step.norm == pytest.approx(norm, rel=TOLERANCE)
        assert norm > 0.01


@pytest.mark.parametrize("accumulation", [1, 2])
def test_sft(folder: str, accumulation: int, tmp_path: Path) -> None:
    """Eight ragged rows, in TRL's one batch, and accumulated over two (equal since TRL #6024)."""
    from datasets import Dataset

    batch = tiny.SupervisedBatch(tiny.sequences([*tiny.RAGGED, (3, 14)]), tiny.EVERYTHING)
    labels = [[t if m else -100 for t, m in zip(*row, strict=True)] for row in rows(batch.sequences)]
    data = Dataset.from_dict({"input_ids": [tokens for tokens, _ in rows(batch.sequences)], "labels": labels})
    arguments = trl.SFTConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=8 // accumulation,
        gradient_accumulation_steps=accumulation,
        **COMMON,
    )
    model = plain_model(folder, "AutoModelForCausalLM")
    trainer = trl.SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer(folder))
    assert_equal(tiny.build(SFT(Base(name=folder))), batch, *first_log(trainer))


@pytest.mark.parametrize(("margin", "centring"), [(False, 0.0), (True, 0.0), (True, 0.01)])
def test_reward_model(folder: str, margin: bool, centring: float, tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification

    batch = tiny.preferences()
    module = tiny.build(RewardModel(Base(name=folder), BradleyTerryLoss(centring, use_margin=margin)))
    data: dict[str, Any] = {
        "chosen_ids": [tokens for tokens, _ in rows(batch.chosen)],
        "rejected_ids": [tokens for tokens, _ in rows(batch.rejected)],
    }
    if margin:
        data["margin"] = batch.margin.tolist()
    # The same head in both; TRL pools by the pad id, which must be one that no row ends with.
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1)
    model.load_state_dict(module.scorer.state_dict())
    model.config.pad_token_id = 0
    words = tiny.make_tokenizer(pad="<unk>")
    arguments = trl.RewardConfig(
        output_dir=str(tmp_path),
        per_device_train_batch_size=len(batch),
        center_rewards_coefficient=centring or None,
        **COMMON,
    )
    trainer = trl.RewardTrainer(model, arguments, train_dataset=Dataset.from_dict(data), processing_class=words)
    assert_equal(module, batch, *first_log(trainer))


def plain_model(folder: str, auto_class: str) -> nn.Module:
    import transformers

    return getattr(transformers, auto_class).from_pretrained(folder)


def tokenizer(folder: str) -> Any:
    words = load_tokenizer(Base(name=folder))
    words.pad_token = "<unk>"
    return words


def trl_dpo(
    folder: str, batch: PreferenceBatch, policy: nn.Module, reference: nn.Module | None, out: Path, **settings: Any
) -> Any:
    """A DPOTrainer over the batch's texts; its own tokenizer must give the batch's tokens back."""
    from datasets import Dataset

    words = tokenizer(folder)

    def text(tokens: list[int]) -> str:
        return " ".join(words.convert_ids_to_tokens(tokens))

    data = []
    for (chosen, mask), (rejected, _) in zip(rows(batch.chosen), rows(batch.rejected), strict=True):
        start = mask.index(True)
        sides = {"chosen": " " + text(chosen[start:]), "rejected": " " + text(rejected[start:])}
        data.append({"prompt": text(chosen[:start]), **sides})
    arguments = trl.DPOConfig(output_dir=str(out), per_device_train_batch_size=len(batch), **COMMON, **settings)
    trainer = trl.DPOTrainer(
        policy, reference, arguments, train_dataset=Dataset.from_list(data), processing_class=words
    )
    for row, (tokens, _) in zip(trainer.train_dataset, rows(batch.chosen), strict=True):
        assert row["prompt_ids"] + row["chosen_ids"] == tokens
    return trainer


def moved_dpo(folder: str, loss: PreferenceLoss, lora: LoRA | None = None) -> DPO:
    """A DPO module whose policy has left its reference."""
    module = tiny.build(DPO(Base(name=folder, lora=lora), loss))
    tiny.disturb(module, 0.03)
    return module


@pytest.mark.parametrize(
    ("loss", "settings"),
    [
        (DPOLoss(beta=0.1), {"loss_type": ["sigmoid"], "beta": 0.1}),
        (DPOLoss(beta=0.7), {"loss_type": ["sigmoid"], "beta": 0.7}),
        (IPOLoss(beta=0.3, average_log_prob=True), {"loss_type": ["ipo"], "beta": 0.3}),
    ],
    ids=["dpo-0.1", "dpo-0.7", "ipo"],
)
def test_dpo(folder: str, loss: PreferenceLoss, settings: dict[str, Any], tmp_path: Path) -> None:
    batch, module = tiny.preferences(), moved_dpo(folder, loss)
    policy, reference = (plain_model(folder, "AutoModelForCausalLM") for _ in range(2))
    policy.load_state_dict(module.roles.policy.state_dict())
    trainer = trl_dpo(folder, batch, policy, reference, tmp_path, **settings)
    assert_equal(module, batch, *first_log(trainer))
    logs, ours = trainer.state.log_history[0], tiny.Step(module, batch).totals
    if isinstance(loss, DPOLoss):
        assert ours["margin"] == pytest.approx(logs["rewards/margins"], abs=1e-4)
        assert ours["accuracy"] == pytest.approx(logs["rewards/accuracies"], abs=1e-6)
        assert ours["reward_chosen"] == pytest.approx(logs["rewards/chosen"], abs=1e-4)


def test_dpo_with_lora(folder: str, tmp_path: Path) -> None:
    batch, module = tiny.preferences(), moved_dpo(folder, DPOLoss(beta=0.2), LoRA(rank=4))
    # Given none, TRL would take the adapter as it stands for the reference.
    policy = moved_dpo(folder, DPOLoss(beta=0.2), LoRA(rank=4)).roles.policy
    reference = plain_model(folder, "AutoModelForCausalLM")
    trainer = trl_dpo(folder, batch, policy, reference, tmp_path, beta=0.2)
    assert_equal(module, batch, *first_log(trainer))


def test_label_smoothing_where_trl_ignores_it(folder: str, tmp_path: Path) -> None:
    """TRL's sigmoid loss has not read `label_smoothing` since 2025, so cDPO is held to its formula, from TRL's own two
    unsmoothed losses: of the pairs as they are, and of the pairs with the sides exchanged."""
    from dataclasses import replace

    batch = tiny.preferences()
    exchanged = replace(batch, chosen=batch.rejected, rejected=batch.chosen)
    module = moved_dpo(folder, DPOLoss(beta=0.5, label_smoothing=0.2))
    tiny.disturb(module.roles.models["policy"], 0.05, seed=9)
    losses = []
    for i, pairs in enumerate((batch, exchanged, batch)):
        policy, reference = (plain_model(folder, "AutoModelForCausalLM") for _ in range(2))
        policy.load_state_dict(module.roles.policy.state_dict())
        smoothing = 0.2 if i == 2 else 0.0
        trainer = trl_dpo(folder, pairs, policy, reference, tmp_path, beta=0.5, label_smoothing=smoothing)
        losses.append(first_log(trainer)[0])
    expected = 0.8 * losses[0] + 0.2 * losses[1]
    assert tiny.Step(module, batch).totals["loss"] == pytest.approx(expected, abs=1e-4)
    assert abs(losses[0] - losses[1]) > 0.05
    assert losses[2] == pytest.approx(losses[0], abs=1e-6), "TRL reads label_smoothing again: compare with it directly"
