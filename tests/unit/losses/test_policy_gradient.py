"""PPO's clipped losses by hand, the clip boundary included."""

import math

import pytest
import torch

from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss, ClippedValueLoss


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def test_policy_loss_by_hand() -> None:
    ratios = row(1.0, 1.1, 1.5, 0.5, 1.5, 0.5)
    advantages = row(2.0, 2.0, 2.0, 2.0, -2.0, -2.0)
    losses, ratio, clipped = ClippedPolicyLoss(clip=0.2)(ratios.log(), torch.zeros_like(ratios), advantages)
    assert losses[0].tolist() == pytest.approx([-2.0, -2.2, -2.4, -1.0, 3.0, 1.6], abs=1e-12)
    assert ratio[0].tolist() == pytest.approx(ratios[0].tolist(), abs=1e-12)
    # Clipped only where the clip takes the gradient away: ρ up with A > 0, ρ down with A < 0.
    assert clipped[0].tolist() == [False, False, True, False, False, True]


def test_policy_gradient_stops_at_the_clip_boundary() -> None:
    """Just inside 1 ± ε the gradient is −A·ρ, just outside it is 0 on the greedy side and −A·ρ on the other."""
    inside, outside = 1 - 1e-9, 1 + 1e-9
    for advantage, edge, greedy in ((1.0, 1.2, True), (1.0, 0.8, False), (-1.0, 0.8, True), (-1.0, 1.2, False)):
        for factor in (inside, outside):
            ratio = 1 + (edge - 1) * factor
            logprobs = row(math.log(ratio)).requires_grad_()
            ClippedPolicyLoss(clip=0.2)(logprobs, row(0.0), row(advantage))[0].sum().backward()
            expected = 0.0 if greedy and factor is outside else -advantage * ratio
            assert logprobs.grad is not None
            assert logprobs.grad.item() == pytest.approx(expected, abs=1e-12), (advantage, ratio)


def test_ratio_one_is_unclipped_and_gives_the_plain_policy_gradient() -> None:
    logprobs = row(-1.0, -2.0, -3.0).requires_grad_()
    advantages = row(0.5, -0.25, 0.0)
    losses, ratio, clipped = ClippedPolicyLoss()(logprobs, logprobs.detach(), advantages)
    losses.sum().backward()
    assert ratio[0].tolist() == [1.0, 1.0, 1.0]
    assert not clipped.any()
    assert logprobs.grad is not None
    assert logprobs.grad.equal(-advantages)


def test_huge_log_ratios_stay_finite() -> None:
    losses, ratio, _ = ClippedPolicyLoss()(row(1000.0, -1000.0).float(), row(0.0, 0.0).float(), row(-1.0, -1.0).float())
    assert torch.isfinite(losses).all()
    assert ratio[0, 0].item() == pytest.approx(math.exp(20), rel=1e-5)


def test_value_loss_by_hand() -> None:
    values, old, returns = row(1.0, 1.5, 1.5, 0.9), row(1.0, 1.0, 1.0, 1.0), row(3.0, 3.0, 0.0, 3.0)
    losses, clipped = ClippedValueLoss(clip=0.2)(values, old, returns)
    # Moved 0.5 towards R = 3 but only 0.2 may count: ½(1.2 − 3)²; away from R = 0 the plain error is the larger.
    assert losses[0].tolist() == pytest.approx([2.0, 0.5 * 1.8**2, 0.5 * 1.5**2, 0.5 * 2.1**2], abs=1e-12)
    assert clipped[0].tolist() == [False, True, False, False]
    plain, none = ClippedValueLoss(clip=None)(values, old, returns)
    assert plain[0].tolist() == pytest.approx([2.0, 0.5 * 1.5**2, 0.5 * 1.5**2, 0.5 * 2.1**2], abs=1e-12)
    assert not none.any()


@pytest.mark.parametrize("bad", [0.0, -0.2, math.nan])
def test_clip_ranges_are_positive(bad: float) -> None:
    with pytest.raises(ValueError, match=r"policy_loss\.clip"):
        ClippedPolicyLoss(clip=bad)
    with pytest.raises(ValueError, match=r"value_loss\.clip"):
        ClippedValueLoss(clip=bad)


def test_negative_value_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match="coefficient"):
        ClippedValueLoss(coefficient=-1.0)
