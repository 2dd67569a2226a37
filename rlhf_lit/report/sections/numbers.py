"""The final numbers of every arm."""

from __future__ import annotations

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
    rows = [
        [Cell(arm.label), plain(arm.seeds), *(cell(*fact(study, arm, name)) for name in names)] for arm in study.arms
    ]
    section.text.append(
        "Means over seeds of each run's last validation (val/…, docs/metrics.md) and of its evaluation (evaluation/…, "
        "docs/evaluation.md), with 95 % intervals over seeds (Student's t) and, of evaluations, over prompts "
        "(bootstrap). The same numbers are in arms.csv, and those of every run in report.csv."
    )
    section.tables.append(Table("Final numbers", ["arm", "seeds", *names], rows))
    return section
