"""KL estimators against exact divergences, and the controllers by hand."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from rlhf_lit.losses.kl import AdaptiveKL, Estimator, FixedKL, estimate_kl, exact_kl

GENERATOR = torch.Generator().manual_seed(0)
POLICY, REFERENCE = torch.randn(2, 5, 30, generator=GENERATOR, dtype=torch.float64).log_softmax(-1)


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("k1", [0.5, -0.25, 0.0]),
        ("abs", [0.5, 0.25, 0.0]),
        ("k2", [0.125, 0.03125, 0.0]),
        ("k3", [math.exp(-0.5) - 1 + 0.5, math.exp(0.25) - 1 - 0.25, 0.0]),
    ],
)
def test_estimators_by_hand(estimator: Estimator, expected: list[float]) -> None:
    logratio = torch.tensor([0.5, -0.25, 0.0], dtype=torch.float64)
    assert estimate_kl(logratio, estimator).tolist() == pytest.approx(expected, abs=1e-12)


def test_k3_is_never_negative_even_for_tiny_ratios() -> None:
    for scale in (1e-4, 1e-2, 1.0, 10.0):
        logratio = scale * torch.randn(10_000, generator=GENERATOR)
        assert float(estimate_kl(logratio, "k3").min()) >= -1e-7 * scale


def test_k1_and_k3_are_unbiased_and_k2_is_not() -> None:
    """Expectations over the whole vocabulary, exactly."""
    exact = exact_kl(POLICY, REFERENCE)
    expectation = {name: (POLICY.exp() * estimate_kl(POLICY - REFERENCE, name)).sum(-1) for name in ("k1", "k2", "k3")}
    torch.testing.assert_close(expectation["k1"], exact)
    torch.testing.assert_close(expectation["k3"], exact)
    assert float((expectation["k2"] - exact).abs().min()) > 0.01


def test_exact_kl_against_torch() -> None:
    expected = kl_divergence(Categorical(logits=POLICY), Categorical(logits=REFERENCE))
    torch.testing.assert_close(exact_kl(POLICY, REFERENCE), expected, rtol=1e-12, atol=0)
    assert not exact_kl(POLICY, POLICY).any()


def test_fixed_beta_stays() -> None:
    assert FixedKL(0.05).next_beta(0.05, 100.0, 512) == 0.05


@pytest.mark.parametrize(
    ("kl", "expected"),
    [(0, 0.148464), (3, 0.148464), (6, 0.15), (6.6, 0.150768), (9, 0.151536), (100, 0.151536)],
)
def test_adaptive_controller_table(kl: float, expected: float) -> None:
    """One update from β = 0.15 with 512 episodes, target 6, horizon 10 000 (1909.08593 §2.2)."""
    assert AdaptiveKL(0.15).next_beta(0.15, kl, 512) == pytest.approx(expected, abs=1e-9)


def test_adaptive_controller_starts_from_the_beta_it_is_given() -> None:
    assert AdaptiveKL(0.15, target=2.0, horizon=100.0).next_beta(0.4, 2.2, 10) == pytest.approx(0.4 * 1.01)


@pytest.mark.parametrize("settings", [{"beta": 0.0}, {"beta": 0.2, "target": 0.0}, {"beta": 0.2, "horizon": -1.0}])
def test_adaptive_settings_are_positive(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be greater than 0"):
        AdaptiveKL(**settings)


def test_negative_fixed_beta_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kl\.beta"):
        FixedKL(-0.1)
