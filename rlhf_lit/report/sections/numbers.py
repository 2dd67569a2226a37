"""The final numbers of every arm."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_lit.report.comparing import Arm
from rlhf_lit.report.content import Cell, Section, Table, cell, plain
from rlhf_lit.report.study import Study, fact, fact_names


def final_numbers(study: Study) -> Section:
    """A row an arm."""
    section = Section("numbers", "Final numbers")
    names = fact_names(study)
    if not names:
        section.missing.append(
            "validations and evaluations: give the runs validation rows (data.validation), or "
            "rlhf-lit report … --evaluate."
        )
        return section
    section.text.append(
        "Means over seeds of each run's last validation (val/…, docs/metrics.md) and of its evaluation (evaluation/…, "
        "docs/evaluation.md), with 95 % intervals over seeds (Student's t) and, of evaluations, over prompts "
        "(bootstrap). The same numbers are in arms.csv, and those of every run in report.csv."
    )
    evaluations = [name for name in names if name.startswith("evaluation/")]
    section.tables += _table("Evaluations", study, study.arms, evaluations)
    for algorithm in dict.fromkeys(arm.algorithm for arm in study.arms):
        own = [arm for arm in study.arms if arm.algorithm == algorithm]
        section.tables += _table(f"Last validation, {algorithm}", study, own, names[len(evaluations) :])
    return section


def _table(caption: str, study: Study, arms: Sequence[Arm], names: Sequence[str]) -> list[Table]:
    """The arms that know any of these numbers, and the numbers that any of them knows."""
    known = [name for name in names if any(fact(study, arm, name)[0].values for arm in arms)]
    rows = [[Cell(arm.label), plain(arm.seeds), *(cell(*fact(study, arm, name)) for name in known)] for arm in arms]
    return [Table(caption, ["arm", "seeds", *known], rows)] if known else []
