"""A rollout's experience, rebuilt from its tokens by hand."""

from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from rlhf_lit.algorithms import PPO
from rlhf_lit.losses.advantages import GAE
from rlhf_lit.losses.kl import AdaptiveKL
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.base import Base
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.rollout.rewards import MissingEOS
from rlhf_lit.rollout.shaping import Shaping


def moved(llama: str, **settings: object) -> PPO:
    """PPO whose policy has left its reference, with λ = γ = 1 and nothing whitened: returns are sums of rewards."""
    module = tiny.make_ppo(Base(name=llama), **{"advantages": GAE(lam=1.0, whiten=False), **settings})
    tiny.disturb(module.roles.models["policy"], 0.05)
    return module


def k1(module: PPO, sequences: tiny.Sequences) -> Tensor:
    with torch.no_grad():
        policy = token_logprobs(module.roles.models["policy"], sequences)
        return policy - token_logprobs(module.roles.models["reference"], sequences)


def scores_of(module: PPO, sequences: tiny.Sequences) -> Tensor:
    texts = [
        module.tokenizer.decode(row[mask], skip_special_tokens=True)
        for row, mask in zip(sequences.tokens, sequences.mask, strict=True)
    ]
    return torch.tensor(tiny.word_count([], texts, []))


def test_returns_are_the_score_at_the_last_token_minus_the_penalty_to_come(llama: str) -> None:
    module = moved(llama)
    experience = module.rollout(tiny.prompts(), 0)
    mask, penalty = experience.sequences.mask, 0.2 * k1(module, experience.sequences)
    to_come = penalty.flip(1).cumsum(1).flip(1)
    expected = torch.where(mask, scores_of(module, experience.sequences)[:, None] - to_come, 0.0)
    torch.testing.assert_close(experience.returns, expected, rtol=1e-4, atol=1e-4)
    assert float(penalty.abs().max()) > 0.1
    torch.testing.assert_close(
        experience.advantages, torch.where(mask, expected - experience.values, 0.0), atol=1e-4, rtol=1e-4
    )


def test_the_score_sits_on_the_last_real_token_alone(llama: str) -> None:
    """With γ = ½ a score k tokens ahead counts 2^−k of itself."""
    module = moved(llama, advantages=GAE(0.5, 1.0, whiten=False), kl=tiny.FixedKL(0.0))
    experience = module.rollout(tiny.prompts(), 0)
    mask = experience.sequences.mask
    ahead = mask.flip(1).cumsum(1).flip(1) - 1
    scores = scores_of(module, experience.sequences)
    expected = torch.where(mask, scores[:, None] * 0.5 ** ahead.float(), 0.0)
    torch.testing.assert_close(experience.returns, expected, rtol=1e-4, atol=1e-5)
    assert len(mask.sum(-1).unique()) > 1


@pytest.mark.parametrize(("rule", "expected"), [("subtract", [2.0, 1.5]), ("replace", [2.0, -1.0])])
def test_missing_eos_by_hand(rule: str, expected: list[float]) -> None:
    value = 0.5 if rule == "subtract" else -1.0
    changed = MissingEOS(rule, value)(torch.tensor([2.0, 2.0]), torch.tensor([True, False]))  # type: ignore[arg-type]
    assert changed.tolist() == expected


def test_missing_eos_reaches_the_scores(llama: str) -> None:
    sampling = tiny.Sampling(max_new_tokens=30)
    plain = moved(llama, kl=tiny.FixedKL(0.0), sampling=sampling)
    ruled = moved(
        llama, kl=tiny.FixedKL(0.0), sampling=sampling, shaping=Shaping(missing_eos=MissingEOS("subtract", 3.0))
    )
    a, b = plain.rollout(tiny.prompts(), 0), ruled.rollout(tiny.prompts(), 0)
    last = a.sequences.tokens[torch.arange(8), a.sequences.lengths - 1]
    ended = last == tiny.EOS
    assert ended.any()
    assert not ended.all()
    lost = (a.returns - b.returns)[torch.arange(8), a.sequences.lengths - 1]
    torch.testing.assert_close(lost, torch.where(ended, 0.0, 3.0))


def test_advantages_are_whitened_over_the_rollouts_tokens(llama: str) -> None:
    module = moved(llama, advantages=GAE(lam=1.0))
    experience = module.rollout(tiny.prompts(), 0)
    real = experience.advantages[experience.sequences.mask]
    assert float(real.mean()) == pytest.approx(0, abs=1e-5)
    assert float(real.square().mean()) == pytest.approx(1, abs=1e-4)
    raw = moved(llama).rollout(tiny.prompts(), 0)
    torch.testing.assert_close(experience.returns, raw.returns)  # returns are taken before whitening


def test_the_logged_numbers_are_those_of_the_rollout(llama: str) -> None:
    module = moved(llama)
    experience = module.rollout(tiny.prompts(), 0)
    logged = {name: float(value) for name, value in module.rollout_metrics.items()}
    sequences = experience.sequences
    kl = row_sums(k1(module, sequences), sequences.mask)
    scores = scores_of(module, sequences)
    assert logged["objective/kl"] == pytest.approx(float(kl.mean()), abs=1e-4)
    assert logged["objective/scores"] == pytest.approx(float(scores.mean()), abs=1e-5)
    assert logged["objective/non_score_reward"] == pytest.approx(-0.2 * float(kl.mean()), abs=1e-4)
    assert logged["objective/rlhf_reward"] == pytest.approx(float((scores - 0.2 * kl).mean()), abs=1e-4)
    assert logged["rollout/length"] == pytest.approx(float(sequences.mask.sum(-1).float().mean()))
    with torch.no_grad():
        policy, reference = (
            module.roles.models[role](sequences.tokens).logits[:, :-1][sequences.mask[:, 1:]].log_softmax(-1)
            for role in ("policy", "reference")
        )
    exact = (policy.exp() * (policy - reference)).sum() / 8
    assert logged["objective/kl_exact"] == pytest.approx(float(exact), abs=1e-4)
    assert logged["objective/entropy"] == pytest.approx(float(-(policy.exp() * policy).sum(-1).mean()), abs=1e-5)


def test_the_adaptive_coefficient_moves_after_the_rollout(llama: str) -> None:
    module = moved(llama, kl=AdaptiveKL(0.2, target=1e-6, horizon=100.0))
    for i in range(2):
        before = module.kl_coefficient
        module.rollout(tiny.prompts(), i)
        kl = float(module.rollout_metrics["objective/kl"])
        assert module.rollout_metrics["objective/kl_coef"] == pytest.approx(before)
        assert module.kl_coefficient == pytest.approx(before * (1 + (0.2 if kl > 0 else -0.2) * 8 / 100))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    other = moved(llama, kl=AdaptiveKL(0.2))
    other.on_load_checkpoint(checkpoint)
    assert other.kl_coefficient == pytest.approx(module.kl_coefficient)
