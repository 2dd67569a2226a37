"""What a run leaves behind: checkpoints without the base, and folders that plain transformers and peft load."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from rlhf_lit.algorithms import DPO, SFT, RewardModel
from rlhf_lit.algorithms.base import Algorithm
from rlhf_lit.export import save_hf
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.models.loading import Base, LoRA, Quantization, load_causal_lm, load_scorer, load_tokenizer, unwrapped
from rlhf_lit.rollout.rewards import score_sequences

LORAS = pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
SEQUENCES = tiny.sequences(tiny.RAGGED)
ATTENTION = (torch.arange(SEQUENCES.tokens.shape[1])[None] < SEQUENCES.lengths[:, None]).long()


def plain(folder: Path, auto_class: str, adapter_base: str | None, **keywords: Any) -> Any:
    """The folder as someone without this package loads it."""
    import transformers
    from peft import PeftModel

    auto = getattr(transformers, auto_class)
    if adapter_base is None:
        return auto.from_pretrained(folder, **keywords).eval()
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == adapter_base
    return PeftModel.from_pretrained(auto.from_pretrained(named, **keywords), folder).eval()


@LORAS
@pytest.mark.parametrize("algorithm", ["sft", "dpo", "ppo"])
def test_policies_load_in_plain_transformers(llama: str, tmp_path: Path, algorithm: str, lora: LoRA | None) -> None:
    base = Base(name=llama, lora=lora)
    modules = {
        "sft": lambda: tiny.build(SFT(base)),
        "dpo": lambda: tiny.build(DPO(base, DPOLoss(beta=0.1))),
        "ppo": lambda: tiny.make_ppo(base),
    }
    module: Any = modules[algorithm]()
    tiny.disturb(module, 0.05)
    module.eval()
    save_hf(module, tmp_path)
    with torch.no_grad():
        expected = module.roles.policy(SEQUENCES.tokens, attention_mask=ATTENTION).logits
        untrained = load_causal_lm(Base(name=llama))(SEQUENCES.tokens, attention_mask=ATTENTION).logits
        loaded = plain(tmp_path, "AutoModelForCausalLM", llama if lora else None)
        logits = loaded(SEQUENCES.tokens, attention_mask=ATTENTION).logits
        own = load_causal_lm(Base(name=str(tmp_path)))(SEQUENCES.tokens, attention_mask=ATTENTION).logits
    assert float((expected - untrained).abs().max()) > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)
    assert load_tokenizer(Base(name=str(tmp_path))).get_vocab() == module.tokenizer.get_vocab()
    if lora:
        assert not list(tmp_path.glob("model*.safetensors"))
        assert not any(entry.is_dir() for entry in tmp_path.iterdir())  # no value or reference adapter


def trained_scorer(base: Base) -> RewardModel:
    module = tiny.build(RewardModel(base))
    tiny.disturb(module, 0.05)
    module.eval()
    module.centre([tiny.preferences()])
    return module


@LORAS
def test_reward_models_score_alike_in_plain_transformers(llama: str, tmp_path: Path, lora: LoRA | None) -> None:
    """The classifier's logit plus the constant of reward.json, right-padded together or one by one."""
    module = trained_scorer(Base(name=llama, lora=lora))
    save_hf(module, tmp_path)
    with torch.no_grad():
        expected = module.scores(SEQUENCES)
    assert float(expected.std()) > 0.05
    record = json.loads((tmp_path / "reward.json").read_text())
    loaded = plain(tmp_path, "AutoModelForSequenceClassification", llama if lora else None, num_labels=1)
    assert record["pad_token_id"] != tiny.EOS
    unwrapped(loaded).config.pad_token_id = record["pad_token_id"]
    if not lora:
        assert plain(tmp_path, "AutoModelForSequenceClassification", None).config.pad_token_id == record["pad_token_id"]
    padded = torch.where(ATTENTION.bool(), SEQUENCES.tokens, record["pad_token_id"])
    with torch.no_grad():
        together = loaded(padded, attention_mask=ATTENTION).logits[:, 0] + record["bias"]
        singly = [loaded(row[None, :n]).logits[0, 0] for row, n in zip(padded, SEQUENCES.lengths, strict=True)]
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(singly) + record["bias"], expected, rtol=1e-5, atol=1e-5)


@LORAS
def test_reward_models_reload_with_equal_scores(llama: str, tmp_path: Path, lora: LoRA | None) -> None:
    module = trained_scorer(Base(name=llama, lora=lora))
    save_hf(module, tmp_path / "first")
    with torch.no_grad():
        expected = module.scores(SEQUENCES)
    again = load_scorer(Base(name=str(tmp_path / "first")))
    torch.testing.assert_close(score_sequences(again, SEQUENCES, 1000), expected, rtol=1e-6, atol=1e-6)
    # Trained further from there, saved and loaded: the constant is carried along.
    further = trained_scorer(Base(name=str(tmp_path / "first")))
    save_hf(further, tmp_path / "second")
    with torch.no_grad():
        expected = further.scores(SEQUENCES)
    again = load_scorer(Base(name=str(tmp_path / "second")))
    torch.testing.assert_close(score_sequences(again, SEQUENCES, 1000), expected, rtol=1e-6, atol=1e-6)


@LORAS
def test_centring_brings_the_chosen_responses_to_zero(llama: str, lora: LoRA | None) -> None:
    module = tiny.build(RewardModel(Base(name=llama, lora=lora)))
    tiny.disturb(module, 0.05)
    module.eval()
    pairs = tiny.preferences()
    with torch.no_grad():
        before = module.scores(pairs.chosen)
        for budget in (30, 1):
            module.centre([tiny.preferences(budget)])
            after = module.scores(pairs.chosen)
            assert float(after.mean()) == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(after - after.mean(), before - before.mean(), rtol=1e-5, atol=1e-6)


def test_a_reward_model_from_an_sft_adapter_keeps_it(llama: str, tmp_path: Path) -> None:
    """The body of the scorer is the SFT model, under an untrained head."""
    sft = tiny.build(SFT(Base(name=llama, lora=LoRA(rank=4))))
    tiny.disturb(sft, 0.05)
    save_hf(sft, tmp_path)
    scorer = load_scorer(Base(name=str(tmp_path)))

    def states(model: Any) -> Tensor:
        with torch.no_grad():
            return model.get_base_model().model(SEQUENCES.tokens).last_hidden_state

    torch.testing.assert_close(states(scorer), states(sft.roles.policy.eval()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["lora", "4-bit"])
@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "ppo"])
def test_a_lora_checkpoint_holds_no_base_weight(llama: str, algorithm: str, quantization: Quantization | None) -> None:
    base = Base(name=llama, lora=LoRA(rank=4), quantization=quantization)
    modules: dict[str, Any] = {
        "sft": lambda: tiny.build(SFT(base)),
        "reward": lambda: tiny.build(RewardModel(base)),
        "dpo": lambda: tiny.build(DPO(base, DPOLoss(beta=0.1))),
        "ppo": lambda: tiny.make_ppo(base),
    }
    module: Algorithm = modules[algorithm]()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    kept = checkpoint["state_dict"]
    assert set(kept) == {name for name, p in module.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "score" in name or "heads.value" in name for name in kept)
    assert sum("lora_" in name for name in kept) == (56 if algorithm == "ppo" else 28)

    # Loaded into a fresh module it gives the same model.
    tiny.disturb(module, 0.05)
    other: Algorithm = modules[algorithm]()
    batch = tiny.supervised() if algorithm == "sft" else tiny.preferences()
    if algorithm == "ppo":
        batch = module.rollout(tiny.prompts(), 0)  # type: ignore[operator]
    other.load_state_dict({name: p for name, p in module.state_dict().items() if name in kept}, strict=False)
    assert tiny.Step(module, batch).totals == tiny.Step(other, batch).totals


def test_a_full_checkpoint_leaves_the_reference_out(llama: str) -> None:
    module = tiny.make_ppo(Base(name=llama))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["kl_multiplier"] == 1.0
    kept = checkpoint["state_dict"]
    assert not any(name.startswith("roles.models.reference") for name in kept)
    assert any(name.startswith("roles.models.policy") for name in kept)
    assert any(name.startswith("roles.models.value") for name in kept)
    assert "roles.heads.value.weight" in kept
