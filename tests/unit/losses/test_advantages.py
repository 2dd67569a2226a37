"""Generalised advantage estimation against the double sum that defines it."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_lit.losses.advantages import (
    GAE,
    GroupRelative,
    LeaveOneOut,
    RolloutRewards,
    generalised_advantages,
    group_relative,
    leave_one_out,
)

GENERATOR = torch.Generator().manual_seed(0)
REWARDS, VALUES = torch.randn(2, 6, 12, generator=GENERATOR, dtype=torch.float64).unbind(0)
LENGTHS = torch.tensor([12, 1, 5, 7, 2, 9])
STARTS = torch.tensor([0, 3, 2, 1, 6, 3])
COLUMNS = torch.arange(12)
CONTIGUOUS = (STARTS[:, None] <= COLUMNS) & ((STARTS + LENGTHS)[:, None] > COLUMNS)
# A user's turn stands between two turns of actions.
INTERRUPTED = CONTIGUOUS & (COLUMNS != 4) & (COLUMNS != 5)


def double_sum(mask: Tensor, gamma: float, lam: float) -> Tensor:
    """A_t = Σ_k (γλ)^k δ_{t+k} over the row's actions (1506.02438, Eq. 16), in O(T²)."""
    advantages = torch.zeros_like(VALUES)
    for row in range(len(mask)):
        actions = mask[row].nonzero().flatten().tolist()
        r, v = REWARDS[row, actions].tolist(), [*VALUES[row, actions].tolist(), 0.0]
        deltas = [r[i] + gamma * v[i + 1] - v[i] for i in range(len(actions))]
        for i, t in enumerate(actions):
            advantages[row, t] = sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[i:]))
    return advantages


@pytest.mark.parametrize("mask", [CONTIGUOUS, INTERRUPTED], ids=["contiguous", "interrupted"])
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
def test_against_the_double_sum(mask: Tensor, gamma: float, lam: float) -> None:
    advantages, returns = generalised_advantages(REWARDS, VALUES, mask, gamma, lam)
    expected = double_sum(mask, gamma, lam)
    torch.testing.assert_close(advantages, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(returns, torch.where(mask, expected + VALUES, 0.0), rtol=0, atol=1e-12)
    assert not advantages[~mask].any()
    assert not returns[~mask].any()


def test_lambda_one_gives_return_minus_value() -> None:
    """With λ = γ = 1 the target is the sum of the rewards to come, whatever the values are."""
    masked = torch.where(CONTIGUOUS, REWARDS, 0.0)
    to_come = torch.where(CONTIGUOUS, masked.flip(1).cumsum(1).flip(1), 0.0)
    advantages, returns = generalised_advantages(REWARDS, VALUES, CONTIGUOUS, 1.0, 1.0)
    torch.testing.assert_close(returns, to_come, rtol=0, atol=1e-12)
    torch.testing.assert_close(advantages, torch.where(CONTIGUOUS, to_come - VALUES, 0.0), rtol=0, atol=1e-12)


def test_lambda_zero_gives_the_one_step_error() -> None:
    advantages, _ = generalised_advantages(REWARDS, VALUES, CONTIGUOUS, 0.9, 0.0)
    after = torch.where(CONTIGUOUS, VALUES, 0.0).roll(-1, 1)
    after[:, -1] = 0
    torch.testing.assert_close(advantages, torch.where(CONTIGUOUS, REWARDS + 0.9 * after - VALUES, 0.0))


def test_by_hand() -> None:
    rewards, values = torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[0.5, 1.0, 1.5]])
    advantages, returns = generalised_advantages(rewards, values, torch.ones(1, 3, dtype=torch.bool), 1.0, 0.5)
    assert advantages[0].tolist() == pytest.approx([0.5 + 0.5 * 1.75, 1.5 + 0.25, 0.5])
    assert returns[0].tolist() == pytest.approx([1.875, 2.75, 2.0])


def test_what_lies_off_the_mask_is_never_read() -> None:
    poisoned = [torch.where(CONTIGUOUS, x, torch.nan) for x in (REWARDS, VALUES)]
    clean = generalised_advantages(REWARDS, VALUES, CONTIGUOUS, 0.9, 0.8)
    for a, b in zip(clean, generalised_advantages(*poisoned, CONTIGUOUS, 0.9, 0.8), strict=True):
        assert a.equal(b)


REWARD = torch.tensor([1.0, 10.0, 2.0, 6.0, 20.0], dtype=torch.float64)
GROUP = torch.tensor([7, 3, 7, 7, 3])  # 1, 2 and 6 answer one prompt, 10 and 20 another


def test_leave_one_out_by_hand() -> None:
    advantages, baseline = leave_one_out(REWARD, GROUP)
    assert baseline.tolist() == [4.0, 20.0, 3.5, 1.5, 10.0]
    assert advantages.tolist() == [-3.0, -10.0, -1.5, 4.5, 10.0]


def test_group_relative_by_hand() -> None:
    """Means 3 and 15; Σ(x − μ)² = 14 and 50, so unbiased variances 7 and 50."""
    plain, baseline = group_relative(REWARD, GROUP, scale=False)
    assert baseline.tolist() == [3.0, 15.0, 3.0, 3.0, 15.0]
    assert plain.tolist() == [-2.0, -5.0, -1.0, 3.0, 5.0]
    scaled, _ = group_relative(REWARD, GROUP, scale=True)
    a, b = 7**0.5 + 1e-4, 50**0.5 + 1e-4
    assert scaled.tolist() == pytest.approx([-2 / a, -5 / b, -1 / a, 3 / a, 5 / b], abs=1e-12)


def test_leave_one_out_is_the_mean_difference_times_n_over_n_minus_one() -> None:
    """A group of n: R − mean of the others = n/(n − 1)·(R − μ)."""
    advantages, _ = leave_one_out(REWARD, GROUP)
    plain, _ = group_relative(REWARD, GROUP, scale=False)
    size = torch.tensor([3.0, 2.0, 3.0, 3.0, 2.0], dtype=torch.float64)
    torch.testing.assert_close(advantages, plain * size / (size - 1), rtol=0, atol=1e-12)


def test_equal_rewards_teach_nothing() -> None:
    same, groups = torch.full((4,), 0.3), torch.zeros(4, dtype=torch.int64)
    assert not leave_one_out(same, groups)[0].any()
    assert group_relative(same, groups, scale=True)[0].abs().max() < 1e-3


@pytest.mark.parametrize("size", [3, 5, 7, 8])
def test_equal_rewards_cancel_exactly_in_float32(size: int) -> None:
    rewards, groups = torch.full((3 * size,), 2.3), torch.arange(3).repeat_interleave(size)
    for advantages, _ in (leave_one_out(rewards, groups), group_relative(rewards, groups, scale=True)):
        assert advantages.dtype == torch.float32
        assert not advantages.any()


def test_autocast_does_not_round_what_responses_are_compared_with() -> None:
    """A rollout under `bf16-mixed` works its advantages out inside of autocast, which makes matrix products bf16."""
    rewards, groups = 4 + REWARDS[0].float(), torch.arange(3).repeat_interleave(4)
    for function in (lambda: leave_one_out(rewards, groups), lambda: group_relative(rewards, groups, scale=True)):
        plain = function()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            within = function()
        for a, b in zip(plain, within, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- the family ------------------------------------------------------------------------------------------------------


def rollout(values: Tensor | None = None) -> RolloutRewards:
    """Four responses of up to two tokens, two to each of two prompts."""
    rewards = torch.tensor([[0.5, 2.0], [-1.0, 0.0], [0.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, True], [True, False], [True, True], [True, True]])
    return RolloutRewards(rewards, mask, torch.tensor([7, 7, 3, 3]), values)


def test_what_a_whole_response_is_worth_is_given_to_each_of_its_tokens() -> None:
    found = LeaveOneOut()(rollout())
    assert found.advantages.tolist() == [[3.5, 3.5], [-3.5, 0.0], [3.0, 3.0], [-3.0, -3.0]]
    assert found.values.tolist() == [[-1.0, -1.0], [2.5, 0.0], [1.0, 1.0], [4.0, 4.0]]
    torch.testing.assert_close(found.returns - found.values, found.advantages)
    assert found.metrics == {"rollout/zero_advantages": 0.0}


def test_scaling_by_the_group_or_not_at_all() -> None:
    plain, scaled = (GroupRelative(scale)(rollout()).advantages[:, 0] for scale in ("none", "group"))
    assert plain.tolist() == [1.75, -1.75, 1.5, -1.5]
    deviations = torch.tensor([3.5 / 2**0.5, 3.0 / 2**0.5], dtype=torch.float64).repeat_interleave(2)
    torch.testing.assert_close(scaled, plain / (deviations + 1e-4), rtol=0, atol=1e-12)
    assert GroupRelative("group").rescales
    assert not GroupRelative("none").rescales


def test_gae_whitens_over_all_tokens_and_takes_returns_before() -> None:
    values = torch.tensor([[1.0, 1.0], [0.0, 0.0], [2.0, 3.0], [0.5, 0.0]], dtype=torch.float64)
    raw, whitened = (GAE(0.9, 0.8, whiten)(rollout(values)) for whiten in (False, True))
    real = whitened.advantages[rollout().mask]
    assert float(real.mean()) == pytest.approx(0, abs=1e-12)
    assert float(real.var(correction=0)) == pytest.approx(1, abs=1e-7)
    torch.testing.assert_close(raw.returns, whitened.returns)
    torch.testing.assert_close(raw.advantages, (raw.returns - values) * rollout().mask)
    returns = raw.returns[rollout().mask]
    left = returns - values[rollout().mask]
    explained = 1 - float(left.var(correction=0) / returns.var(correction=0))
    assert raw.metrics["value/explained_variance"] == pytest.approx(explained, abs=1e-12)


@pytest.mark.parametrize(("setting", "bad"), [("gamma", 1.5), ("lam", -0.1), ("lam", math.nan)])
def test_discounts_outside_of_0_to_1_are_refused(setting: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"advantages\.{setting} must lie in \[0, 1\]"):
        GAE(**{setting: bad})
