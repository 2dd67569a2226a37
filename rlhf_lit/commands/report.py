"""The command ``report``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from lightning import seed_everything

import rlhf_lit.algorithms  # noqa: F401 - so that judges can be named by their class alone
from rlhf_lit.commands.training import Parser, quiet_libraries
from rlhf_lit.errors import UserError, say, tell
from rlhf_lit.files import short_path
from rlhf_lit.report import folder as place
from rlhf_lit.report.comparing import arms_of
from rlhf_lit.report.content import Section
from rlhf_lit.report.evaluating import Asked, evaluate_missing
from rlhf_lit.report.evaluations import comparable
from rlhf_lit.report.page import render
from rlhf_lit.report.reading import read_all
from rlhf_lit.report.sections.completions import completions
from rlhf_lit.report.sections.frontier import frontier
from rlhf_lit.report.sections.learning import learning_curves
from rlhf_lit.report.sections.lengths import lengths
from rlhf_lit.report.sections.numbers import final_numbers
from rlhf_lit.report.sections.overoptimisation import over_optimisation
from rlhf_lit.report.sections.settings import compared, differences
from rlhf_lit.report.sections.wins import win_rates
from rlhf_lit.report.study import Study
from rlhf_lit.report.tables import arms_csv, runs_csv

SECTIONS = (
    compared,
    frontier,
    final_numbers,
    win_rates,
    over_optimisation,
    learning_curves,
    lengths,
    completions,
    differences,
)


def report(
    runs: Sequence[str], out: Path, ignore: Sequence[str] = (), evaluate: bool = False, asked: Asked = Asked()
) -> Study:
    """Compare runs, and write the page, its figures and its tables.

    Args:
        runs: run folders, run names (`runs/dpo`) and sweeps' folders.
        out: the report's folder; an earlier report in it is replaced.
        ignore: further keys that do not define an arm.
        evaluate: evaluate the runs that were not evaluated as asked, first.
        asked: how.

    Returns:
        What was compared.

    Raises:
        UserError: no such run, nothing finished, damaged files, or a place that is not a report's.
    """
    out = out.expanduser().absolute()
    place.check_place(out)
    seed_everything(asked.seed, verbose=False)
    found, left = read_all(runs)
    if not found:
        raise UserError(f"nothing finished to report on: {'; '.join(map(str, left))}")
    arms, repeated = arms_of(found, ignore)
    kept = [run for arm in arms for run in arm.runs]
    kind = evaluate_missing(kept, asked) if evaluate else None
    evaluations, others = comparable(kept, kind)
    study = Study(tuple(runs), tuple(arms), evaluations, (*left, *repeated, *others))
    sections = [section(study) for section in SECTIONS]
    place.write(out, _contents(study, sections))
    return study


def _contents(study: Study, sections: Sequence[Section]) -> dict[str, bytes]:
    """The report's files, by their paths in its folder."""
    contents = {
        place.PAGE: render(study, sections).encode(errors="replace"),
        "report.csv": runs_csv(study).encode(errors="replace"),
        "arms.csv": arms_csv(study).encode(errors="replace"),
    }
    for section in sections:
        for figure in section.figures:
            contents[f"{place.FIGURES}/{figure.name}.svg"] = figure.svg
            contents[f"{place.FIGURES}/{figure.name}.png"] = figure.png
    return contents


def main(argv: list[str]) -> int:
    """Run ``report``."""
    parser = Parser(
        prog="rlhf-lit report",
        allow_abbrev=False,
        usage="rlhf-lit report RUN_OR_SWEEP [...] --out DIR [--evaluate] [--option=value ...]",
        description="Runs and sweeps compared on one page, with intervals over seeds and prompts (docs/report.md).",
    )
    parser.add_argument("--config", action="config", help="YAML file of options; what stands after it goes over it.")
    parser.add_argument("runs", type=str, nargs="+", help="Run folders, run names (runs/dpo), sweeps' folders.")
    parser.add_argument("--out", type=Path, required=True, help="The report's folder; an earlier report is replaced.")
    parser.add_argument(
        "--ignore", type=list[str], default=[], help="Further keys that do not define an arm, as [model.base.name]."
    )
    parser.add_argument("--evaluate", action="store_true", help="First evaluate the runs that lack it, as named below.")
    parser.add_class_arguments(Asked)
    quiet_libraries()
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a judge in the user's folder
    given = parser.instantiate_classes(parser.parse_args(argv)).as_dict()
    options = {name: given.pop(name) for name in ("runs", "out", "ignore", "evaluate")}
    given.pop("config")
    study = report(**options, asked=Asked(**given))
    for one in study.left_out:
        say(f"left out: {one}")
    few = sum(arm.seeds < 3 for arm in study.arms)
    parts = [f"{len(study.arms)} arms, {len(study.runs)} runs"]
    parts += [f"{few} arms with fewer than 3 seeds: no interval over seeds"] if few else []
    parts.append(short_path(options["out"].expanduser().absolute() / place.PAGE))
    tell(" · ".join(parts))
    return 0
