"""From the evaluations to the tables and the figure of the README."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import binomtest

from rlhf_lit.evaluation.estimates import Array, Estimate
from rlhf_lit.report.figures import CATEGORIES, canvas, finish


@dataclass(frozen=True)
class Answered:
    """What one model answered to one set of held-out prompts.

    Attributes:
        numbers: of `evaluation.json`.
        judged: [prompts] the judge's scores, in the file's order.
        tokens: [prompts] lengths.
    """

    numbers: dict[str, Any]
    judged: Array
    tokens: Array

    @classmethod
    def read(cls, folder: Path) -> Answered | None:
        """None where there is no such evaluation yet."""
        if not (folder / "evaluation.json").exists():
            return None
        numbers = json.loads((folder / "evaluation.json").read_text())
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        return cls(numbers, *(np.array([line[f"model/{name}"] for line in lines]) for name in ("judge", "tokens")))

    def score(self, judge: str) -> Estimate:
        """A judge's mean over prompts."""
        return Estimate(**self.numbers["responses"]["model"]["scores"][judge])

    @property
    def size(self) -> str:
        """Two cells: the mean length in tokens, and the share of answers that close themselves."""
        return f"{self.tokens.mean():.0f} | {self.numbers['responses']['model']['ended']['mean']:.2f}"

    @property
    def kl(self) -> Estimate | None:
        """Exact KL to the start in nats per answer; None for the start itself."""
        return Estimate(**self.numbers["kl"]["exact"]) if self.numbers["kl"] else None


def exact_test(before: Array, after: Array) -> tuple[int, int, float]:
    """Prompts that were won and lost, and the two-sided exact p-value of their numbers: the sign test, which is
    McNemar's (1947) where scores are 0 and 1."""
    won, lost = int((after > before).sum()), int((after < before).sum())
    return won, lost, float(binomtest(won, won + lost).pvalue) if won + lost else 1.0


def answers(folder: Path, what: str, seeds: Sequence[int], judges: tuple[str, str], stages: Sequence[str]) -> list[str]:
    """The table of one set of held-out prompts: before training, and after each stage by seed.

    Args:
        folder: of the evaluations.
        what: which prompts, as the names of the evaluations end.
        seeds: of the runs.
        judges: what the judge's and the gold judge's scores are.
        stages: trained on prompts of that kind.
    """
    before = Answered.read(folder / f"before_{what}")
    if before is None:
        return []
    lines = [
        f"| model | {judges[0]} | paired difference | won / lost, p | {judges[1]} | KL | tokens | ended |",
        "|---|---|---|---|---|---|---|---|",
        f"| before | {before.score('judge')} | | | {before.score('gold')} | 0 | {before.size} |",
    ]
    for stage, seed in product(stages, seeds):
        after = Answered.read(folder / f"{stage}_{seed}_{what}")
        if after is not None:
            difference = Estimate.bootstrap(after.judged - before.judged)
            won, lost, p = exact_test(before.judged, after.judged)
            lines.append(
                f"| {stage}, seed {seed} | {after.score('judge')} | {difference} | {won} / {lost}, {p:.2g} | "
                f"{after.score('gold')} | {after.kl} | {after.size} |"
            )
    return lines


def accuracies(folder: Path) -> list[str]:
    """The table of held-out pairs."""
    lines = []
    for file in sorted(folder.glob("*_held_out/evaluation.json")):
        found = json.loads(file.read_text())["pairs"]["overall"]
        name = file.parent.name.removesuffix("_held_out").replace("_", " ")
        lines.append(f"| {name} | {found['count']} | {Estimate(**found['accuracy'])} |")
    return ["| judge, pairs | pairs | accuracy |", "|---|---|---|", *lines] if lines else []


def by_check(before: Path, after: Path, rows: Path) -> dict[str, tuple[int, float, float]]:
    """Of prompts that ask for a check: how many, and the share whose checks all passed before and after."""
    asked = [json.loads(line)["instruction_id_list"] for line in rows.read_text().splitlines()]
    scores = []
    for folder in (before, after):
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        scores.append({line["row"]: line["model/judge"] for line in lines})
    found: dict[str, tuple[int, float, float]] = {}
    for name in sorted({name for names in asked for name in names}):
        own = [row for row in scores[0] if name in asked[row - 1]]
        found[name] = (len(own), *(float(np.mean([one[row] for row in own])) for one in scores))
    return found


def picture(folder: Path, seeds: Sequence[int], to: Path) -> None:
    """Share of prompts whose checks all passed, by kind of check, before and after GRPO's first seed."""
    before, after = folder / "before_instructions", folder / f"grpo_{seeds[0]}_instructions"
    if not all((one / "evaluation.json").exists() for one in (before, after)):
        return
    found = by_check(before, after, folder.parent / "rows/ifeval_within_reach.jsonl")
    names = sorted(found, key=lambda name: found[name][2] - found[name][1])
    with canvas(height=0.28 * len(names) + 1.2) as (figure, axes):
        for y, name in enumerate(names):
            _, was, now = found[name]
            axes.plot([was, now], [y, y], color="#b0b0b0", zorder=1)
            axes.scatter([was], [y], color=CATEGORIES[0], marker="o", zorder=2, label="before" if y == 0 else None)
            axes.scatter([now], [y], color=CATEGORIES[1], marker="s", zorder=2, label="after GRPO" if y == 0 else None)
        axes.set_yticks(range(len(names)), [f"{name.split(':')[1]} ({found[name][0]})" for name in names], fontsize=8)
        axes.set_xlabel("held-out IFEval prompts with all checks passed")
        axes.legend(loc="lower right")
        drawn = finish(figure, "checks", "Held-out prompts with all checks passed, by kind, before and after GRPO")
    (to / "checks.png").write_bytes(drawn.png)


def write(folder: Path, seeds: Sequence[int], to: Path) -> None:
    """Write and print the tables of what has been evaluated so far.

    Args:
        folder: of the evaluations.
        seeds: of the runs.
        to: where `results.md` and `checks.png` go.
    """
    tables = (
        answers(folder, "instructions", seeds, ("all checks passed", "share of checks"), ("grpo", "ppo")),
        answers(folder, "polite", seeds, ("reward model's score", "VADER"), ("dpo", "ppo_reward")),
        accuracies(folder),
    )
    text = "\n\n".join("\n".join(table) for table in tables if table) + "\n"
    to.mkdir(parents=True, exist_ok=True)
    (to / "results.md").write_text(text)
    picture(folder, seeds, to)
    print(text)
