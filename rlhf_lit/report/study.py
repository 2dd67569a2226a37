"""The compared runs and their final numbers, which all sections of a report read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rlhf_lit.evaluation.estimates import Estimate
from rlhf_lit.report.comparing import Arm, Swept, swept
from rlhf_lit.report.evaluations import Evaluated
from rlhf_lit.report.figures import Dot, Look, looks
from rlhf_lit.report.reading import LeftOut, Run
from rlhf_lit.report.statistics import OverSeeds, mean_over_prompts


@dataclass(frozen=True)
class Study:
    """The runs of a report, compared.

    Attributes:
        names: what the report was asked for.
        arms: in the order in which they are shown.
        evaluations: by the run's folder, all of one kind.
        left_out: runs and evaluations that are not in it, and why.
    """

    names: tuple[str, ...]
    arms: tuple[Arm, ...]
    evaluations: dict[Path, Evaluated]
    left_out: tuple[LeftOut, ...]

    @cached_property
    def styles(self) -> dict[str, Look]:
        """The colour and marker of each arm, by its label."""
        return looks(self.arms)

    @property
    def runs(self) -> list[Run]:
        """Of all arms."""
        return [run for arm in self.arms for run in arm.runs]

    def evaluated(self, arm: Arm) -> list[Evaluated]:
        """The evaluations of its seeds."""
        return [self.evaluations[run.folder] for run in arm.runs if run.folder in self.evaluations]

    @property
    def reward(self) -> str | None:
        """The judge that counts, which all evaluations have: gold, judge or none."""
        first = next(iter(self.evaluations.values()), None)
        return first.reward if first else None

    @cached_property
    def known(self) -> dict[tuple[str, str], tuple[OverSeeds, Estimate | None]]:
        """Final numbers by arm and name, once they were asked for: their intervals are bootstraps."""
        return {}

    @cached_property
    def baselines(self) -> int:
        """How many models the evaluations' win rates are against; they compare where it is one."""
        return len({one.numbers["baseline"] for one in self.evaluations.values() if one.numbers["win_rates"]})

    @property
    def swept(self) -> list[Swept]:
        """Numbers in which arms differ alone."""
        return swept(self.arms)


def facts(study: Study, run: Run) -> dict[str, float]:
    """The final numbers of a run, by name: its last validation's, and its evaluation's."""
    found = {
        metric: last for metric in run.metrics if metric.startswith("val/") and (last := run.last(metric)) is not None
    }
    evaluated = study.evaluations.get(run.folder)
    if evaluated is not None:
        found |= {f"evaluation/{judge}": float(evaluated.table(judge).mean()) for judge in evaluated.scoring}
        found["evaluation/length"] = float(evaluated.table("tokens").mean())
        if evaluated.kl and evaluated.kl["mean"] is not None:
            found["evaluation/kl_exact"] = evaluated.kl["mean"]
        rate = evaluated.win_rate
        if rate and rate["mean"] is not None and study.baselines == 1:
            found["evaluation/win_rate"] = rate["mean"]
    return found


def fact_names(study: Study) -> list[str]:
    """Of all runs, evaluations first."""
    names = dict.fromkeys(name for run in study.runs for name in facts(study, run))
    return sorted(names, key=lambda name: not name.startswith("evaluation/"))


def fact(study: Study, arm: Arm, name: str) -> tuple[OverSeeds, Estimate | None]:
    """A final number of an arm: over its seeds, and over prompts where the evaluations tell."""
    place = (arm.label, name)
    if place not in study.known:
        study.known[place] = _measure(study, arm, name)
    return study.known[place]


def _measure(study: Study, arm: Arm, name: str) -> tuple[OverSeeds, Estimate | None]:
    over_seeds = OverSeeds.of([facts(study, run).get(name) for run in arm.runs])
    evaluated = study.evaluated(arm)
    kind, _, column = name.partition("/")
    if kind != "evaluation" or not evaluated:
        return over_seeds, None
    if column == "kl_exact":
        return over_seeds, mean_interval([one.kl for one in evaluated if one.kl])
    if column == "win_rate":
        return over_seeds, mean_interval([one.win_rate for one in evaluated if one.win_rate])
    column = "tokens" if column == "length" else column
    return over_seeds, mean_over_prompts([one.table(column) for one in evaluated])


def mean_interval(found: Sequence[dict[str, float | None]]) -> Estimate | None:
    """Means of estimates over the same prompts, bound by bound: never narrower than the interval of their mean, as a
    standard deviation of a mean is at most the mean of the standard deviations."""
    if not found or any(one[bound] is None for one in found for bound in ("mean", "low", "high")):
        return None
    mean, low, high = (float(np.mean([one[bound] for one in found])) for bound in ("mean", "low", "high"))
    return Estimate(mean, low, high)


def dots(study: Study, x: str, y: str) -> list[Dot]:
    """The arms that know both numbers."""
    found = []
    for arm in study.arms:
        (xs, x_prompts), (ys, y_prompts) = fact(study, arm, x), fact(study, arm, y)
        if xs.values and ys.values:
            found.append(Dot(arm, xs, ys, x_prompts, y_prompts))
    return found
