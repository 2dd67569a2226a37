"""Families for which transformers has no sequence classifier: ours, saved, and read again here and elsewhere."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rlhf_lit.algorithms import RewardModel
from rlhf_lit.algorithms.ppo import Critic
from rlhf_lit.models.anatomy import states_width, unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.saving import save_hf
from rlhf_lit.rollout.rewards import RewardFromModel, score_sequences

PAGE = Path(__file__).parents[3] / "docs" / "reward_models.md"
KINDS = ["granite", "mamba2", "llama4_text", "falcon_h1", "recurrent_gemma", "rwkv"]


def trained(folder: Path, kind: str, lora: LoRA | None = None) -> RewardModel:
    """A reward model whose every weight has moved, and its saved folder ``hf``."""
    module = tiny.build(RewardModel(Base(tiny.save_model(folder / "base", kind), lora=lora)))
    tiny.disturb(module, 0.02)
    unwrapped(module.scorer).config.reward_bias = 0.25
    module.scorer.eval()
    save_hf(module, folder / "hf")
    return module


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [None, pytest.param(LoRA(rank=2), marks=pytest.mark.soak)])
def test_saved_and_loaded_the_scores_are_equal(kind: str, lora: LoRA | None, tmp_path: Path) -> None:
    module = trained(tmp_path, kind, lora)
    sequences = tiny.sequences(tiny.RAGGED)
    expected = score_sequences(module.scorer, sequences, tiny.EVERYTHING)
    assert float(expected.std()) > 0.05
    loaded = load_scorer(Base(str(tmp_path / "hf")), trained=True)
    ours, theirs = module.scorer.state_dict(), loaded.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())
    # Some kernels round by where a tensor lies in memory.
    torch.testing.assert_close(score_sequences(loaded, sequences, tiny.EVERYTHING), expected, rtol=0, atol=2e-6)
    assert unwrapped(loaded).new_head is False


@pytest.mark.parametrize("kind", ["llama", "gpt2", "granite"])
def test_a_head_keeps_its_digits_on_a_body_in_16_bits(kind: str, tmp_path: Path) -> None:
    base = Base(tiny.save_model(tmp_path / "base", kind), dtype="bfloat16")
    module = tiny.build(RewardModel(base))
    tiny.disturb(module, 0.02)
    save_hf(module, tmp_path / "hf")
    head = unwrapped(module.scorer).score.weight
    assert head.dtype == torch.float32
    assert not torch.equal(head, head.bfloat16().float())
    loaded = unwrapped(load_scorer(Base(str(tmp_path / "hf"), dtype="bfloat16"), trained=True))
    assert torch.equal(loaded.score.weight, head)
    assert (
        next(loaded.model.parameters() if kind != "gpt2" else loaded.transformer.parameters()).dtype == torch.bfloat16
    )
    classes = type(loaded).__mro__
    assert all("score" not in (getattr(kind, "_keep_in_fp32_modules_strict", None) or ()) for kind in classes)


@pytest.mark.parametrize("kind", ["granite", "mamba2", pytest.param("llama4_text", marks=pytest.mark.soak)])
def test_the_page_says_how_to_read_it_elsewhere(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lines know nothing of this package."""
    module = trained(tmp_path, kind)
    source = next(block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S) if "AutoModel" in block)
    assert "rlhf_lit" not in source
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(source.replace("runs/reward/version_0/hf", "hf").replace("A question. An answer.", "w3 w9 w7 w20"), found)
    tokens = [3, 9, 7, 20]
    row = tiny.Sequences.pad([tokens], [[True] * 4])
    assert found["tokens"]["input_ids"].tolist() == [tokens]
    assert found["score"] == pytest.approx(score_sequences(module.scorer, row, 100).item(), abs=2e-6)
    assert json.loads((tmp_path / "hf" / "reward.json").read_text())["bias"] == 0.25


@pytest.mark.parametrize("kind", ["mamba2", "opt"])
def test_it_is_a_reward_and_the_start_of_a_critic(kind: str, tmp_path: Path) -> None:
    trained(tmp_path, kind)
    reward = RewardFromModel(str(tmp_path / "hf"))
    module = tiny.make_ppo(Base(str(tmp_path / "base")), reward=reward, critic=Critic(init="reward"))
    assert module.rollout(tiny.prompts(), 0).columns()


@pytest.mark.parametrize("trunk", [False, True])
@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_heads_are_as_wide_as_the_states_they_read(trunk: bool, lora: LoRA | None, tmp_path: Path) -> None:
    """OPT-350m's come out of its body narrower than its layers are."""
    folder = tiny.save_model(tmp_path / "base", "opt", word_embed_proj_dim=16)
    assert states_width(load_causal_lm(Base(folder))) == 16
    module = tiny.make_ppo(Base(folder, lora=lora), critic=Critic(init="policy", trunk=trunk))
    assert module.roles.heads["value"].weight.shape == (1, 16)
    assert module.rollout(tiny.prompts(), 0).columns()
    reward = trained(tmp_path / "reward", "opt")
    assert unwrapped(reward.scorer).score.weight.shape == (1, 32)


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_a_narrow_reward_model_starts_a_critic(lora: LoRA | None, tmp_path: Path) -> None:
    """As a model of its own, and as an adapter on the policy's base."""
    base = Base(tiny.save_model(tmp_path / "base", "opt", word_embed_proj_dim=16), lora=lora)
    module = tiny.build(RewardModel(base))
    save_hf(module, tmp_path / "hf")
    ppo = tiny.make_ppo(base, reward=RewardFromModel(str(tmp_path / "hf")), critic=Critic(init="reward"))
    assert torch.equal(ppo.roles.heads["value"].weight, unwrapped(module.scorer).score.weight)
    assert ppo.rollout(tiny.prompts(), 0).columns()
