"""Intervals over seeds, rank correlation, and the over-optimisation law of Gao et al.

Two intervals stand beside each other, since they answer two questions. *Over seeds*: would another training run of this
arm end here? *Over prompts*: would other prompts say the same of these very models? The second is the bootstrap of
``rlhf_lit.evaluation.estimates``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rlhf_lit.evaluation.estimates import LEVEL, Array, Estimate

MINIMUM_SEEDS = 3  # with two, Student's interval is ±12.7·s/√2: wider than what anybody would plot
Form = Literal["best-of-n", "RL"]


@dataclass(frozen=True)
class OverSeeds:
    """A number that every seed of an arm has measured once.

    Attributes:
        values: one a seed, those that are known.
        estimate: their mean, with Student's 95 % interval mean ± t·s/√n, n − 1 degrees of freedom; NaN bounds under
            ``MINIMUM_SEEDS`` seeds. Between runs of one arm only the seed differs, so their values are independent
            draws, and with so few a bootstrap would be too narrow (Colas et al. 2018, arXiv 1806.08295).
    """

    values: tuple[float, ...]
    estimate: Estimate

    @classmethod
    def of(cls, values: Sequence[float | None]) -> OverSeeds:
        """The finite ones among them; a mean of NaN where there is none."""
        from scipy import stats

        known = tuple(float(value) for value in values if value is not None and np.isfinite(value))
        if not known:
            return cls((), Estimate(float("nan"), float("nan"), float("nan")))
        mean, count = float(np.mean(known)), len(known)
        if count < MINIMUM_SEEDS:
            return cls(known, Estimate(mean, float("nan"), float("nan")))
        half = float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * float(np.std(known, ddof=1)) / count**0.5
        return cls(known, Estimate(mean, mean - half, mean + half))

    @property
    def has_interval(self) -> bool:
        """Whether there are seeds enough."""
        return bool(np.isfinite(self.estimate.low))


def mean_over_prompts(scores: Sequence[Array]) -> Estimate:
    """The mean of an arm's scores with its bootstrap interval over prompts, its seeds taken as they are.

    Args:
        scores: [prompts, samples] of each seed, the same prompts in the same order.
    """
    return Estimate.bootstrap(np.mean([one.mean(1) for one in scores], axis=0))


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation (1904), ties by mean ranks; NaN for fewer than three points or a constant side."""
    from scipy import stats

    if len(a) < 3 or len(set(a)) < 2 or len(set(b)) < 2:
        return float("nan")
    return float(stats.spearmanr(a, b).statistic)


@dataclass(frozen=True)
class Fit:
    """Gao et al.'s law, fitted.

    Attributes:
        form: of best-of-n, R = d(α − βd); of RL, R = d(α − β·log d). d = √KL.
        alpha, beta: by least squares, with the interval of a linear regression (Student's, n − 2 degrees of freedom),
            which takes the residuals for independent.
        r2: 1 − Σ residual² / Σ (R − mean R)².
        points: how many it was fitted to.
    """

    form: Form
    alpha: Estimate
    beta: Estimate
    r2: float
    points: int

    def at(self, d: Any) -> Any:
        """The law's value at d = √KL > 0."""
        return sum(
            c * column for c, column in zip((self.alpha.mean, self.beta.mean), columns(self.form, d), strict=True)
        )

    @property
    def peak(self) -> float | None:
        """KL at which the fitted law is highest; None where it only rises (β ≤ 0) or only falls.

        dR/dd = 0: best-of-n d = α/2β; RL log d = α/β − 1.
        """
        if self.beta.mean <= 0 or (self.form == "best-of-n" and self.alpha.mean <= 0):
            return None
        ratio = self.alpha.mean / self.beta.mean
        return float((ratio / 2) ** 2 if self.form == "best-of-n" else np.exp(2 * min(ratio - 1, 300.0)))


def columns(form: Form, d: Any) -> tuple[Any, Any]:
    """What α and β are multiplied with."""
    return (d, -(d**2)) if form == "best-of-n" else (d, -d * np.log(d))


def fit(form: Form, d: Sequence[float], reward: Sequence[float]) -> Fit | None:
    """Fit R(d) by least squares (Gao et al. 2022, arXiv 2210.10760, Eq. 1 and 2).

    Both laws are linear in α and β and go through R(0) = 0, so rewards are those above the starting policy's.

    Args:
        form: which law.
        d: √KL to the starting policy; points at 0, where the law is 0, say nothing and are left out.
        reward: above the starting policy's.

    Returns:
        None for fewer than three points, or points that all have one d.
    """
    from scipy import stats

    x, y = np.asarray(d, dtype=float), np.asarray(reward, dtype=float)
    kept = (x > 0) & np.isfinite(y)
    x, y = x[kept], y[kept]
    if len(x) < 3:
        return None
    design = np.stack(columns(form, x), axis=1)
    found, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    if rank < 2:
        return None
    residuals = y - design @ found
    spread = float(((y - y.mean()) ** 2).sum())
    squares = float((residuals**2).sum())
    covariance = squares / (len(x) - 2) * np.linalg.inv(design.T @ design)
    halves = float(stats.t.ppf((1 + LEVEL) / 2, len(x) - 2)) * np.sqrt(np.diag(covariance))
    alpha, beta = (
        Estimate(float(value), float(value - half), float(value + half))
        for value, half in zip(found, halves, strict=True)
    )
    return Fit(form, alpha, beta, 1 - squares / spread if spread else float("nan"), len(x))
