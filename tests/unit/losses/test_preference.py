"""The losses over preferences against numbers worked out by hand."""

import math
from collections.abc import Callable

import pytest
import torch
from scipy.optimize import minimize_scalar

from rlhf_lit.losses.preference import (
    APODownLoss,
    APOZeroLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    LogRatioLoss,
    ORPOLoss,
    PairLogProbs,
    PreferenceLoss,
    RobustDPOLoss,
    SimPOLoss,
    log1mexp,
)

LN2 = math.log(2)
COMPARING = [DPOLoss, RobustDPOLoss, IPOLoss, HingeLoss, APOZeroLoss, APODownLoss]


def pairs(*rows: tuple[float, float, float, float], tokens: tuple[int, int] = (4, 2)) -> PairLogProbs:
    """Rows of (policy chosen, policy rejected, reference chosen, reference rejected)."""
    columns = torch.tensor(rows, dtype=torch.float64).unbind(-1)
    counts = torch.ones(len(rows), dtype=torch.int64)
    return PairLogProbs(*columns, counts * tokens[0], counts * tokens[1])


# Δ_w = 1, Δ_l = −0.5: h = 1.5
ONE = pairs((-3.0, -2.5, -4.0, -2.0))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


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


def test_hinge_by_hand() -> None:
    assert HingeLoss(beta=0.4)(ONE).item() == pytest.approx(1 - 0.6, abs=1e-12)
    assert HingeLoss(beta=0.7)(ONE).item() == 0.0, "won by more than 1/β"


def test_apo_by_hand() -> None:
    """βΔ_w = 0.4, βΔ_l = −0.2."""
    zero = 1 - sigmoid(0.4) + sigmoid(-0.2)
    down = sigmoid(0.4) + 1 - sigmoid(0.6)
    assert APOZeroLoss(beta=0.4)(ONE).item() == pytest.approx(zero, abs=1e-12)
    assert APODownLoss(beta=0.4)(ONE).item() == pytest.approx(down, abs=1e-12)


def test_apo_moves_the_sides_where_it_says() -> None:
    """Zero: chosen up, rejected down. Down: both down, the rejected side by more."""
    gradients = {}
    for kind in (APOZeroLoss, APODownLoss):
        chosen, rejected = (torch.zeros(1, dtype=torch.float64, requires_grad=True) for _ in range(2))
        zero = torch.zeros(1, dtype=torch.float64)
        kind(beta=0.4)(PairLogProbs(chosen, rejected, zero, zero, zero, zero)).backward()
        assert chosen.grad is not None
        assert rejected.grad is not None
        gradients[kind] = chosen.grad.item(), rejected.grad.item()
    assert gradients[APOZeroLoss] == pytest.approx((-0.1, 0.1))
    assert gradients[APODownLoss] == pytest.approx((0.0, 0.1)), "at the start the chosen side only holds still"
    chosen = torch.tensor([2.0], dtype=torch.float64, requires_grad=True)
    APODownLoss(beta=0.4)(PairLogProbs(chosen, zero - 5, zero, zero, zero, zero)).backward()
    assert chosen.grad is not None
    assert chosen.grad.item() > 0, "a descent makes the chosen side less likely once the pair is won"


def test_simpo_by_hand() -> None:
    """l̄_w = −3/4, l̄_l = −2.5/2, whatever the reference says."""
    for loss in (SimPOLoss(beta=2.0, gamma=0.3), SimPOLoss(beta=2.0, gamma=0.0)):
        assert loss(ONE).item() == pytest.approx(-log_sigmoid(2 * (-0.75 + 1.25) - loss.gamma), abs=1e-12)
        assert loss.rewards(ONE)[1].item() == pytest.approx(-2.5)
    with pytest.raises(ValueError, match="gamma"):
        SimPOLoss(beta=2.0, gamma=-0.1)


def test_orpo_by_hand() -> None:
    """Probabilities e^−0.75 and e^−1.25 a token."""
    chosen, rejected = (p / (1 - p) for p in (math.exp(-0.75), math.exp(-1.25)))
    expected = 0.75 - 0.2 * log_sigmoid(math.log(chosen / rejected))
    assert ORPOLoss(beta=0.2)(ONE).item() == pytest.approx(expected, abs=1e-12)


def test_odds_of_likely_tokens_keep_their_digits() -> None:
    """On both sides of the branch, where 1 − e^x loses its digits, and where e^x is all there is."""
    for x, expected in ((-1e-10, math.log(1e-10)), (-0.5, -0.9327521295671886), (-0.7, -0.6863410028597), (-60.0, 0.0)):
        value = torch.tensor(x, dtype=torch.float64, requires_grad=True)
        found = log1mexp(value)
        assert found.item() == pytest.approx(expected, rel=1e-10, abs=1e-12)
        found.backward()
        assert value.grad is not None
        assert value.grad.item() == pytest.approx(-1 / math.expm1(-x), rel=1e-9)
    sure = torch.zeros(1, requires_grad=True)
    log1mexp(sure).backward()
    assert bool(log1mexp(sure).isfinite())


def test_kto_by_hand() -> None:
    logratios = torch.tensor([1.0, 1.0, -3.0], dtype=torch.float64)
    desirable = torch.tensor([True, False, False])
    baseline = torch.tensor(0.25, dtype=torch.float64)
    losses = KTOLoss(beta=0.4, desirable_weight=1.5, undesirable_weight=0.8)(logratios, desirable, baseline)
    expected = [1.5 * (1 - sigmoid(0.3)), 0.8 * (1 - sigmoid(-0.3)), 0.8 * (1 - sigmoid(1.3))]
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)
    start = KTOLoss(beta=0.4, desirable_weight=1.5)(torch.zeros(3), desirable, torch.tensor(0.0))
    assert start.tolist() == pytest.approx([0.75, 0.5, 0.5])
    for name in ("beta", "desirable_weight", "undesirable_weight"):
        with pytest.raises(ValueError, match=name):
            KTOLoss(**{"beta": 0.1, name: 0.0})


@pytest.mark.parametrize("kind", COMPARING)
def test_log_ratios_per_token_where_asked(kind: type[LogRatioLoss]) -> None:
    """Δ_w = 1 over 4 tokens and Δ_l = −½ over 2 are both as good as ¼ and −¼ over one."""
    single = pairs((-3.75, -2.25, -4.0, -2.0), tokens=(1, 1))
    averaged = kind(beta=0.4, average_log_prob=True)
    assert averaged(ONE).item() == pytest.approx(kind(beta=0.4)(single).item(), abs=1e-12)
    assert averaged.rewards(ONE)[1].item() == pytest.approx(-0.1)


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.7])
def test_step_zero(beta: float) -> None:
    """Policy = reference, whatever the log-probs: ln 2, 1/(4β²), 1."""
    same = pairs((-3.0, -2.5, -3.0, -2.5), (-80.0, -1.0, -80.0, -1.0))
    for loss in (
        DPOLoss(beta=beta),
        DPOLoss(beta=beta, label_smoothing=0.2),
        RobustDPOLoss(beta=beta, label_smoothing=0.2),
    ):
        assert loss(same).tolist() == pytest.approx([LN2, LN2], abs=1e-12)
    for averaged in (False, True):
        assert IPOLoss(beta=beta, average_log_prob=averaged)(same).tolist() == pytest.approx([0.25 / beta**2] * 2)
    for kind in (HingeLoss, APOZeroLoss, APODownLoss):
        assert kind(beta=beta)(same).tolist() == [1.0, 1.0]
    for kind in COMPARING:
        assert kind(beta=beta).rewards(same)[0].tolist() == [0.0, 0.0]
        assert kind(beta=beta)(same)[0].item() == pytest.approx(kind(beta=beta).value_at_start())
        assert kind.needs_reference
    for kind in (SimPOLoss, ORPOLoss):
        assert kind(beta=beta).value_at_start() is None
        assert not kind.needs_reference


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


@pytest.mark.parametrize("kind", [*COMPARING, SimPOLoss, ORPOLoss, KTOLoss])
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


# Where P(first ≻ second) = p is known, the mean loss over labels has its minimum where it can be written down. x = βh.
LOGIT = {p: math.log(p / (1 - p)) for p in (0.2, 0.7, 0.9)}


@pytest.mark.parametrize("p", LOGIT)
@pytest.mark.parametrize(
    ("loss", "minimum"),
    [
        (DPOLoss(0.4), lambda p: LOGIT[p]),
        (DPOLoss(0.4, 0.1), lambda p: math.log((0.8 * p + 0.1) / (0.9 - 0.8 * p))),
        (IPOLoss(0.4), lambda p: p - 0.5),
        (HingeLoss(0.4), lambda p: math.copysign(1, p - 0.5)),
    ],
    ids=["dpo", "cdpo", "ipo", "hinge"],
)
def test_the_minimum_over_uncertain_labels(loss: PreferenceLoss, minimum: Callable[[float], float], p: float) -> None:
    def mean(x: float) -> float:
        h = x / loss.beta
        won, lost = pairs((h / 2, -h / 2, 0, 0)), pairs((-h / 2, h / 2, 0, 0))
        return p * loss(won).item() + (1 - p) * loss(lost).item()

    found = minimize_scalar(mean, bounds=(-9, 9), method="bounded", options={"xatol": 1e-9})
    assert found.x == pytest.approx(minimum(p), abs=1e-5)


@pytest.mark.parametrize("p", LOGIT)
def test_robust_dpo_finds_the_true_preference_behind_flipped_labels(p: float) -> None:
    """Of labels turned round at a rate of 0.2 it makes what DPO makes of the true ones."""
    seen, loss = 0.8 * p + 0.2 * (1 - p), RobustDPOLoss(1.0, 0.2)

    def mean(x: float) -> float:
        return seen * loss(pairs((x, 0, 0, 0))).item() + (1 - seen) * loss(pairs((0, x, 0, 0))).item()

    found = minimize_scalar(mean, bounds=(-9, 9), method="bounded", options={"xatol": 1e-9})
    assert found.x == pytest.approx(LOGIT[p], abs=1e-5)


@pytest.mark.parametrize("p", LOGIT)
def test_the_minimum_of_simpo_balances_both_labels(p: float) -> None:
    """p·σ(γ − m) = (1 − p)·σ(γ + m) at m = β(l̄_w − l̄_l); with γ = 0 it is the logit again."""
    for gamma in (0.0, 0.6):
        loss = SimPOLoss(1.0, gamma)

        def mean(m: float, loss: SimPOLoss = loss) -> float:
            one = pairs((m, 0, 0, 0), tokens=(1, 1)), pairs((0, m, 0, 0), tokens=(1, 1))
            return p * loss(one[0]).item() + (1 - p) * loss(one[1]).item()

        found = minimize_scalar(mean, bounds=(-9, 9), method="bounded", options={"xatol": 1e-9}).x
        assert p * sigmoid(gamma - found) == pytest.approx((1 - p) * sigmoid(gamma + found), abs=1e-6)
        if not gamma:
            assert found == pytest.approx(LOGIT[p], abs=1e-5)
