"""Records from the rows of whole files at once, and a door to the readers that make them of one row each.

``demonstration_reader(first_rows, source).read(row, number)`` gives the records of one row; ``demonstrations(rows, …)``
those of all rows, and a report.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from rlhf_lit.data.readers import (
    RowReader,
    demonstration_reader,
    judged_reader,
    preference_reader,
    prompt_reader,
    ranking_reader,
)
from rlhf_lit.data.reports import RowReport
from rlhf_lit.data.rows import (
    BadRow,
    Demonstration,
    Judged,
    Message,
    OnBadRow,
    Preference,
    Prompt,
    Ranking,
    Tie,
)
from rlhf_lit.data.sources import Source, read_rows, rows_of
from rlhf_lit.errors import UserError

__all__ = [
    "Demonstration",
    "Judged",
    "Message",
    "OnBadRow",
    "Preference",
    "Prompt",
    "Ranking",
    "RowReader",
    "RowReport",
    "Source",
    "demonstration_reader",
    "demonstrations",
    "judged",
    "judged_reader",
    "preference_reader",
    "preferences",
    "prompt_reader",
    "prompts",
    "ranking_reader",
    "rankings",
    "read_rows",
    "rows_of",
    "stopped",
]

R = TypeVar("R")


def demonstrations(
    rows: Sequence[Any], source: Source, *, on_bad_row: OnBadRow
) -> tuple[list[Demonstration], RowReport]:
    """Demonstrations from rows of any supervised shape; of two answers, the better one.

    Raises:
        UserError: no known shape, a bad row where ``on_bad_row`` is ``error``, or no usable row.
    """
    return _all(demonstration_reader(rows, source), rows, source, on_bad_row)


def preferences(
    rows: Sequence[Any], source: Source, *, on_bad_row: OnBadRow, margins: bool = False
) -> tuple[list[Preference], RowReport]:
    """Preference pairs from rows of any paired shape; ``margins`` as in :func:`preference_reader`.

    Raises:
        UserError: no known shape, a bad row where ``on_bad_row`` is ``error``, or no usable row.
    """
    return _all(preference_reader(rows, source, margins=margins), rows, source, on_bad_row)


def judged(rows: Sequence[Any], source: Source, *, on_bad_row: OnBadRow) -> tuple[list[Judged], RowReport]:
    """Answers judged one by one, from rows of any supervised shape with a ``label``; of a pair, both sides.

    The report counts answers, so that a pair counts twice.

    Raises:
        UserError: no known shape, a bad row where ``on_bad_row`` is ``error``, or no usable row.
    """
    return _all(judged_reader(rows, source), rows, source, on_bad_row)


def rankings(
    rows: Sequence[Any],
    source: Source,
    *,
    on_bad_row: OnBadRow,
    most: int | None = None,
    margins: bool = False,
) -> tuple[list[Ranking], RowReport]:
    """Ranked lists of answers, from rows of any ranked or paired shape; a message tree of OpenAssistant gives several.

    Args:
        rows: as the file has them.
        source: where they come from.
        on_bad_row: what a row that cannot be used leads to.
        most: a list of more answers is a bad row.
        margins: as in :func:`preference_reader`.

    Raises:
        UserError: no known shape, a bad row where ``on_bad_row`` is ``error``, or no usable row.
    """
    return _all(ranking_reader(rows, source, most=most, margins=margins), rows, source, on_bad_row)


def prompts(rows: Sequence[Any], source: Source, *, on_bad_row: OnBadRow) -> tuple[list[Prompt], RowReport]:
    """Prompts from rows of any shape, the answer dropped where there is one.

    Raises:
        UserError: no known shape, a bad row where ``on_bad_row`` is ``error``, or no usable row.
    """
    return _all(prompt_reader(rows, source), rows, source, on_bad_row)


def stopped(source: Source, row: int, reason: str) -> str:
    """The line that ends a run at a bad row."""
    return f"{source.path}, row {row}: {reason}; mend the row, or set on_bad_row to skip"


def _all(reader: RowReader[R], rows: Sequence[Any], source: Source, on_bad_row: OnBadRow) -> tuple[list[R], RowReport]:
    """The records of all rows, up to the limit, and what became of them. A tie is counted, and never ends a run."""
    report = reader.report(source)
    limit = None if source.limit is None else source.limit * reader.per_row
    records: list[R] = []
    for number, raw in enumerate(rows):
        if limit is not None and len(records) >= limit:
            break
        report.unused |= reader.unused(raw)
        for part in reader.parts(raw):
            if limit is not None and len(records) >= limit:
                break
            report.total += reader.per_row
            try:
                records += reader.read(part, number)
            except BadRow as reason:
                if on_bad_row == "error" and not isinstance(reason, Tie):
                    raise UserError(stopped(source, number, str(reason))) from reason
                report.skip(str(reason), number)
    report.used = len(records)
    if not records:
        raise UserError(f"no usable row in {source.path}: {report.summary()}")
    return records, report
