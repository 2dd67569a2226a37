"""Generalised advantage estimation against the double sum that defines it."""

import pytest
import torch
from torch import Tensor

from rlhf_lit.losses.advantages import generalised_advantages

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
