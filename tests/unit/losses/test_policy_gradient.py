"""PPO's clipped losses by hand, the clip boundary included."""

import math

import pytest
import torch

from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss, ClippedValueLoss, PolicyTerms


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def loss_of(loss: ClippedPolicyLoss, logprobs: torch.Tensor, advantages: torch.Tensor) -> PolicyTerms:
    """With old log-probs of 0, and every token an action."""
    old = torch.zeros_like(advantages)
    return loss(logprobs, old, advantages, torch.ones_like(old, dtype=torch.bool), old)


def test_policy_loss_by_hand() -> None:
    ratios = row(1.0, 1.1, 1.5, 0.5, 1.5, 0.5)
    advantages = row(2.0, 2.0, 2.0, 2.0, -2.0, -2.0)
    losses, ratio, clipped, importance = loss_of(ClippedPolicyLoss(clip_low=0.2), ratios.log(), advantages)
    assert losses[0].tolist() == pytest.approx([-2.0, -2.2, -2.4, -1.0, 3.0, 1.6], abs=1e-12)
    assert ratio[0].tolist() == pytest.approx(ratios[0].tolist(), abs=1e-12)
    # Clipped only where the clip takes the gradient away: ρ up with A > 0, ρ down with A < 0.
    assert clipped[0].tolist() == [False, False, True, False, False, True]
    assert importance[0].tolist() == [1.0] * 6


def test_policy_gradient_stops_at_the_clip_boundary() -> None:
    """Just inside 1 ± ε the gradient is −A·ρ, just outside it is 0 on the greedy side and −A·ρ on the other."""
    inside, outside = 1 - 1e-9, 1 + 1e-9
    for advantage, edge, greedy in ((1.0, 1.2, True), (1.0, 0.8, False), (-1.0, 0.8, True), (-1.0, 1.2, False)):
        for factor in (inside, outside):
            ratio = 1 + (edge - 1) * factor
            logprobs = row(math.log(ratio)).requires_grad_()
            loss_of(ClippedPolicyLoss(clip_low=0.2), logprobs, row(advantage)).losses.sum().backward()
            expected = 0.0 if greedy and factor is outside else -advantage * ratio
            assert logprobs.grad is not None
            assert logprobs.grad.item() == pytest.approx(expected, abs=1e-12), (advantage, ratio)


def test_ratio_one_is_unclipped_and_gives_the_plain_policy_gradient() -> None:
    logprobs = row(-1.0, -2.0, -3.0).requires_grad_()
    advantages = row(0.5, -0.25, 0.0)
    old, mask = logprobs.detach(), torch.ones(1, 3, dtype=torch.bool)
    losses, ratio, clipped, _ = ClippedPolicyLoss()(logprobs, old, advantages, mask, old)
    losses.sum().backward()
    assert ratio[0].tolist() == [1.0, 1.0, 1.0]
    assert not clipped.any()
    assert logprobs.grad is not None
    assert logprobs.grad.equal(-advantages)


def test_huge_log_ratios_stay_finite() -> None:
    losses, ratio, _, _ = loss_of(ClippedPolicyLoss(), row(1000.0, -1000.0).float(), row(-1.0, -1.0).float())
    assert torch.isfinite(losses).all()
    assert ratio[0, 0].item() == pytest.approx(math.exp(20), rel=1e-5)


def test_dual_clip_bounds_the_loss_of_bad_actions() -> None:
    """A = −2: the loss 2ρ stops at c·2, and with it the gradient; A > 0 is left alone (1912.09729, Eq. 5)."""
    logprobs = row(2.0, 5.0, 5.0, 0.1).log().requires_grad_()
    losses, _, clipped, _ = loss_of(ClippedPolicyLoss(dual_clip=3.0), logprobs, row(-2.0, -2.0, 2.0, 2.0))
    assert losses[0].tolist() == pytest.approx([4.0, 6.0, -2.4, -0.2], abs=1e-12)
    assert clipped[0].tolist() == [False, True, True, False]
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad[0].tolist() == pytest.approx([4.0, 0.0, 0.0, -0.2], abs=1e-12)


def test_the_sequence_ratio_is_the_geometric_mean_of_its_tokens() -> None:
    """Tokens off the mask have no say; every token of a response has the response's ρ (2507.18071, Eq. 7)."""
    logprobs = torch.tensor([[9.0, 0.1, 0.3], [0.0, 0.0, -0.5]], dtype=torch.float64).requires_grad_()
    mask = torch.tensor([[False, True, True], [True, False, True]])
    zero = torch.zeros_like(logprobs)
    terms = ClippedPolicyLoss(clip_low=0.2, ratio="sequence")(logprobs, zero, torch.ones_like(zero), mask, zero)
    assert terms.ratio[:, 2].tolist() == pytest.approx([math.exp(0.2), math.exp(-0.25)], abs=1e-12)
    assert terms.clipped[:, 2].tolist() == [True, False], "e^0.2 > 1.2 is clipped for the whole response"
    terms.losses[mask].sum().backward()
    assert logprobs.grad is not None
    half = -math.exp(-0.25)  # two tokens, each with the response's ρ, and half of its logarithm from each
    assert logprobs.grad[1].tolist() == pytest.approx([half, 0.0, half], abs=1e-12)


def test_importance_weights_are_truncated_and_carry_no_gradient() -> None:
    """min(π_old/π_sampler, c): the sampler drew the first token half as often as it should have, the second rarely."""
    logprobs = row(0.0, 0.0, 0.0).requires_grad_()
    sampled = row(math.log(1 / 2), math.log(1 / 8), math.log(4))
    mask = torch.ones(1, 3, dtype=torch.bool)
    terms = ClippedPolicyLoss(importance_cap=3.0)(logprobs, row(0.0, 0.0, 0.0), row(1.0, 1.0, 1.0), mask, sampled)
    assert terms.importance[0].tolist() == pytest.approx([2.0, 3.0, 0.25], abs=1e-12)
    assert terms.losses[0].tolist() == pytest.approx([-2.0, -3.0, -0.25], abs=1e-12)
    assert terms.ratio[0].tolist() == [1.0, 1.0, 1.0]
    ignored = ClippedPolicyLoss()(logprobs, row(0.0, 0.0, 0.0), row(1.0, 1.0, 1.0), mask, sampled)
    assert ignored.losses[0].tolist() == [-1.0, -1.0, -1.0]


@pytest.mark.parametrize(
    ("setting", "bad"),
    [("clip_low", 1.0), ("clip_high", 0.0), ("dual_clip", 1.0), ("importance_cap", 0.0), ("entropy_coefficient", -0.1)],
)
def test_settings_without_a_meaning_are_refused(setting: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"policy_loss\.{setting}.*{bad}"):
        ClippedPolicyLoss(**{setting: bad})  # type: ignore[arg-type]


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
    with pytest.raises(ValueError, match=r"policy_loss\.clip_low"):
        ClippedPolicyLoss(clip_low=bad)
    with pytest.raises(ValueError, match=r"value_loss\.clip"):
        ClippedValueLoss(clip=bad)


def test_negative_value_coefficient_is_refused() -> None:
    with pytest.raises(ValueError, match="coefficient"):
        ClippedValueLoss(coefficient=-1.0)


def test_a_wider_clip_above_than_below_by_hand() -> None:
    """Clip-higher: at A > 0 the loss is flat above 1.28 alone, at A < 0 below 0.8 alone."""
    ratios = row(1.25, 1.4, 0.7, 0.7)
    losses, _, clipped, _ = loss_of(
        ClippedPolicyLoss(clip_low=0.2, clip_high=0.28), ratios.log(), row(1.0, 1.0, -1.0, 1.0)
    )
    assert losses[0].tolist() == pytest.approx([-1.25, -1.28, 0.8, -0.7], abs=1e-12)
    assert clipped[0].tolist() == [False, True, True, False]


def test_a_bound_above_1_is_allowed_above() -> None:
    losses, _, _, _ = loss_of(ClippedPolicyLoss(clip_high=4.0), row(6.0).log(), row(1.0))
    assert losses.item() == pytest.approx(-5.0)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan, math.inf])
def test_a_bound_above_without_a_meaning_is_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"policy_loss\.clip_high"):
        ClippedPolicyLoss(clip_high=bad)
