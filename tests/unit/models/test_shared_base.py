"""Policy, reference, critic and reward model as adapters on one frozen base, in full precision and in 4 bits."""

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from bitsandbytes.functional import dequantize_4bit
from torch import Tensor

from rlhf_lit.algorithms import PPO, SFT, RewardModel
from rlhf_lit.errors import UserError
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.models.saving import save_hf
from rlhf_lit.rollout.rewards import RewardFromModel, RewardSource, RewardSum, score_sequences

SEQUENCES = tiny.sequences(tiny.RAGGED)
FOUR_BITS = Quantization(compute_dtype="float32")


@pytest.fixture(params=[None, FOUR_BITS], ids=["full", "4-bit"])
def quantization(request: pytest.FixtureRequest) -> Quantization | None:
    return request.param  # type: ignore[no-any-return]


def sft_run(llama: str, folder: Path, quantization: Quantization | None) -> str:
    module = tiny.build(SFT(Base(name=llama, lora=LoRA(rank=4), quantization=quantization)))
    tiny.disturb(module, 0.02)
    save_hf(module, folder / "sft")
    return str(folder / "sft")


def reward_run(base: Base, folder: Path, seed: int = 5) -> str:
    """A reward model that has left its start and was centred."""
    module = tiny.build(RewardModel(base))
    tiny.disturb(module, 0.02, seed)
    module.normalise([tiny.preferences()])
    save_hf(module, folder / f"reward{seed}")
    return str(folder / f"reward{seed}")


def ppo(llama: str, folder: Path, quantization: Quantization | None, **settings: Any) -> PPO:
    """An SFT adapter continued, against a reward model of another rank on the same base."""
    sft = sft_run(llama, folder, quantization)
    reward = RewardFromModel(
        reward_run(Base(name=llama, lora=LoRA(rank=2, alpha=8), quantization=quantization), folder)
    )
    return tiny.make_ppo(Base(name=sft), reward=reward, critic=tiny.Critic(init="reward"), **settings)


def scores(source: RewardSource) -> Tensor:
    count = len(SEQUENCES)
    return source(SEQUENCES, [""] * count, [""] * count, [{}] * count, 1000)


def test_the_reward_costs_no_second_model_and_scores_as_one(
    llama: str, tmp_path: Path, quantization: Quantization | None
) -> None:
    module = ppo(llama, tmp_path, quantization)
    assert not list(module.reward.parameters())
    assert set(module.roles.models) == {"policy"}
    alone = load_scorer(Base(name=str(tmp_path / "reward5")), trained=True)
    expected = score_sequences(alone, SEQUENCES, 1000)
    torch.testing.assert_close(scores(module.reward), expected, rtol=1e-6, atol=1e-6)
    assert float(expected.std()) > 1e-3
    apart = RewardFromModel(str(tmp_path / "reward5"), own_base=True)
    other = tiny.make_ppo(Base(name=str(tmp_path / "sft")), reward=apart)
    assert list(other.reward.parameters())
    torch.testing.assert_close(scores(other.reward), expected, rtol=1e-6, atol=1e-6)


def outputs(module: PPO) -> dict[str, Tensor]:
    """What each role makes of the same sequences."""
    found = {}
    with torch.no_grad():
        for role in ("policy", "reference", "value", "reward0"):
            with module.roles.acting(role) as model:
                found[role] = token_logprobs(model, SEQUENCES)
    return found


def test_roles_in_every_order(llama: str, tmp_path: Path, quantization: Quantization | None) -> None:
    """Each role's output is its own, whichever played before it, and nested blocks give the outer role back."""
    module = ppo(llama, tmp_path, quantization)
    tiny.disturb(module, 0.02)
    alone = outputs(module)
    for a, b in permutations(alone, 2):
        assert not alone[a].equal(alone[b])
    before = {name: parameter.requires_grad for name, parameter in module.named_parameters()}
    with torch.no_grad():
        for order in permutations(alone):
            for role in order:
                with module.roles.acting(role) as model:
                    assert token_logprobs(model, SEQUENCES).equal(alone[role])
        for outer, inner in permutations(alone, 2):
            with module.roles.acting(outer) as model:
                with module.roles.acting(inner):
                    pass
                assert token_logprobs(model, SEQUENCES).equal(alone[outer])
    assert before == {name: parameter.requires_grad for name, parameter in module.named_parameters()}


def test_what_trains_and_what_stays_over_steps(llama: str, tmp_path: Path, quantization: Quantization | None) -> None:
    """The base, the reference and the reward stay to the bit while policy and critic move."""
    module = ppo(llama, tmp_path, quantization)
    base = load_causal_lm(Base(name=llama, lora=LoRA(rank=4), quantization=quantization))
    before, scored = outputs(module), scores(module.reward)
    optimizer = torch.optim.AdamW(module.trainable_parameters(), lr=1e-2)
    for number in range(3):
        tiny.Step(module, module.rollout(tiny.prompts(), number))
        optimizer.step()
    after = outputs(module)
    assert after["reference"].equal(before["reference"])
    assert after["reward0"].equal(before["reward0"])
    assert scores(module.reward).equal(scored)
    assert not after["policy"].equal(before["policy"])
    assert not after["value"].equal(before["value"])
    with torch.no_grad(), module.roles.policy.disable_adapter():
        assert token_logprobs(module.roles.policy, SEQUENCES).equal(token_logprobs(base, SEQUENCES))


def test_gradients_of_one_role_never_touch_another(llama: str, tmp_path: Path) -> None:
    module = ppo(llama, tmp_path, None)
    experience = module.rollout(tiny.prompts(), 0)
    shares = list(module.losses(experience, module.denominators(experience)))
    assert len(shares) == 2
    for share, adapter in zip(shares, ("default", "value"), strict=True):
        module.zero_grad()
        share.loss.backward()
        touched = {name for name, p in module.named_parameters() if p.grad is not None and p.grad.any()}
        assert touched
        assert all(f".{adapter}." in name or (adapter == "value" and "heads.value" in name) for name in touched)


def test_two_reward_models_share_it_too(llama: str, tmp_path: Path) -> None:
    base = Base(name=llama, lora=LoRA(rank=4))
    folders = [reward_run(base, tmp_path, seed) for seed in (5, 6)]
    sources: dict[str, RewardSource] = {f"r{i}": RewardFromModel(folder) for i, folder in enumerate(folders)}
    module = tiny.make_ppo(base, reward=RewardSum(sources, {"r0": 1.0, "r1": -2.0}), critic=tiny.Critic(init="reward"))
    each = [score_sequences(load_scorer(Base(name=folder)), SEQUENCES, 1000) for folder in folders]
    torch.testing.assert_close(scores(module.reward), each[0] - 2 * each[1], rtol=1e-5, atol=1e-5)
    assert set(module.roles.heads) == {"value", "reward0", "reward1"}


# --- which base an adapter stands on ---------------------------------------------------------------------------------


def test_an_adapter_comes_back_on_the_base_it_was_trained_on(llama: str, tmp_path: Path) -> None:
    from bitsandbytes.nn import Linear4bit

    model = load_causal_lm(Base(name=sft_run(llama, tmp_path, FOUR_BITS)))
    assert any(isinstance(module, Linear4bit) for module in model.modules())


@pytest.mark.parametrize(("trained", "wanted"), [(None, FOUR_BITS), (FOUR_BITS, Quantization(type="fp4"))])
def test_an_adapter_on_a_base_in_other_bits_is_refused(
    llama: str, tmp_path: Path, trained: Quantization | None, wanted: Quantization
) -> None:
    folder = sft_run(llama, tmp_path, trained)
    with pytest.raises(UserError, match=r"base\.name: the adapter in .* with quantization .* this one has"):
        load_causal_lm(Base(name=folder, quantization=wanted))


def test_an_adapter_fits_its_base_in_another_width(llama: str, tmp_path: Path) -> None:
    model = load_causal_lm(Base(name=sft_run(llama, tmp_path, None), dtype="bfloat16"))
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {torch.bfloat16}


def test_a_base_whose_weights_were_replaced_is_refused(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    folder = sft_run(base, tmp_path, None)
    load_causal_lm(Base(name=folder))
    tiny.save_model(tmp_path / "base", seed=1)
    with pytest.raises(UserError, match="are not those that the adapter in"):
        load_causal_lm(Base(name=folder))


def test_a_base_that_was_moved_is_the_same_base(tmp_path: Path) -> None:
    """Equal weights under another name: the reward's adapter fits a policy on a copy of its base."""
    here, there = (tiny.save_model(tmp_path / name) for name in ("here", "there"))
    reward = RewardFromModel(reward_run(Base(name=there, lora=LoRA(rank=4)), tmp_path))
    module = tiny.make_ppo(Base(name=here, lora=LoRA(rank=4)), reward=reward)
    assert "reward0" in module.roles.heads


@pytest.mark.parametrize("part", ["reward", "critic"])
def test_a_reward_of_another_base_is_refused(llama: str, tmp_path: Path, part: str) -> None:
    other = tiny.save_model(tmp_path / "other", seed=1)
    folder = reward_run(Base(name=other, lora=LoRA(rank=4)), tmp_path)
    reward = RewardFromModel(folder, own_base=part == "critic")
    field = "reward.path" if part == "reward" else "critic.init"
    with pytest.raises(UserError, match=rf"{field}: the adapter in .* with name .*other"):
        tiny.make_ppo(Base(name=llama, lora=LoRA(rank=4)), reward=reward, critic=tiny.Critic(init="reward"))


def test_a_language_models_adapter_is_no_reward(llama: str, tmp_path: Path) -> None:
    folder = sft_run(llama, tmp_path, None)
    with pytest.raises(UserError, match=r"reward\.path: .* no reward model's"):
        tiny.make_ppo(Base(name=llama, lora=LoRA(rank=4)), reward=RewardFromModel(folder))


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["whole policy", "adapter"])
def test_a_whole_reward_model_is_held_in_4_bits_and_a_critic_from_it_is_not(
    llama: str, tmp_path: Path, lora: LoRA | None
) -> None:
    folder = reward_run(Base(name=llama), tmp_path)
    reward = RewardFromModel(folder, quantization=FOUR_BITS)
    module = tiny.make_ppo(
        Base(name=llama, lora=lora), reward=reward, critic=tiny.Critic("policy" if lora else "reward")
    )
    assert any(hasattr(parameter, "quant_state") for parameter in module.reward.parameters())
    assert not any(parameter.requires_grad for parameter in module.reward.parameters())
    alone = load_scorer(Base(name=folder), trained=True)
    exact = score_sequences(alone, SEQUENCES, 1000)
    with torch.no_grad():
        for name, weight in module.reward.model.named_parameters():  # type: ignore[union-attr]
            if hasattr(weight, "quant_state"):
                alone.get_parameter(name).copy_(dequantize_4bit(weight, weight.quant_state))
    rounded = score_sequences(alone, SEQUENCES, 1000)
    assert float((rounded - exact).abs().max()) > 1e-2
    torch.testing.assert_close(scores(module.reward), rounded, rtol=1e-4, atol=1e-4)
    if lora is None:
        critic = module.roles.models["value"]
        assert not any(hasattr(parameter, "quant_state") for parameter in critic.parameters())
        assert all(parameter.requires_grad for parameter in critic.parameters())
