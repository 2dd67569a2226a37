"""What a section of the page is made of; how numbers are written."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf_lit.evaluation.estimates import Estimate
from rlhf_lit.report.comparing import ABSENT
from rlhf_lit.report.figures import Figure
from rlhf_lit.report.statistics import MINIMUM_SEEDS, OverSeeds


@dataclass(frozen=True)
class Cell:
    """What stands in a table.

    Attributes:
        text: the number itself.
        notes: under it, smaller: its intervals.
    """

    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first column names the row.

    Attributes:
        caption: what it shows.
        head: of the columns.
        rows: as long as the head.
    """

    caption: str
    head: list[str]
    rows: list[list[Cell]]


@dataclass(frozen=True)
class Response:
    """What one arm answered.

    Attributes:
        arm: its label.
        text: the response.
        notes: seed, score, length.
    """

    arm: str
    text: str
    notes: str


@dataclass(frozen=True)
class Completions:
    """What the arms answered to one prompt."""

    prompt: str
    responses: list[Response]


@dataclass(frozen=True)
class Document:
    """A text that is folded away.

    Attributes:
        title: always seen.
        text: as it is.
    """

    title: str
    text: str


@dataclass
class Section:
    """A part of the page; what it has none of is not shown.

    Attributes:
        key: its address on the page.
        title: its heading.
        text: what it shows and what that was made from, a paragraph each.
        missing: one line: what is not there, and which command makes it.
    """

    key: str
    title: str
    text: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    completions: list[Completions] = field(default_factory=list)
    documents: list[Document] = field(default_factory=list)


def number(value: float | None) -> str:
    """In four significant digits."""
    if value is None or not np.isfinite(value):
        return ABSENT
    if value and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.2e}"
    text = f"{value:.4g}"
    return text.replace("-", "−")


def interval(estimate: Estimate) -> str:
    """Its bounds."""
    return f"[{number(estimate.low)}, {number(estimate.high)}]"


def seeds_note(found: OverSeeds) -> str:
    """What is known over seeds, or why nothing is."""
    count = len(found.values)
    if count >= MINIMUM_SEEDS:
        return f"{count} seeds {interval(found.estimate)}"
    if count == 1:
        return "1 seed: no interval over seeds"
    return f"{count} seeds: {', '.join(map(number, found.values))}"


def cell(found: OverSeeds, prompts: Estimate | None = None) -> Cell:
    """A mean with its intervals over seeds and, where there is one, over prompts."""
    if not found.values:
        return Cell(ABSENT)
    notes = [seeds_note(found)]
    if prompts is not None and np.isfinite(prompts.low):
        notes.append(f"prompts {interval(prompts)}")
    return Cell(number(found.estimate.mean), tuple(notes))


def plain(value: Any) -> Cell:
    """A text or a number alone."""
    return Cell(number(value) if isinstance(value, float) else str(value))
