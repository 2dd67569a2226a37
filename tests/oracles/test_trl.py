"""Loss and gradient norm against TRL 1.16 on the same weights and batch, through TRL's own trainers."""

from pathlib import Path
from typing import Any

import pytest
import tiny
from torch import nn

from rlhf_lit.algorithms import DPO, KTO, SFT, RewardModel
from rlhf_lit.batches import PreferenceBatch, Sequences, UnpairedBatch
from rlhf_lit.losses.bradley_terry import BradleyTerryLoss
from rlhf_lit.losses.preference import (
    APODownLoss,
    APOZeroLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    ORPOLoss,
    PreferenceLoss,
    RobustDPOLoss,
    SimPOLoss,
)
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_tokenizer

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


def pairs_as_text(folder: str, batch: PreferenceBatch) -> Any:
    """A data set of the batch's texts."""
    from datasets import Dataset

    data = []
    for (chosen, mask), (rejected, _) in zip(rows(batch.chosen), rows(batch.rejected), strict=True):
        start = mask.index(True)
        prompt, *sides = (as_text(folder, tokens) for tokens in (chosen[:start], chosen[start:], rejected[start:]))
        data.append({"prompt": prompt, "chosen": f" {sides[0]}", "rejected": f" {sides[1]}"})
    return Dataset.from_list(data)


def as_text(folder: str, tokens: list[int]) -> str:
    return " ".join(tokenizer(folder).convert_ids_to_tokens(tokens))


def trl_dpo(
    folder: str, batch: PreferenceBatch, policy: nn.Module, reference: nn.Module | None, out: Path, **settings: Any
) -> Any:
    """A DPOTrainer over the batch's texts; its own tokenizer must give the batch's tokens back."""
    arguments = trl.DPOConfig(output_dir=str(out), per_device_train_batch_size=len(batch), **COMMON, **settings)
    trainer = trl.DPOTrainer(
        policy, reference, arguments, train_dataset=pairs_as_text(folder, batch), processing_class=tokenizer(folder)
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
        (DPOLoss(beta=2.0, average_log_prob=True), {"loss_type": ["sigmoid_norm"], "beta": 2.0}),
        (RobustDPOLoss(0.4, 0.2), {"loss_type": ["robust"], "beta": 0.4, "label_smoothing": 0.2}),
        (IPOLoss(beta=0.3, average_log_prob=True), {"loss_type": ["ipo"], "beta": 0.3}),
        (HingeLoss(beta=0.3), {"loss_type": ["hinge"], "beta": 0.3}),
        (APOZeroLoss(beta=0.4), {"loss_type": ["apo_zero"], "beta": 0.4}),
        (APODownLoss(beta=0.4), {"loss_type": ["apo_down"], "beta": 0.4}),
    ],
    ids=["dpo-0.1", "dpo-0.7", "dpo-per-token", "robust", "ipo", "hinge", "apo-zero", "apo-down"],
)
def test_dpo(folder: str, loss: PreferenceLoss, settings: dict[str, Any], tmp_path: Path) -> None:
    batch, module = tiny.preferences(), moved_dpo(folder, loss)
    policy, reference = (plain_model(folder, "AutoModelForCausalLM") for _ in range(2))
    policy.load_state_dict(module.roles.policy.state_dict())
    trainer = trl_dpo(folder, batch, policy, reference, tmp_path, **settings)
    assert_equal(module, batch, *first_log(trainer))
    logs, ours = trainer.state.log_history[0], tiny.Step(module, batch).totals
    if isinstance(loss, DPOLoss) and not loss.average_log_prob:
        assert ours["margin"] == pytest.approx(logs["rewards/margins"], abs=1e-4)
        assert ours["accuracy"] == pytest.approx(logs["rewards/accuracies"], abs=1e-6)
        assert ours["reward_chosen"] == pytest.approx(logs["rewards/chosen"], abs=1e-4)


def test_dpo_with_an_sft_term(folder: str, tmp_path: Path) -> None:
    batch = tiny.preferences()
    module = tiny.build(DPO(Base(name=folder), DPOLoss(beta=0.3), sft_coefficient=0.5))
    tiny.disturb(module, 0.03)
    policy, reference = (plain_model(folder, "AutoModelForCausalLM") for _ in range(2))
    policy.load_state_dict(module.roles.policy.state_dict())
    settings = {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5], "beta": 0.3}
    assert_equal(module, batch, *first_log(trl_dpo(folder, batch, policy, reference, tmp_path, **settings)))


@pytest.mark.parametrize("gamma", [0.0, 0.7])
def test_simpo(folder: str, gamma: float, tmp_path: Path) -> None:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    batch, module = tiny.preferences(), moved_dpo(folder, SimPOLoss(beta=2.0, gamma=gamma))
    policy = plain_model(folder, "AutoModelForCausalLM")
    policy.load_state_dict(module.roles.policy.state_dict())
    arguments = CPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(batch), loss_type="simpo", cpo_alpha=0.0, beta=2.0,
        simpo_gamma=gamma, **COMMON,
    )  # fmt: skip
    trainer = CPOTrainer(
        policy, arguments, train_dataset=pairs_as_text(folder, batch), processing_class=tokenizer(folder)
    )
    assert_equal(module, batch, *first_log(trainer))


def test_orpo_but_for_whose_likelihood_it_counts(folder: str, tmp_path: Path) -> None:
    """The odds ratio is TRL's. Its likelihood term covers the prompt too, as a mean over all tokens of the batch; ours
    is the paper's, the mean log-prob of the chosen response."""
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    batch, module = tiny.preferences(), moved_dpo(folder, ORPOLoss(beta=0.6))
    policy = plain_model(folder, "AutoModelForCausalLM")
    policy.load_state_dict(module.roles.policy.state_dict())
    arguments = ORPOConfig(output_dir=str(tmp_path), per_device_train_batch_size=len(batch), beta=0.6, **COMMON)
    trainer = ORPOTrainer(
        policy, arguments, train_dataset=pairs_as_text(folder, batch), processing_class=tokenizer(folder)
    )
    trainer.train()
    log = trainer.state.log_history[0]
    totals = tiny.Step(module, batch).totals
    chosen, mask = batch.chosen, batch.chosen.mask
    likelihood = -float((tiny.logprobs_of(module, chosen).sum(-1) / mask.sum(-1)).mean())
    assert totals["loss"] - likelihood == pytest.approx(log["loss"] - log["nll_loss"], abs=TOLERANCE)
    assert totals["accuracy"] == pytest.approx(log["rewards/accuracies"], abs=1e-6)
    assert totals["margin"] == pytest.approx(log["log_odds_chosen"], abs=TOLERANCE)
    assert abs(likelihood - log["nll_loss"]) > 0.01, "TRL counts the response alone now: compare the whole loss"


def judged(rotate: int) -> UnpairedBatch:
    """Six ragged responses, every second one good, each prompt beside the response of the row before it."""
    pairs = tiny.preferences()
    found = [rows(side)[i] for i, side in enumerate([pairs.chosen, pairs.rejected] * 3)]
    starts = [mask.index(True) for _, mask in found]
    prompts = [tokens[:start] for (tokens, _), start in zip(found, starts, strict=True)]
    answers = [tokens[start:] for (tokens, _), start in zip(found, starts, strict=True)]
    others = answers[-rotate:] + answers[:-rotate]

    def padded(answers: list[list[int]]) -> Sequences:
        both = list(zip(prompts, answers, strict=True))
        return Sequences.pad([p + a for p, a in both], [[False] * len(p) + [True] * len(a) for p, a in both])

    return UnpairedBatch(padded(answers), padded(others), tiny.torch.arange(6) % 2 == 0, tiny.EVERYTHING)


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
def test_kto(folder: str, lora: LoRA | None, tmp_path: Path) -> None:
    """TRL pairs each prompt with the response of the row before it, within a device's batch."""
    from datasets import Dataset

    batch = judged(rotate=1)
    loss = KTOLoss(beta=0.5, desirable_weight=1.3, undesirable_weight=0.8)
    module, twin = (tiny.build(KTO(Base(name=folder, lora=lora), loss)) for _ in range(2))
    for each in (module, twin):
        tiny.disturb(each, 0.03)
        # A step towards the mismatched responses, since z is 0 where they became less likely.
        tiny.logprobs_of(each, batch.mismatched).sum().backward()
        for parameter in each.trainable_parameters():
            parameter.data += 3e-3 * parameter.grad
    policy = twin.roles.policy if lora else plain_model(folder, "AutoModelForCausalLM")
    policy.load_state_dict(module.roles.policy.state_dict())
    data = []
    for (tokens, mask), label in zip(rows(batch.sequences), batch.desirable.tolist(), strict=True):
        start = mask.index(True)
        texts = {"prompt": as_text(folder, tokens[:start]), "completion": f" {as_text(folder, tokens[start:])}"}
        data.append({**texts, "label": label})
    arguments = trl.KTOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=6, beta=0.5, desirable_weight=1.3,
        undesirable_weight=0.8, train_sampling_strategy="sequential", **COMMON,
    )  # fmt: skip
    trainer = trl.KTOTrainer(
        policy,
        plain_model(folder, "AutoModelForCausalLM"),
        arguments,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(folder),
    )
    assert_equal(module, batch, *first_log(trainer))
    assert float(module.baseline) == pytest.approx(trainer.state.log_history[0]["kl"], abs=TOLERANCE)
    assert float(module.baseline) > 0.01


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
