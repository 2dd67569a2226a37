"""What a folder is taken for: a language model, a reward model, or an adapter of either."""

import json
from pathlib import Path

import pytest
import tiny
import torch

from rlhf_lit.algorithms import SFT, RewardModel
from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.saving import save_hf
from rlhf_lit.rollout.rewards import RewardFromModel

ADAPTERS = [None, LoRA(rank=4, dropout=0.1)]


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return tiny.save_model(tmp_path / "llama")


def reward_model(folder: Path, base: str, lora: LoRA | None) -> RewardModel:
    module = tiny.build(RewardModel(Base(name=base, lora=lora)))
    save_hf(module, folder)
    return module


def test_a_trained_head_is_known_by_the_weights_not_by_what_the_folder_says(llama: str, tmp_path: Path) -> None:
    """As with a hub name, whose config.json is no local file."""
    trained = reward_model(tmp_path / "reward", llama, None)
    config = tmp_path / "reward" / "config.json"
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "architectures"}))
    torch.manual_seed(1)
    loaded = load_scorer(Base(name=str(tmp_path / "reward")), trained=True)
    assert torch.equal(unwrapped(loaded).score.weight, unwrapped(trained.scorer).score.weight)


@pytest.mark.parametrize("lora", ADAPTERS)
def test_a_language_model_does_not_pass_for_a_reward_model(llama: str, tmp_path: Path, lora: LoRA | None) -> None:
    save_hf(tiny.build(SFT(Base(name=llama, lora=lora))), tmp_path / "sft")
    with pytest.raises(UserError, match="sft is no reward model: it has no trained score head"):
        RewardFromModel(str(tmp_path / "sft")).prepare(tiny.make_tokenizer())
    reward_model(tmp_path / "reward", str(tmp_path / "sft"), None)
    RewardFromModel(str(tmp_path / "reward")).prepare(tiny.make_tokenizer())


@pytest.mark.parametrize("lora", ADAPTERS)
def test_a_reward_model_does_not_pass_for_a_language_model(llama: str, tmp_path: Path, lora: LoRA | None) -> None:
    reward_model(tmp_path / "reward", llama, lora)
    with pytest.raises(UserError, match=r"base.name: .*reward"):
        load_causal_lm(Base(name=str(tmp_path / "reward")))


def test_adapters_come_without_dropout_until_they_train(llama: str, tmp_path: Path) -> None:
    reward_model(tmp_path / "reward", llama, ADAPTERS[1])
    assert not any(module.training for module in load_scorer(Base(name=str(tmp_path / "reward"))).modules())
    assert not any(m.training for m in load_causal_lm(Base(name=llama, lora=ADAPTERS[1])).modules())


@pytest.mark.parametrize("fresh", [False, True])
def test_attention_that_caps_its_logits_is_not_sdpas(tmp_path, monkeypatch, fresh):
    """transformers 5.19 takes its sdpa for Gemma 2, which leaves the cap out."""
    from transformers import Gemma2PreTrainedModel

    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    folder = tiny.save_model(tmp_path, "gemma2", attn_logit_softcapping=5.0)
    tokens = torch.arange(3, 23)[None]
    found = load_causal_lm(Base(folder, fresh=fresh))
    asked = load_causal_lm(Base(folder, fresh=fresh, attention="eager"))
    assert found.config._attn_implementation == "eager"
    with torch.no_grad():
        assert found(tokens).logits.equal(asked(tokens).logits)
    with pytest.raises(UserError, match=r"^base\.attention: the model caps its attention's logits, and sdpa does not"):
        load_causal_lm(Base(folder, fresh=fresh, attention="sdpa"))
    uncapped = tiny.save_model(tmp_path / "uncapped", "gemma2", attn_logit_softcapping=None)
    assert load_causal_lm(Base(uncapped, attention="sdpa")).config._attn_implementation == "sdpa"
