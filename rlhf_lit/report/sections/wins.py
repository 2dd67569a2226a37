"""Arms against each other: how often one's response to a prompt scores higher."""

from __future__ import annotations

import numpy as np

from rlhf_lit.evaluation.estimates import Array, Estimate
from rlhf_lit.evaluation.win_rate import wins
from rlhf_lit.report.comparing import Arm
from rlhf_lit.report.content import Cell, Section, Table, interval, number, seeds_note
from rlhf_lit.report.evaluations import Evaluated
from rlhf_lit.report.figures import matrix
from rlhf_lit.report.statistics import OverSeeds
from rlhf_lit.report.study import Study


def points(ours: list[Array], theirs: list[Array]) -> Array:
    """[prompts] wins + ½ ties, over all pairs of a seed, a sample of each.

    Args:
        ours, theirs: [prompts, samples] scores of each seed.
    """
    won, tied = wins(np.concatenate(ours, axis=1), np.concatenate(theirs, axis=1))
    return np.asarray((won + tied / 2).mean((1, 2)))


def win_rates(study: Study) -> Section:
    """A matrix as a picture, and a table with the intervals."""
    section = Section("wins", "Win rates between arms")
    reward = study.reward
    arms = [arm for arm in study.arms if study.evaluated(arm)]
    if reward is None or len(arms) < 2:
        section.missing.append(
            "two arms with evaluations on the same prompts by the same judge: rlhf-lit report … --evaluate makes them."
        )
        return section
    scores = {arm.label: {one.folder: one.table(reward) for one in study.evaluated(arm)} for arm in arms}
    labels = [arm.label for arm in arms]
    rates = np.full((len(arms), len(arms)), np.nan)
    rows = []
    for i, ours in enumerate(arms):
        row = [Cell(ours.label)]
        for j, theirs in enumerate(arms):
            if i == j:
                row.append(Cell(""))
                continue
            found = Estimate.bootstrap(points(list(scores[ours.label].values()), list(scores[theirs.label].values())))
            rates[i, j] = found.mean
            paired = [
                float(points([a.table(reward)], [b.table(reward)]).mean()) for a, b in _same_seeds(study, i, j, arms)
            ]
            seeds = seeds_note(OverSeeds.of(paired)) if paired else "no seed in common"
            row.append(Cell(number(found.mean), (f"prompts {interval(found)}", seeds)))
        rows.append(row)
    first = next(iter(study.evaluations.values()))
    section.text.append(
        f"The share of the pairs in which the row's response has a higher {reward} score than the column's to the same "
        "prompt, ties counted half, over all pairs of their seeds and samples. Intervals over prompts by the "
        "bootstrap; over seeds by Student's t, from the rates between the same seeds of both. Made from the "
        f"evaluations: {first.in_words}."
    )
    section.figures.append(matrix("win_rates", labels, rates, "win rate of the row against the column"))
    section.tables.append(Table("win rate of the row against the column", ["", *labels], rows))
    return section


def _same_seeds(study: Study, i: int, j: int, arms: list[Arm]) -> list[tuple[Evaluated, Evaluated]]:
    """Evaluations of the two arms' runs that have one seed."""
    ours, theirs = (
        {run.seed: study.evaluations[run.folder] for run in arms[k].runs if run.folder in study.evaluations}
        for k in (i, j)
    )
    return [(ours[seed], theirs[seed]) for seed in ours if seed in theirs]
