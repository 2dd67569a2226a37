"""Learning curves: what was logged, against optimizer steps."""

from __future__ import annotations

import re

import numpy as np

from rlhf_lit.evaluation.estimates import Array
from rlhf_lit.report.comparing import Arm
from rlhf_lit.report.content import Section
from rlhf_lit.report.figures import Curve, curves
from rlhf_lit.report.metrics import Series
from rlhf_lit.report.statistics import MINIMUM_SEEDS, OverSeeds
from rlhf_lit.report.study import Study

# In the order in which they are shown, as far as they were logged. The first kind means the same for every algorithm.
SHARED = (
    "val/scores", "val/kl_exact", "val/win_rate", "val/judge_score", "val/kl_to_reference", "val/length",
    "objective/scores", "objective/kl_exact", "objective/kl_coef", "objective/entropy", "rollout/length",
)  # fmt: skip
OWN = (
    "val/loss", "val/accuracy", "val/margin", "train/loss", "train/accuracy", "train/margin", "train/logprob_chosen",
    "policy/clipfrac", "value/explained_variance",
)  # fmt: skip
POINTS = 40  # a curve of more points is averaged over windows of a fortieth of it


def learning_curves(study: Study) -> Section:
    """A figure for each metric that any run has logged."""
    section = Section("curves", "Learning curves")
    algorithms = list(dict.fromkeys(arm.algorithm for arm in study.arms))
    panels = [(metric, None) for metric in SHARED] + [(metric, name) for metric in OWN for name in algorithms]
    for metric, algorithm in panels:
        arms = [arm for arm in study.arms if algorithm in (None, arm.algorithm)]
        found = [curve for arm in arms if (curve := over_seeds(arm, metric)) is not None]
        # A single validation is no curve (its numbers stand in the table), and neither is what never changes.
        if any(len(curve.steps) > 1 and np.ptp(curve.mean) > 0 for curve in found):
            title = metric if algorithm is None or len(algorithms) == 1 else f"{metric}, {algorithm}"
            section.figures.append(curves("curve_" + re.sub(r"\W+", "_", title), title, found, study.styles))
    if not section.figures:
        section.missing.append(
            "a metric that was logged more than once: rlhf-lit fit logs every step, and validates each epoch."
        )
        return section
    section.text.append(
        "From the runs' metrics.csv; docs/metrics.md defines each metric. Lines: means over an arm's seeds at the "
        f"steps that all of them logged; bands: 95 % intervals over seeds (Student's t) from {MINIMUM_SEEDS} seeds on, "
        f"the range of two. Where there are more than {POINTS} points, a line shows running means over a {POINTS}th of "
        "them, taken before the seeds are compared."
    )
    return section


def smoothed(series: Series) -> Series:
    """Running means over windows that look back; steps as they are."""
    window = -(-len(series.values) // POINTS)
    if window == 1:
        return series
    sums = np.cumsum(np.concatenate([[0.0], series.values]))
    last = np.arange(1, len(sums))
    first = np.maximum(0, last - window)
    return Series(series.steps, (sums[last] - sums[first]) / (last - first))


def over_seeds(arm: Arm, metric: str) -> Curve | None:
    """A metric's mean and band over an arm's seeds; None where a seed lacks it."""
    series = [smoothed(run.metrics[metric]) for run in arm.runs if metric in run.metrics]
    if len(series) < arm.seeds:
        return None
    steps = series[0].steps
    for one in series[1:]:
        steps = np.intersect1d(steps, one.steps)
    if not len(steps):
        return None
    values: Array = np.stack([_at(one, steps) for one in series])
    mean = values.mean(0)
    if len(series) == 1:
        return Curve(arm, steps, mean, None, None)
    if len(series) < MINIMUM_SEEDS:
        return Curve(arm, steps, mean, values.min(0), values.max(0))
    found = [OverSeeds.of(column.tolist()).estimate for column in values.T]
    return Curve(arm, steps, mean, np.array([e.low for e in found]), np.array([e.high for e in found]))


def _at(series: Series, steps: Array) -> Array:
    """Its last value at each of some steps that it has."""
    last = dict(zip(series.steps.tolist(), series.values.tolist(), strict=True))
    return np.array([last[step] for step in steps.tolist()])
