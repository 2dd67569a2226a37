"""Evaluations of the runs by ``evaluate``: found where they are kept, and chosen so that arms compare."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rlhf_lit.errors import UserError
from rlhf_lit.evaluation.estimates import Array
from rlhf_lit.files import short_path
from rlhf_lit.report.reading import LeftOut, Run, read_lines
from rlhf_lit.runs import EXPORT

FOLDER = "evaluation"  # of a run's folder; a version for each evaluation that a report has made
RESULT = "evaluation.json"
BESIDE = Path("runs/evaluate")  # where `evaluate` writes when it is not told
# What may differ between two evaluations whose numbers compare.
INDIFFERENT = ("dtype", "intervals")
# Where the built-in world's reward stood when earlier evaluations were made, and where it stands now.
GOLD_BEFORE = ("rlhf_lit.data.playground.reward.", "rlhf_lit.playground.reward.")


@dataclass(frozen=True)
class Evaluated:
    """One evaluation of one run.

    Attributes:
        folder: where it is.
        numbers: ``evaluation.json``.
        lines: ``samples.jsonl``.
    """

    folder: Path
    numbers: dict[str, Any]
    lines: list[dict[str, Any]]

    @property
    def judges(self) -> dict[str, str]:
        """`judge` and `gold`, in words."""
        return {name: words.replace(*GOLD_BEFORE) for name, words in self.numbers["judges"].items()}

    @cached_property
    def scoring(self) -> list[str]:
        """Those that score responses; judges of pairs compare them."""
        return [name for name in self.judges if any(f"model/{name}" in line for line in self.lines)]

    @property
    def reward(self) -> str | None:
        """The score that counts: gold where there is one."""
        return next((name for name in ("gold", "judge") if name in self.scoring), None)

    @property
    def win_rate(self) -> dict[str, float | None] | None:
        """Against the baseline, by the judge that counts: mean, low, high over prompts."""
        rates = self.numbers["win_rates"]
        return next((rates[name]["win_rate"] for name in ("gold", "judge") if name in rates), None)

    @property
    def reference(self) -> str | None:
        """What KL is measured to."""
        return self.numbers.get("reference")

    @cached_property
    def kind(self) -> str:
        """What two evaluations must share for their numbers to compare: judges, prompts, sampling, seed."""
        prompts = self.numbers["files"].get("prompts") or {}
        return kind_of(self.numbers["settings"], self.judges, prompts.get("file"), prompts.get("total"))

    @cached_property
    def prompts(self) -> list[str]:
        """In order, each once."""
        return list(dict.fromkeys(line["prompt"] for line in self.lines))

    def table(self, column: str) -> Array:
        """[prompts, samples] of a number of the model's responses: `tokens`, `gold`, `judge`."""
        if column not in self._tables:
            rows: dict[str, list[float]] = {prompt: [] for prompt in self.prompts}
            for line in self.lines:
                if f"model/{column}" in line:
                    rows[line["prompt"]].append(float(line[f"model/{column}"]))
            self._tables[column] = np.array([rows[prompt] for prompt in self.prompts])
        return self._tables[column]

    @cached_property
    def _tables(self) -> dict[str, Array]:
        """Those that were asked for."""
        return {}

    @property
    def kl(self) -> dict[str, float | None] | None:
        """Exact KL to the reference, nats per response: mean, low, high over prompts."""
        found = self.numbers.get("kl")
        return found["exact"] if found else None

    @property
    def starts_at(self) -> dict[str, float] | None:
        """The reference's own mean scores, where it was the baseline."""
        if self.reference is None or self.numbers.get("baseline") != self.reference:
            return None
        scores = self.numbers["responses"]["baseline"]["scores"]
        return {name: float(score["mean"]) for name, score in scores.items()}

    @property
    def in_words(self) -> str:
        """What was measured, in one line."""
        prompts = self.numbers["files"].get("prompts") or {}
        sampling = self.numbers["settings"]["sampling"]
        judges = ", ".join(f"{name} {shortened(words)}" for name, words in self.judges.items())
        samples = self.numbers["settings"]["samples"]
        return (
            f"{len(self.prompts)} prompts of {prompts.get('file')}, {samples} response{'s' * (samples > 1)} to each at "
            f"temperature {sampling['temperature']:g}; {judges or 'no judge'}"
        )


def shortened(address: str) -> str:
    """A model's address as one would type it."""
    path = Path(address)
    if not path.is_absolute():
        return address
    return short_path(path.parent if path.name == EXPORT else path)


def kind_of(settings: dict[str, Any], judges: dict[str, str], file: str | None, total: int | None) -> str:
    """See ``Evaluated.kind``."""
    kept = {key: value for key, value in settings.items() if key not in INDIFFERENT}
    kept["sampling"] = {key: value for key, value in kept["sampling"].items() if key != "rows_at_once"}
    return json.dumps([kept, judges, file, total], sort_keys=True)


def read_evaluation(folder: Path) -> Evaluated | None:
    """An evaluation of responses; None where it is one of pairs alone.

    Raises:
        UserError: a damaged file.
    """
    file = folder / RESULT
    try:
        numbers = json.loads(file.read_text(encoding="utf-8"))
        if not numbers["responses"]:
            return None
        found = Evaluated(folder, numbers, read_lines(folder / "samples.jsonl"))
        if not found.kind or not found.prompts:
            raise KeyError("samples.jsonl")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{short_path(file)}: not what this version of evaluate writes ({error})") from error
    return found


def evaluations_of(run: Run) -> list[Evaluated]:
    """Those in a run's folder, and those of it beside it and in ``runs/evaluate``; oldest first.

    Raises:
        UserError: a damaged file.
    """
    inside = [*run.folder.glob(RESULT), *run.folder.glob(f"*/{RESULT}"), *run.folder.glob(f"*/*/{RESULT}")]
    beside = [*run.folder.parent.glob(f"*/{RESULT}"), *BESIDE.absolute().glob(f"*/{RESULT}")]
    addresses = {str(run.folder), str(run.folder / EXPORT)}
    found = []
    for file in dict.fromkeys([*inside, *beside]):
        evaluated = read_evaluation(file.parent)
        if evaluated and (file in inside or str(Path(evaluated.numbers["model"]).resolve()) in addresses):
            found.append(evaluated)
    return sorted(found, key=lambda one: (one.folder.parent, len(one.folder.name), one.folder.name))


def comparable(runs: Sequence[Run], wanted: str | None = None) -> tuple[dict[Path, Evaluated], list[LeftOut]]:
    """One evaluation a run, all of one kind, and what is said of the others.

    Args:
        runs: of all arms.
        wanted: the kind; None is the one that most of the runs have.

    Raises:
        UserError: a damaged file.
    """
    found = {run.folder: evaluations_of(run) for run in runs}
    kinds = Counter(kind for several in found.values() for kind in {one.kind for one in several})
    if not kinds:
        return {}, []
    chosen = wanted or max(sorted(kinds), key=lambda kind: kinds[kind])
    kept: dict[Path, Evaluated] = {}
    left = []
    for run in runs:
        own = [one for one in found[run.folder] if one.kind == chosen]
        if own:
            kept[run.folder] = own[-1]
        for one in found[run.folder]:
            if one.kind != chosen:
                left.append(
                    LeftOut(short_path(one.folder), f"another kind of evaluation than the others': {one.in_words}")
                )
    prompts = {tuple(one.prompts) for one in kept.values()}
    if len(prompts) > 1:  # rows that were over-long for one model alone, or a file that has changed
        common = set.intersection(*(set(one) for one in prompts))
        order = [prompt for prompt in min(prompts, key=len) if prompt in common]
        if not order:
            raise UserError(
                "the evaluations of these runs have no prompt in common: evaluate them again, with --evaluate"
            )
        kept = {folder: _on(one, order) for folder, one in kept.items()}
    return kept, left


def _on(evaluated: Evaluated, prompts: Sequence[str]) -> Evaluated:
    """The same evaluation on some of its prompts, in that order."""
    lines: dict[str, list[dict[str, Any]]] = {prompt: [] for prompt in prompts}
    for line in evaluated.lines:
        if line["prompt"] in lines:
            lines[line["prompt"]].append(line)
    return Evaluated(evaluated.folder, evaluated.numbers, [line for several in lines.values() for line in several])
