"""Reward against KL: what an arm gains for how far it went."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from rlhf_lit.report.comparing import Arm
from rlhf_lit.report.content import Cell, Section, Table, cell, number, plain
from rlhf_lit.report.evaluations import shortened
from rlhf_lit.report.figures import Dot, plane
from rlhf_lit.report.statistics import spearman
from rlhf_lit.report.study import Study, dots

KL = "exact KL to the reference (nats per response)"


@dataclass(frozen=True)
class View:
    """One way to see the frontier.

    Attributes:
        name: of the figure's files.
        x, y: names of final numbers.
        reward: what y is, in words.
        source: where both come from.
        start: the reference's own y.
    """

    name: str
    x: str
    y: str
    reward: str
    source: str
    start: float | None


def views(study: Study) -> list[View]:
    """Those that may have points, the most trustworthy first."""
    found = []
    evaluated = next(iter(study.evaluations.values()), None)
    if evaluated is not None and evaluated.reward is not None:
        reward = "gold reward" if evaluated.reward == "gold" else "judge's score"
        starts = [one.starts_at[evaluated.reward] for one in study.evaluations.values() if one.starts_at]
        found.append(
            View(
                "frontier",
                "evaluation/kl_exact",
                f"evaluation/{evaluated.reward}",
                reward,
                f"Evaluations: {evaluated.in_words}.",
                float(np.mean(starts)) if starts else None,
            )
        )
    found.append(
        View(
            "frontier_logged",
            "val/kl_exact",
            "val/scores",
            "reward on held-out prompts",
            "The runs' last validation (val/scores, val/kl_exact): the reward they were trained on, which is no judge "
            "of over-optimisation.",
            None,
        )
    )
    found.append(
        View(
            "frontier_judged",
            "val/kl_to_reference",
            "val/judge_score",
            "score by the judge in the loop",
            "The runs' last validation by WinRate (val/judge_score, val/kl_to_reference).",
            None,
        )
    )
    return found


def frontier(study: Study) -> Section:
    """A figure and a table for each view that has points."""
    section = Section("frontier", "Reward and KL")
    for view in views(study):
        points = dots(study, view.x, view.y)
        if not points:
            continue
        figure = plane(view.name, points, study.styles, KL, view.reward, view.start)
        section.figures.append(replace(figure, caption=view.source))
        section.tables.append(_table(view, points))
    section.tables += _monotone(study)
    if section.figures:
        section.text.append(
            "Large points: means over an arm's seeds. Small points: its seeds. Lines: 95 % intervals over seeds "
            "(Student's t), drawn from 3 seeds on. Shades: 95 % intervals over prompts (bootstrap)."
        )
        references = {one.reference for one in study.evaluations.values() if one.reference}
        if len(references) > 1:
            names = ", ".join(sorted(map(shortened, references)))
            section.text.append(f"KL is to different references here, and does not compare between them: {names}.")
    unknown = [arm for arm in study.arms if not any(_has(study, arm, view) for view in views(study))]
    held = [arm.label for arm in unknown if arm.kind.writes and arm.kind.has_reference]
    free = [arm.label for arm in unknown if arm.kind.writes and not arm.kind.has_reference]
    if held:
        section.missing.append(
            f"reward beside KL of {', '.join(held)}: rlhf-lit report … --evaluate measures both (so do "
            "validation rows, data.validation, of an on-policy algorithm)."
        )
    if free:
        section.missing.append(
            f"KL of {', '.join(free)}, which had no reference in training: rlhf-lit report … --evaluate "
            "--reference=MODEL."
        )
    if not (section.figures or section.missing):
        section.missing.append(
            "policies: reward models write no responses, so there is no KL; name DPO or PPO runs too."
        )
    return section


def _has(study: Study, arm: Arm, view: View) -> bool:
    return any(dot.arm is arm for dot in dots(study, view.x, view.y))


def _table(view: View, points: list[Dot]) -> Table:
    rows = [
        [Cell(dot.arm.label), plain(dot.arm.seeds), cell(dot.x, dot.x_prompts), cell(dot.y, dot.y_prompts)]
        for dot in points
    ]
    return Table(f"{view.reward} and KL", ["arm", "seeds", "KL (nats)", view.reward], rows)


def _monotone(study: Study) -> list[Table]:
    """Spearman's ρ of KL and reward against a swept number."""
    rows = []
    for one in study.swept:
        for view in views(study):
            for what, name in (("KL", view.x), (view.reward, view.y)):
                points = {dot.arm.label: dot for dot in dots(study, view.x, view.y)}
                own = [
                    (value, points[arm.label])
                    for arm, value in zip(one.arms, one.values, strict=True)
                    if arm.label in points
                ]
                means = [(dot.x if name == view.x else dot.y).estimate.mean for _, dot in own]
                runs = [(value, single) for value, dot in own for single in (dot.x if name == view.x else dot.y).values]
                if len(own) < 3:
                    continue
                over_arms = spearman([value for value, _ in own], means)
                over_runs = spearman([value for value, _ in runs], [single for _, single in runs])
                rows.append(
                    [
                        Cell(f"{one.arms[0].algorithm}: {what}", (name,)),
                        plain(one.key),
                        Cell(number(over_arms), (f"{len(own)} arms",)),
                        Cell(number(over_runs), (f"{len(runs)} runs",)),
                    ]
                )
    if not rows:
        return []
    head = ["what", "against", "ρ of the arms' means", "ρ of all runs"]
    return [Table("Is it monotone? Spearman's rank correlation with the number that was swept", head, rows)]
