"""DPO, cDPO, robust DPO and IPO against numbers worked out by hand."""

import math

import pytest
import torch

from rlhf_lit.losses.preference import DPOLoss, IPOLoss, PairLogProbs, PreferenceLoss, RobustDPOLoss

LN2 = math.log(2)


def pairs(*rows: tuple[float, float, float, float], tokens: tuple[int, int] = (4, 2)) -> PairLogProbs:
    """Rows of (policy chosen, policy rejected, reference chosen, reference rejected)."""
    columns = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    counts = torch.ones(len(rows), dtype=torch.int64)
    return PairLogProbs(*columns, counts * tokens[0], counts * tokens[1])


# Δ_w = 1, Δ_l = −0.5: h = 1.5
ONE = pairs((-3.0, -2.5, -4.0, -2.0))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_dpo_by_hand() -> None:
    assert DPOLoss(beta=0.4)(ONE).item() == pytest.approx(-log_sigmoid(0.6), abs=1e-12)
    chosen, rejected = DPOLoss(beta=0.4).rewards(ONE)
    assert chosen.item() == pytest.approx(0.4)
    assert rejected.item() == pytest.approx(-0.2)


def test_dpo_is_one_value_per_pair() -> None:
    two = pairs((-3.0, -2.5, -4.0, -2.0), (-2.0, -2.0, -1.0, -3.0))  # h = 1.5 and −2
    expected = [-log_sigmoid(0.6), -log_sigmoid(-0.8)]
    assert DPOLoss(beta=0.4)(two).tolist() == pytest.approx(expected, abs=1e-12)


def test_label_smoothing_is_cdpo() -> None:
    expected = -0.9 * log_sigmoid(0.6) - 0.1 * log_sigmoid(-0.6)
    assert DPOLoss(beta=0.4, label_smoothing=0.1)(ONE).item() == pytest.approx(expected, abs=1e-12)
    # Its minimum lies at σ(βh) = 1 − ε, not at infinity.
    h = torch.linspace(0, 20, 20_001, dtype=torch.float64)
    zero = torch.zeros_like(h)
    losses = DPOLoss(beta=0.4, label_smoothing=0.1)(PairLogProbs(h, zero, zero, zero, zero, zero))
    assert float(h[losses.argmin()]) == pytest.approx(math.log(9) / 0.4, abs=1e-3)


def test_robust_dpo_by_hand() -> None:
    expected = (-0.9 * log_sigmoid(0.6) + 0.1 * log_sigmoid(-0.6)) / 0.8
    assert RobustDPOLoss(beta=0.4, label_smoothing=0.1)(ONE).item() == pytest.approx(expected, abs=1e-12)
    assert RobustDPOLoss(beta=0.4)(ONE).equal(DPOLoss(beta=0.4)(ONE))


def test_robust_dpo_on_flipped_labels_is_dpo_on_true_ones_in_the_mean() -> None:
    chosen, rejected = pairs((-3.0, -2.5, -4.0, -2.0)), pairs((-2.5, -3.0, -2.0, -4.0))  # h = 1.5, and its flip
    robust = RobustDPOLoss(beta=0.4, label_smoothing=0.2)
    mean = 0.8 * robust(chosen) + 0.2 * robust(rejected)
    torch.testing.assert_close(mean, DPOLoss(beta=0.4)(chosen), rtol=0, atol=1e-12)


def test_ipo_sums_or_averages() -> None:
    assert IPOLoss(beta=0.4)(ONE).item() == pytest.approx((1.5 - 1.25) ** 2, abs=1e-12)
    averaged = IPOLoss(beta=0.4, average_log_prob=True)(ONE).item()
    assert averaged == pytest.approx((1 / 4 + 0.5 / 2 - 1.25) ** 2, abs=1e-12)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
def test_step_zero(beta: float) -> None:
    """Policy = reference, whatever the log-probs: ln 2, and 1/(4β²)."""
    same = pairs((-3.0, -2.5, -3.0, -2.5), (-80.0, -1.0, -80.0, -1.0))
    for loss in (
        DPOLoss(beta=beta),
        DPOLoss(beta=beta, label_smoothing=0.2),
        RobustDPOLoss(beta=beta, label_smoothing=0.2),
    ):
        assert loss(same).tolist() == pytest.approx([LN2, LN2], abs=1e-12)
    for averaged in (False, True):
        assert IPOLoss(beta=beta, average_log_prob=averaged)(same).tolist() == pytest.approx([0.25 / beta**2] * 2)
    assert DPOLoss(beta=beta).rewards(same)[0].tolist() == [0.0, 0.0]


def test_dpo_gradient_by_hand() -> None:
    """∂L/∂h = −β·σ(−βh): towards the chosen side, and equal and opposite on the rejected."""
    chosen = torch.tensor([1.0], dtype=torch.float64, requires_grad=True)
    rejected = torch.tensor([-0.5], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(1, dtype=torch.float64)
    DPOLoss(beta=0.4)(PairLogProbs(chosen, rejected, zero, zero, zero, zero)).backward()
    expected = -0.4 / (1 + math.exp(0.6))
    assert chosen.grad is not None
    assert rejected.grad is not None
    assert chosen.grad.item() == pytest.approx(expected, abs=1e-12)
    assert rejected.grad.item() == pytest.approx(-expected, abs=1e-12)


def test_extreme_log_ratios_stay_finite() -> None:
    far = pairs((-4000.0, 0.0, 0.0, -4000.0), (0.0, -4000.0, -4000.0, 0.0))
    losses = DPOLoss(beta=1.0)(far)
    assert losses.tolist() == pytest.approx([8000.0, 0.0])


@pytest.mark.parametrize("kind", [DPOLoss, RobustDPOLoss, IPOLoss])
def test_beta_is_required_and_positive(kind: type[PreferenceLoss]) -> None:
    with pytest.raises(TypeError, match="beta"):
        kind()  # type: ignore[call-arg]
    for beta in (0.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="beta"):
            kind(beta=beta)


@pytest.mark.parametrize("kind", [DPOLoss, RobustDPOLoss])
@pytest.mark.parametrize("smoothing", [-0.1, 0.5, 1.0, math.nan])
def test_label_smoothing_below_a_half(kind: type[DPOLoss | RobustDPOLoss], smoothing: float) -> None:
    with pytest.raises(ValueError, match="label_smoothing"):
        kind(beta=0.1, label_smoothing=smoothing)
