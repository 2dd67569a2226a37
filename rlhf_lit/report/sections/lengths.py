"""Length: whether a reward was gained by longer or shorter answers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from rlhf_lit.evaluation.estimates import Array, Estimate, bootstrap, correlation
from rlhf_lit.report.content import Cell, Section, Table, cell, interval, number, plain
from rlhf_lit.report.figures import plane
from rlhf_lit.report.statistics import OverSeeds, spearman
from rlhf_lit.report.study import Study, dots, fact

LENGTH = "length (tokens)"


def lengths(study: Study) -> Section:
    """Reward against length over arms, and their correlation within arms."""
    section = Section("lengths", "Length")
    reward = study.reward
    pairs = [("val/length", "val/scores", "reward on held-out prompts")]
    if reward is not None:
        pairs.insert(0, ("evaluation/length", f"evaluation/{reward}", f"{reward} score"))
    for x, y, words in pairs:
        points = dots(study, x, y)
        if not points:
            continue
        figure = plane(f"lengths_{x.split('/')[0]}", points, study.styles, LENGTH, words, connect=False)
        section.figures.append(replace(figure, caption=f"{words[0].upper()}{words[1:]} against length: {x} and {y}."))
        over_arms = spearman([dot.x.estimate.mean for dot in points], [dot.y.estimate.mean for dot in points])
        rows = [[Cell(dot.arm.label), plain(dot.arm.seeds), cell(dot.x, dot.x_prompts)] for dot in points]
        known = f"; Spearman's ρ of length and reward over the {len(points)} arms: {number(over_arms)}"
        section.tables.append(
            Table(
                f"{LENGTH} of a response, {x}{known if np.isfinite(over_arms) else ''}", ["arm", "seeds", LENGTH], rows
            )
        )
    section.tables += _correlations(study)
    if not section.tables:
        section.missing.append(
            "lengths of sampled responses: on-policy algorithms log them where they have validation rows "
            "(data.validation), of the others rlhf-lit report … --evaluate measures them."
        )
    return section


def _correlations(study: Study) -> list[Table]:
    rows = []
    for arm in study.arms:
        evaluated = [one for one in study.evaluated(arm) if one.reward is not None]
        scorer, _ = fact(study, arm, "val/length_correlation")
        if evaluated:
            judge = evaluated[0].reward or ""
            tables = [(one.table(judge), one.table("tokens")) for one in evaluated]
            seeds = OverSeeds.of(
                [float(correlation(a.ravel(), b.ravel())) if _varies(a, b) else None for a, b in tables]
            )
            score, tokens = (np.mean([pair[i].mean(1) for pair in tables], axis=0) for i in (0, 1))
            prompts = bootstrap(correlation, score, tokens) if _varies(score, tokens) else None
            rows.append([Cell(arm.label), Cell(f"{judge} score of responses"), cell(seeds), _over_prompts(prompts)])
        elif scorer.values:
            rows.append(
                [Cell(arm.label), Cell("val/length_correlation", ("a reward model's scores",)), cell(scorer), Cell("–")]
            )
    if not rows:
        return []
    caption = "Pearson's correlation of score and length within an arm"
    return [Table(caption, ["arm", "of", "over responses", "over prompts (means of the seeds)"], rows)]


def _varies(*columns: Array) -> bool:
    return all(float(np.ptp(column)) > 0 for column in columns)


def _over_prompts(found: Estimate | None) -> Cell:
    return Cell("–") if found is None else Cell(number(found.mean), (f"prompts {interval(found)}",))
