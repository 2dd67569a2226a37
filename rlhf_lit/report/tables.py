"""``report.csv`` and ``arms.csv``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_lit.report.comparing import differing
from rlhf_lit.report.study import Study, fact, fact_names, facts


def runs_csv(study: Study) -> str:
    """A row for each run: where it is, its arm, the settings in which arms differ, and its final numbers."""
    keys, names = differing([arm.settings for arm in study.arms]), fact_names(study)
    rows = []
    for arm in study.arms:
        for run in arm.runs:
            own = facts(study, run)
            place = [run.name, arm.label, arm.algorithm, run.seed]
            rows.append([*place, *(arm.settings.get(key) for key in keys), *(own.get(name) for name in names)])
    return _csv(["run", "arm", "algorithm", "seed", *keys, *names], rows)


def arms_csv(study: Study) -> str:
    """A row for each arm: of every final number the mean, the interval over seeds (`/low`, `/high`) and, of
    evaluations, that over prompts (`/prompts_low`, `/prompts_high`)."""
    keys, names = differing([arm.settings for arm in study.arms]), fact_names(study)
    rows = []
    for arm in study.arms:
        row: list[Any] = [arm.label, arm.algorithm, arm.seeds, *(arm.settings.get(key) for key in keys)]
        for name in names:
            seeds, prompts = fact(study, arm, name)
            row += [seeds.estimate.mean, seeds.estimate.low, seeds.estimate.high]
            if name.startswith("evaluation/"):
                row += [prompts.low, prompts.high] if prompts else [None, None]
        rows.append(row)
    bounds = {name: ["/low", "/high"] for name in names}
    for name in names:
        if name.startswith("evaluation/"):
            bounds[name] += ["/prompts_low", "/prompts_high"]
    columns = [column for name in names for column in (name, *(name + bound for bound in bounds[name]))]
    return _csv(["arm", "algorithm", "seeds", *keys, *columns], rows)


def _csv(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([["" if _unknown(value) else value for value in row] for row in rows])
    return text.getvalue()


def _unknown(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not np.isfinite(value))
