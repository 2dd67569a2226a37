"""What was compared: the arms, in what their configurations differ, and what was left out."""

from __future__ import annotations

import json
from typing import Any

from rlhf_lit.report.comparing import ABSENT, differing
from rlhf_lit.report.content import Cell, Document, Section, Table, plain
from rlhf_lit.report.statistics import MINIMUM_SEEDS
from rlhf_lit.report.study import Study
from rlhf_lit.sweep.records import label


def compared(study: Study) -> Section:
    """The arms and their runs."""
    section = Section("arms", "What is compared")
    few = [arm.label for arm in study.arms if arm.seeds < MINIMUM_SEEDS]
    rows = [
        [
            Cell(arm.label),
            plain(arm.algorithm),
            Cell(str(arm.seeds), (", ".join("?" if run.seed is None else str(run.seed) for run in arm.runs),)),
            Cell("", tuple(run.name for run in arm.runs)),
        ]
        for arm in study.arms
    ]
    section.tables.append(
        Table("Arms: one configuration each, its runs differ in the seed", ["arm", "algorithm", "seeds", "runs"], rows)
    )
    if few:
        section.text.append(
            f"Too few seeds for an interval over seeds ({MINIMUM_SEEDS} are needed): {', '.join(few)}. What these arms "
            "show may be the seed's doing."
        )
    if study.left_out:
        section.tables.append(
            Table("Left out", ["what", "why"], [[Cell(one.folder), Cell("", (one.reason,))] for one in study.left_out])
        )
    return section


def differences(study: Study) -> Section:
    """Keys that differ, and every configuration."""
    section = Section("configs", "Configurations")
    keys = differing([arm.settings for arm in study.arms])
    if keys:
        # What tells arms of one algorithm apart comes before what every arm of another one has otherwise.
        keys.sort(key=lambda key: not any(key in arm.varied for arm in study.arms))
        rows = [
            [Cell(key), *(Cell(shown(arm.settings[key]) if key in arm.settings else ABSENT) for arm in study.arms)]
            for key in keys
        ]
        section.tables.append(Table("Keys in which the arms differ", ["key", *(arm.label for arm in study.arms)], rows))
    else:
        section.text.append("There is one arm: nothing differs but the seed.")
    section.documents = [
        Document(f"{arm.label}: {run.name}/config.yaml", run.text) for arm in study.arms for run in arm.runs[:1]
    ]
    section.text.append("The whole configuration of each arm's first run, as it was resolved:")
    return section


def shown(value: Any) -> str:
    """A value in few characters; a class by its name."""
    if value is None or isinstance(value, bool | dict):
        return json.dumps(value)
    text = label(value)
    is_class = isinstance(value, str) and "." in value and "/" not in value and value.rsplit(".", 1)[-1][:1].isupper()
    return text.rsplit(".", 1)[-1] if is_class else text
