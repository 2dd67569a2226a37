"""Intervals: by hand, against the normal approximation, and what the unit of resampling is."""

from __future__ import annotations

import math

import numpy as np
import pytest

from rlhf_lit.evaluation.estimates import Estimate, bootstrap, correlation


def test_an_estimate_by_hand() -> None:
    """Mean 2.5, s² = 5/3, 1.959964·√(5/3)/√4 = 1.265151."""
    estimate = Estimate.of([1, 2, 3, 4])
    assert estimate.mean == 2.5
    assert estimate.low == pytest.approx(2.5 - 1.265151, abs=1e-6)
    assert estimate.high == pytest.approx(2.5 + 1.265151, abs=1e-6)
    assert Estimate.of([0.7] * 9) == Estimate(pytest.approx(0.7), pytest.approx(0.7), pytest.approx(0.7))


def test_a_bootstrapped_mean_has_the_interval_of_the_central_limit_theorem() -> None:
    """800 normal values: population s/√n·1.96, to the error of 9999 resamples."""
    values = np.random.default_rng(1).normal(2.0, 3.0, 800)
    half = 1.959964 * values.std() / math.sqrt(800)
    estimate = Estimate.bootstrap(values)
    assert estimate.mean == pytest.approx(values.mean(), abs=1e-12)
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.04 * half)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.04 * half)


def test_two_values_have_the_interval_that_can_be_counted() -> None:
    """Of 0 and 1 a resample's mean is 0, ½, 1 with probability ¼, ½, ¼: both ends are in the interval."""
    assert Estimate.bootstrap([0.0, 1.0]) == Estimate(0.5, 0.0, 1.0)
    assert Estimate.bootstrap([0.3, 0.3, 0.3]) == Estimate(pytest.approx(0.3), pytest.approx(0.3), pytest.approx(0.3))


def test_the_interval_is_a_function_of_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(2).normal(size=40)
    np.random.seed(5)
    first = Estimate.bootstrap(values)
    np.random.seed(6)
    assert Estimate.bootstrap(values) == first, "the global generators have no say"
    monkeypatch.setenv("PL_GLOBAL_SEED", "3")
    assert Estimate.bootstrap(values) != first


def test_a_ratio_resamples_both_sides_together() -> None:
    """Where value and weight go together the ratio is the same in every resample: 2·w/w."""
    weights = np.arange(1.0, 20.0)
    assert Estimate.ratio(np.full(19, 2.0), weights) == Estimate(2.0, pytest.approx(2.0), pytest.approx(2.0))
    assert Estimate.ratio([1.0, 0.0, 5.0], [1.0, 3.0, 0.0]).mean == 0.25


def test_nothing_to_divide_by_is_no_number() -> None:
    nothing = Estimate.ratio([1.0, 2.0], [0.0, 0.0])
    assert math.isnan(nothing.mean)
    assert nothing.plain == {"mean": None, "low": None, "high": None}
    assert str(nothing) == "–"
    alone = Estimate.bootstrap([0.25])
    assert alone.plain == {"mean": 0.25, "low": None, "high": None}
    assert str(alone) == "0.250"


def test_a_resample_without_a_ratio_is_left_out() -> None:
    """Of weights 1 and 0 a quarter of the resamples has none; the others have the ratio 3."""
    assert Estimate.ratio([3.0, 9.0], [1.0, 0.0]) == Estimate(3.0, 3.0, 3.0)


def test_wilsons_interval() -> None:
    """Of 8 in 10: (0.8 + z²/20 ± z·√(0.016 + z²/400))/(1 + z²/10), z = 1.959964 → 0.490162, 0.943318."""
    share = Estimate.share(8, 10)
    assert (share.mean, share.low, share.high) == pytest.approx((0.8, 0.490162, 0.943318), abs=1e-6)
    all_of_them = Estimate.share(10, 10)
    assert all_of_them.high == 1.0
    assert all_of_them.low == pytest.approx(10 / (10 + 1.959964**2), abs=1e-6)


def test_pearsons_correlation() -> None:
    """1, 2, 3, 4 with 1, 3, 2, 4: 0.8; and none where one side does not vary."""
    a, b = np.array([1.0, 2, 3, 4]), np.array([1.0, 3, 2, 4])
    assert correlation(a, b) == pytest.approx(0.8)
    assert correlation(np.stack([a, a]), np.stack([b, -b])) == pytest.approx([0.8, -0.8])
    assert math.isnan(bootstrap(correlation, a, np.ones(4)).mean)
