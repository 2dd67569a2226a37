"""Numbers with the interval they are known to.

The unit that is resampled is the prompt (for pair files, the pair): the samples to one prompt are not independent of
each other, and their mean is one value.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf_lit.randomness import derive_seed

Z = 1.959964  # two-sided 95 % of a normal distribution
LEVEL = 0.95
RESAMPLES = 9999
# Resampled numbers held at once: 2^22 doubles are 32 MiB for each column.
CHUNK = 2**22

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval. NaN stands for what the data do not tell."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Any) -> Estimate:
        """The mean of one value per prompt, with the normal approximation: mean ± 1.96·s/√n."""
        array = np.asarray(values, dtype=float)
        mean = float(array.mean())
        half = Z * float(array.std(ddof=1)) / len(array) ** 0.5 if len(array) > 1 else float("nan")
        return cls(mean, mean - half, mean + half)

    @classmethod
    def exactly(cls, value: float) -> Estimate:
        """A number that is known."""
        return cls(value, value, value)

    @classmethod
    def bootstrap(cls, values: Any) -> Estimate:
        """The mean of one value per prompt. See ``bootstrap``."""
        return bootstrap(_mean, np.asarray(values, dtype=float))

    @classmethod
    def ratio(cls, values: Any, weights: Any) -> Estimate:
        """Σ w·x / Σ w over the prompts; NaN where all weights are 0. See ``bootstrap``."""
        return bootstrap(_ratio, np.asarray(values, dtype=float), np.asarray(weights, dtype=float))

    @classmethod
    def share(cls, hits: int, count: int) -> Estimate:
        """hits/count with Wilson's interval (1927), which holds where all or none are hits."""
        from scipy.stats import binomtest

        interval = binomtest(hits, count).proportion_ci(LEVEL, method="wilson")
        return cls(hits / count, float(interval.low), float(interval.high))

    @property
    def plain(self) -> dict[str, float | None]:
        """As JSON, which has no NaN: null."""
        return {name: value if np.isfinite(value) else None for name, value in asdict(self).items()}

    def __str__(self) -> str:
        if not np.isfinite(self.mean):
            return "–"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]" if np.isfinite(self.low) else f"{self.mean:.3f}"


def bootstrap(statistic: Callable[..., Any], *columns: Array) -> Estimate:
    """A statistic of prompts with its percentile bootstrap interval (Efron 1979; Efron and Tibshirani 1993, ch. 13).

    Whole prompts are drawn with replacement, the same ones in every column. Deterministic given the run's seed.

    Args:
        statistic: of the columns, over their last axis.
        columns: [prompts] each, in one order.

    Returns:
        The statistic of the data, between the 2.5 % and 97.5 % quantiles of those of ``RESAMPLES`` resamples; a
        resample on which the statistic is not defined is left out. One prompt alone has no interval.
    """
    from scipy import stats

    size = len(columns[0])
    with np.errstate(invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", stats.DegenerateDataWarning)  # resamples without a value, left out below
        found = float(statistic(*columns, axis=-1))
        if size < 2 or not np.isfinite(found):
            return Estimate(found, float("nan"), float("nan"))
        resampled = stats.bootstrap(
            columns,
            statistic,
            n_resamples=RESAMPLES,
            batch=max(1, CHUNK // size),
            paired=True,
            vectorized=True,
            confidence_level=LEVEL,
            method="percentile",
            rng=np.random.default_rng(derive_seed("bootstrap")),
        ).bootstrap_distribution
    defined = resampled[np.isfinite(resampled)]
    if not len(defined):
        return Estimate(found, float("nan"), float("nan"))
    low, high = np.quantile(defined, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(found, float(low), float(high))


def _mean(values: Array, axis: int) -> Any:
    return values.mean(axis)


def _ratio(values: Array, weights: Array, axis: int) -> Any:
    return (weights * values).sum(axis) / weights.sum(axis)


def correlation(a: Array, b: Array, axis: int = -1) -> Any:
    """Pearson's correlation over an axis; NaN where one side does not vary."""
    a, b = a - a.mean(axis, keepdims=True), b - b.mean(axis, keepdims=True)
    return (a * b).sum(axis) / np.sqrt((a * a).sum(axis) * (b * b).sum(axis))
