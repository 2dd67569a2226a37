"""Intervals, ranks and fits against numbers that were computed by hand, or by another program."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import curve_fit
from scipy.stats import t

from rlhf_lit.report.statistics import OverSeeds, columns, fit, mean_over_prompts, spearman


def test_three_seeds_have_students_interval() -> None:
    """s = 1, t(0.975; 2) = 4.30265: 2 ± 4.30265/√3."""
    found = OverSeeds.of([1.0, 2.0, 3.0])
    assert found.estimate.mean == 2
    assert found.estimate.low == pytest.approx(2 - 2.484138, abs=1e-6)
    assert found.estimate.high == pytest.approx(2 + 2.484138, abs=1e-6)
    assert found.has_interval


@pytest.mark.parametrize("values", [[0.5], [0.4, 0.6]])
def test_fewer_seeds_have_none(values: list[float]) -> None:
    found = OverSeeds.of(values)
    assert found.estimate.mean == pytest.approx(0.5)
    assert not found.has_interval


def test_a_seed_that_knows_nothing_is_no_seed() -> None:
    found = OverSeeds.of([1.0, None, float("nan"), 3.0])
    assert found.values == (1.0, 3.0)
    assert math.isnan(OverSeeds.of([None]).estimate.mean)


def test_over_prompts_the_seeds_are_averaged_first() -> None:
    """Two seeds that err against each other on every prompt leave nothing that another draw of prompts would change."""
    a = np.array([[0.0], [1.0], [0.0], [1.0]])
    found = mean_over_prompts([a, 1 - a])
    assert (found.mean, found.low, found.high) == (0.5, 0.5, 0.5)
    assert mean_over_prompts([a, a]).low < 0.5 < mean_over_prompts([a, a]).high


def test_spearman_by_hand() -> None:
    """Ranks 1 2 3 4 and 4 2 3 1: 1 − 6·(9 + 0 + 0 + 9)/(4·15)."""
    assert spearman([0.1, 0.2, 0.5, 9.0], [10.0, 8.0, 9.0, 1.0]) == pytest.approx(-0.8)
    assert math.isnan(spearman([1.0, 2.0], [1.0, 2.0]))
    assert math.isnan(spearman([1.0, 1.0, 1.0], [1.0, 2.0, 3.0]))


@pytest.mark.parametrize("form", ["best-of-n", "RL"])
def test_a_law_is_recovered_from_its_own_points(form) -> None:
    d = np.array([0.0, 0.3, 0.8, 1.5, 2.2, 3.0])
    law = d * (0.9 - 0.15 * d) if form == "best-of-n" else np.where(d > 0, d * (0.9 - 0.15 * np.log(d + (d == 0))), 0)
    found = fit(form, d.tolist(), law.tolist())
    assert found is not None
    assert found.points == 5, "at d = 0 the law says nothing"
    for estimate, value in ((found.alpha, 0.9), (found.beta, 0.15)):
        assert estimate.mean == pytest.approx(value, abs=1e-10)
        assert estimate.low == pytest.approx(value, abs=1e-6)
    assert found.r2 == pytest.approx(1, abs=1e-12)
    assert found.at(2.0) == pytest.approx(2 * (0.9 - 0.15 * (2 if form == "best-of-n" else math.log(2))))


def test_the_peak_is_where_the_law_is_flat() -> None:
    """Best-of-n: d = α/2β = 3; RL: log d = α/β − 1 = 5."""
    d = [0.5, 1.0, 2.0, 4.0]
    assert fit("best-of-n", d, [x * (0.9 - 0.15 * x) for x in d]).peak == pytest.approx(9)
    assert fit("RL", d, [x * (0.9 - 0.15 * math.log(x)) for x in d]).peak == pytest.approx(math.exp(10))
    assert fit("RL", d, [x * (0.9 + 0.15 * math.log(x)) for x in d]).peak is None, "it only rises"


@pytest.mark.parametrize("form", ["best-of-n", "RL"])
def test_the_intervals_of_a_fit_are_the_regressions(form) -> None:
    """scipy's curve_fit, which scales its covariance by the residuals over n − 2."""
    rng = np.random.default_rng(0)
    d = np.linspace(0.4, 3, 12)
    reward = d * (0.5 - 0.1 * d) + 0.1 * rng.normal(size=12)

    def law(x, alpha, beta):
        a, b = columns(form, x)
        return alpha * a + beta * b

    expected, covariance = curve_fit(law, d, reward, p0=(1.0, 0.1))
    found = fit(form, d.tolist(), reward.tolist())
    for estimate, value, variance in zip((found.alpha, found.beta), expected, np.diag(covariance), strict=True):
        assert estimate.mean == pytest.approx(value, abs=1e-6)
        assert estimate.high - estimate.mean == pytest.approx(t.ppf(0.975, 10) * variance**0.5, rel=1e-4)
    residual = reward - law(d, *expected)
    assert found.r2 == pytest.approx(1 - residual.var() / reward.var() - residual.mean() ** 2 / reward.var(), abs=1e-6)


def test_what_cannot_be_fitted_is_not() -> None:
    assert fit("RL", [0.0, 1.0, 2.0], [0.0, 1.0, 2.0]) is None, "two points off the start"
    assert fit("RL", [1.0, 1.0, 1.0], [1.0, 2.0, 3.0]) is None, "one d"
