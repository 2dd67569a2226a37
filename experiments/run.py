"""Run an experiment that is made of sweeps and a report of them, or go on with it where it was.

    python -m experiments.run experiments/beta_frontier/quickstart.yaml --jobs 2

The settings file says which; its README what came out. Finished arms and evaluations are passed over.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from experiments.steps import keep, report, sweep
from rlhf_lit.report.statistics import OverSeeds, spearman

KL = "evaluation/kl_exact"


@dataclass(frozen=True)
class Curve:
    """A reward-KL frontier to which other arms are compared at equal KL.

    Attributes:
        algorithm: the arms that make the curve; with ``where``, those of them.
        where: settings of the arms and their values; of a class, its name.
    """

    algorithm: str
    where: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Settings:
    """An experiment's settings file.

    Attributes:
        sweeps: sweep files, run in this order.
        report: further options of `report`.
        reward: the final number that counts, a column of the report's tables.
        keep: files of the report that are kept beside the settings file.
        numbers: by algorithm, the swept setting whose rank correlation with KL is asked for.
        curve: the frontier to which the other arms are compared.
    """

    sweeps: list[str]
    report: list[str]
    reward: str = "evaluation/gold"
    keep: list[str] = field(default_factory=lambda: ["arms.csv", "figures/frontier.png"])
    numbers: dict[str, str] = field(default_factory=dict)
    curve: Curve | None = None


@dataclass(frozen=True)
class Run:
    """A row of ``report.csv``."""

    arm: str
    seed: int
    kl: float
    reward: float
    row: Mapping[str, str]


def main() -> None:
    """Sweep, report, and print what the README quotes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", type=Path)
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time (2)")
    parser.add_argument("--to", type=Path, help="folder of what is kept (that of the settings file)")
    given = parser.parse_args()
    content = yaml.safe_load(given.settings.read_text())
    curve = content.pop("curve", None)
    settings = Settings(**content, curve=Curve(**curve) if curve else None)
    folders = [sweep(file, given.jobs) for file in settings.sweeps]
    folder = given.settings.parent
    out = report(f"{folder.name}_{given.settings.stem}", *map(str, folders), *settings.report)
    to = given.to or folder
    to.mkdir(parents=True, exist_ok=True)
    keep(out, to, *settings.keep)
    with (out / "report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    runs = [Run(r["arm"], int(r["seed"]), float(r[KL]), float(r[settings.reward]), r) for r in rows]
    text = results(settings, runs)
    (to / "results.md").write_text(text)
    print(text)


def results(settings: Settings, runs: Sequence[Run]) -> str:
    """The tables: arms, the rank correlation of KL with the swept number, arms against the curve at equal KL."""
    lines = ["| arm | seeds | KL | reward |", "|---|---|---|---|"]
    for arm, own in by_arm(runs).items():
        lines.append(f"| {arm} | {len(own)} | {over([r.kl for r in own])} | {over([r.reward for r in own])} |")
    if settings.numbers:
        lines += ["", "Spearman's ρ over runs:", "", "| algorithm | number | runs | ρ with KL | ρ with reward |"]
        lines.append("|---|---|---|---|---|")
        for algorithm, number in settings.numbers.items():
            own = [run for run in runs if run.row["algorithm"] == algorithm]
            values = [float(run.row[number]) for run in own]
            kl, reward = (spearman(values, [getattr(run, name) for run in own]) for name in ("kl", "reward"))
            lines.append(f"| {algorithm} | {number} | {len(own)} | {kl:.3f} | {reward:.3f} |")
    if settings.curve:
        lines += ["", "Reward above the curve's at the same KL, by seed:", ""]
        lines += ["| arm | KL | above the curve |", "|---|---|---|"]
        for arm, own in by_arm([run for run in runs if not on_curve(settings.curve, run)]).items():
            above = [at_equal_kl(settings.curve, runs, run) for run in own]
            known = [one for one in above if one is not None]
            note = over(known) if len(known) == len(own) else "its KL is outside the curve's"
            lines.append(f"| {arm} | {over([r.kl for r in own])} | {note} |")
    return "\n".join(lines) + "\n"


def by_arm(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The seeds of each arm."""
    return {arm: [run for run in runs if run.arm == arm] for arm in dict.fromkeys(run.arm for run in runs)}


def over(values: Sequence[float]) -> str:
    """Mean over seeds with Student's 95 % interval."""
    found = OverSeeds.of(values)
    mean = f"{found.estimate.mean:.3g}"
    return f"{mean} [{found.estimate.low:.3g}, {found.estimate.high:.3g}]" if found.has_interval else mean


def on_curve(curve: Curve, run: Run) -> bool:
    """Whether a run is one of the curve's."""
    return run.row["algorithm"] == curve.algorithm and all(
        run.row[key].rpartition(".")[2] == value if isinstance(value, str) else float(run.row[key] or "nan") == value
        for key, value in curve.where.items()
    )


def at_equal_kl(curve: Curve, runs: Sequence[Run], run: Run) -> float | None:
    """A run's reward less that of the curve of its own seed at the run's KL, by linear interpolation between arms.

    None where no arm of the curve went as far, or none as little.
    """
    points = sorted((one.kl, one.reward) for one in runs if on_curve(curve, one) and one.seed == run.seed)
    kl, reward = np.array(points).T
    return run.reward - float(np.interp(run.kl, kl, reward)) if kl[0] <= run.kl <= kl[-1] else None


if __name__ == "__main__":
    main()
