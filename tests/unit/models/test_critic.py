"""A critic that starts from a reward model: of another size, trained in the policy's manner, on the policy's base."""

from pathlib import Path

import pytest
import tiny
import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf_lit.algorithms import RewardModel
from rlhf_lit.algorithms.ppo import Critic
from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.heads import sequence_scores, token_values
from rlhf_lit.models.quantization import Dtype, Quantization
from rlhf_lit.models.saving import save_hf
from rlhf_lit.rollout.rewards import RewardFromModel


@pytest.fixture
def llama(tmp_path: Path) -> str:
    return tiny.save_model(tmp_path / "llama")


def reward_folder(tmp_path: Path, base: Base) -> str:
    save_hf(tiny.build(RewardModel(base)), tmp_path / "reward")
    return str(tmp_path / "reward")


def test_a_critic_of_another_size_starts_with_the_reward_models_scores(llama: str, tmp_path: Path) -> None:
    larger = tiny.save_model(tmp_path / "larger", hidden_size=48, intermediate_size=64)
    reward = RewardFromModel(reward_folder(tmp_path, Base(name=larger)))
    ppo = tiny.make_ppo(Base(name=llama, gradient_checkpointing=True), reward=reward, critic=Critic())
    rows = tiny.sequences([(3, 4), (2, 6)])
    with torch.no_grad(), ppo.roles.acting("value") as model:
        # The value of the state after the last token would be its score; one token back, it is that of the shorter row.
        values = token_values(model, ppo.roles.heads["value"], rows)
        shorter = tiny.Sequences(rows.tokens, rows.lengths - 1, rows.mask)
        scores = sequence_scores(reward.model, unwrapped(reward.model).score, shorter)
    last = values[torch.arange(2), rows.lengths - 1]
    torch.testing.assert_close(last, scores, atol=1e-6, rtol=1e-5)
    layers = [m for m in ppo.roles.models["value"].modules() if isinstance(m, GradientCheckpointingLayer)]
    assert layers
    assert all(layer.gradient_checkpointing and layer.training for layer in layers)


@pytest.mark.parametrize("lora", [LoRA(rank=4, alpha=16), LoRA(rank=2, alpha=8, rslora=True)])
def test_an_adapter_of_another_rank_or_scale_keeps_its_own(llama: str, tmp_path: Path, lora: LoRA) -> None:
    module = tiny.build(RewardModel(Base(name=llama, lora=lora)))
    tiny.disturb(module, 0.02)
    save_hf(module, tmp_path / "reward")
    ppo = tiny.make_ppo(
        Base(name=llama, lora=LoRA(rank=4, alpha=8)), reward=RewardFromModel(str(tmp_path / "reward")), critic=Critic()
    )
    rows = tiny.sequences([(3, 4), (2, 6)])
    with torch.no_grad(), ppo.roles.acting("value") as model:
        values = sequence_scores(model, ppo.roles.heads["value"], rows)
        torch.testing.assert_close(values, module.scores(rows), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(("policy", "reward"), [("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_critic_trains_in_the_policys_width_whatever_the_reward_model_is_frozen_in(
    llama: str, tmp_path: Path, policy: Dtype, reward: Dtype
) -> None:
    """bfloat16 has 8 bits: a step of a usual learning rate would be rounded away."""
    source = RewardFromModel(reward_folder(tmp_path, Base(name=llama)), dtype=reward)
    ppo = tiny.make_ppo(Base(name=llama, dtype=policy), reward=source, critic=Critic())
    assert {p.dtype for p in ppo.roles.models["value"].parameters()} == {getattr(torch, policy)}
    assert next(ppo.roles.heads["value"].parameters()).dtype == torch.float32


def test_a_whole_critic_of_a_4_bit_reward_adapter_is_refused(llama: str, tmp_path: Path) -> None:
    base = Base(name=llama, lora=LoRA(rank=2), quantization=Quantization(compute_dtype="float32"))
    reward = RewardFromModel(reward_folder(tmp_path, base))
    with pytest.raises(UserError, match=r"critic\.init: the reward model in .* is an adapter on 4-bit weights"):
        tiny.make_ppo(Base(name=llama), reward=reward, critic=Critic())
