"""Validated records from raw rows: demonstrations, preference pairs and prompts, whatever file they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from rlhf_lit.data import ranked_rows
from rlhf_lit.data import rows as row_shapes
from rlhf_lit.data.rows import BadRow, Message
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
    "RowReport",
    "Source",
    "demonstrations",
    "judged",
    "preferences",
    "prompts",
    "rankings",
    "read_rows",
    "rows_of",
]

OnBadRow = Literal["skip", "error"]
SHOWN_ROWS = 5
R = TypeVar("R")


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate.

    Attributes:
        messages: the turns; the last is the assistant's. Plain text without a prompt is one assistant turn.
        row: number in its file, from 0.
        source: the row as the file has it.
    """

    messages: tuple[Message, ...]
    row: int
    source: dict[str, Any]


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt.

    Attributes:
        prompt: the turns before the answers.
        chosen, rejected: the answers: one assistant turn each, or more where the file says so.
        margin: how much better the chosen one was rated, 0 where the file does not say.
        row: number in its file, from 0.
        source: the row as the file has it.
    """

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    margin: float
    row: int
    source: dict[str, Any]


@dataclass(frozen=True)
class Judged:
    """One answer to a prompt, judged good or bad.

    Attributes:
        prompt: the turns before the answer.
        response: the answer: one assistant turn, or more where the file says so.
        desirable: whether it is a good one.
        row: number in its file, from 0.
        source: the row as the file has it.
    """

    prompt: tuple[Message, ...]
    response: tuple[Message, ...]
    desirable: bool
    row: int
    source: dict[str, Any]


@dataclass(frozen=True)
class Ranking:
    """Several answers to one prompt, ordered.

    Attributes:
        prompt: the turns before the answers.
        answers: each one assistant turn, or more where the file says so.
        ranks: of each answer, 0 for the best; equal where they tie.
        ratings: of each answer, differences of which are margins; 0 where the file has ranks alone.
        row: number in its file, from 0.
        source: the row as the file has it; of a message tree, the list taken from it.
    """

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    ranks: tuple[int, ...]
    ratings: tuple[float, ...]
    row: int
    source: dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered; ``row`` and ``source`` as in :class:`Demonstration`."""

    prompt: tuple[Message, ...]
    row: int
    source: dict[str, Any]


@dataclass
class RowReport:
    """What became of a file's rows.

    Attributes:
        file: how messages name the file.
        total: rows looked at.
        used: rows kept.
        counts: skipped rows by reason.
        first_rows: the first few row numbers of each reason.
    """

    file: str
    total: int = 0
    used: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first_rows: dict[str, list[int]] = field(default_factory=dict)

    def skip(self, reason: str, row: int) -> None:
        """Count a row that is not used."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.first_rows.setdefault(reason, [])
        if len(shown) < SHOWN_ROWS:
            shown.append(row)

    def drop(self, reason: str, row: int) -> None:
        """Count a row that had been kept, and falls out later (too long, no supervised token)."""
        self.used -= 1
        self.skip(reason, row)

    def summary(self) -> str:
        """One line, such as ``test.jsonl.gz: 2303 of 2312 rows used; skipped 4 empty chosen (rows 86, 516, …)``."""
        line = f"{self.file}: {self.used} of {self.total} rows used"
        reasons = []
        for reason, count in self.counts.items():
            shown = self.first_rows[reason]
            numbers = ", ".join(map(str, shown)) + (", …" if count > len(shown) else "")
            reasons.append(f"{count} {reason} ({'row' if count == 1 else 'rows'} {numbers})")
        return line + (f"; skipped {', '.join(reasons)}" if reasons else "")


def demonstrations(
    rows: Sequence[Any], source: Source, *, on_bad_row: OnBadRow
) -> tuple[list[Demonstration], RowReport]:
    """Demonstrations from rows of any supervised shape; of a preference pair, the chosen side.

    Raises:
        UserError: no known shape, a bad row where ``on_bad_row`` is ``error``, or no usable row.
    """

    def fits(columns: Set[str]) -> bool:
        return bool(
            columns & {*row_shapes.CHAT_COLUMNS, "text"}
            or (columns & {*row_shapes.PROMPT_COLUMNS} and columns & {*row_shapes.ANSWER_COLUMNS})
            or columns >= {"chosen", "rejected"}
        )

    def build(row: row_shapes.Row, columns: Set[str], number: int, raw: dict[str, Any]) -> Demonstration:
        return Demonstration(row_shapes.demonstration(row, columns), number, raw)

    known = (
        "instruction (+ input) + output or response; prompt + completion; question + answer; messages; conversations; "
        "text; chosen + rejected"
    )
    return _collect(rows, source, on_bad_row, fits, build, f"demonstrations ({known})")


def preferences(rows: Sequence[Any], source: Source, *, on_bad_row: OnBadRow) -> tuple[list[Preference], RowReport]:
    """Preference pairs from rows of any paired shape.

    Raises:
        UserError: no known shape, a bad row where ``on_bad_row`` is ``error``, or no usable row.
    """

    def fits(columns: Set[str]) -> bool:
        return columns >= {"chosen", "rejected"}

    columns = columns_of(rows, source)[1]
    if "label" in columns and not fits(columns):
        raise UserError(
            f"{source.path}: rows of single answers with a label are no pairs: KTO with UnpairedDataModule learns from "
            "them (configs/dpo/kto.yaml)"
        )

    def build(row: row_shapes.Row, columns: Set[str], number: int, raw: dict[str, Any]) -> Preference:
        return Preference(*row_shapes.preference(row, columns), row_shapes.margin(row, columns), number, raw)

    known = (
        "prompt, question, instruction (+ input), messages or conversations + chosen + rejected; "
        "chosen + rejected as whole dialogues"
    )
    return _collect(rows, source, on_bad_row, fits, build, f"preference pairs ({known})")


def judged(rows: Sequence[Any], source: Source, *, on_bad_row: OnBadRow) -> tuple[list[Judged], RowReport]:
    """Answers judged one by one, from rows of any supervised shape with a ``label``; of a pair, both sides.

    The report counts answers, so that a pair counts twice.

    Raises:
        UserError: no known shape, a bad row where ``on_bad_row`` is ``error``, or no usable row.
    """
    columns = columns_of(rows, source)[1]
    if columns >= {"chosen", "rejected"} and "label" not in columns:
        pairs, report = preferences(rows, source, on_bad_row=on_bad_row)
        report.total, report.used = 2 * report.total, 2 * report.used
        return [
            Judged(pair.prompt, response, response is pair.chosen, pair.row, pair.source)
            for pair in pairs
            for response in (pair.chosen, pair.rejected)
        ], report

    def fits(columns: Set[str]) -> bool:
        return "label" in columns and bool(
            columns & {*row_shapes.CHAT_COLUMNS}
            or (columns & {*row_shapes.PROMPT_COLUMNS} and columns & {*row_shapes.ANSWER_COLUMNS})
        )

    def build(row: row_shapes.Row, columns: Set[str], number: int, raw: dict[str, Any]) -> Judged:
        turns = row_shapes.demonstration(row, columns)
        last = max(i for i, turn in enumerate(turns) if turn.role == "user")
        return Judged(turns[: last + 1], turns[last + 1 :], row_shapes.label(row), number, raw)

    known = (
        "prompt + completion, instruction (+ input) + output, messages or conversations, each with label; "
        "chosen + rejected"
    )
    return _collect(rows, source, on_bad_row, fits, build, f"judged answers ({known})")


def rankings(
    rows: Sequence[Any], source: Source, *, on_bad_row: OnBadRow, most: int | None = None
) -> tuple[list[Ranking], RowReport]:
    """Ranked lists of answers, from rows of any ranked or paired shape; a message tree of OpenAssistant gives several.

    Args:
        rows: as the file has them.
        source: where they come from.
        on_bad_row: what a row that cannot be used leads to.
        most: a list of more answers is a bad row.

    Raises:
        UserError: no known shape, a bad row where ``on_bad_row`` is ``error``, or no usable row.
    """

    def fits(columns: Set[str]) -> bool:
        return ranked_rows.is_ranked(columns) or columns >= {"chosen", "rejected"}

    def build(row: row_shapes.Row, columns: Set[str], number: int, raw: dict[str, Any]) -> Ranking:
        ranking = Ranking(*ranked_rows.ranking(row, columns), number, raw)
        if most is not None and len(ranking.answers) > most:
            raise BadRow(f"more than {most} answers")
        return ranking

    known = (
        "prompt or another column of a prompt + answers or responses + ranks or scores; + ranked, the best first; "
        "+ completions with response and overall_score; message trees; chosen + rejected"
    )
    taken, numbers = without_trees(rows)
    return _collect(taken, source, on_bad_row, fits, build, f"ranked answers ({known})", numbers)


def without_trees(rows: Sequence[Any]) -> tuple[list[Any], list[int]]:
    """The rows, message trees replaced by the ranked lists that are in them; and each one's number in the file."""
    lists = [
        (found, number)
        for number, row in enumerate(rows)
        for found in (ranked_rows.lists_of_tree(row) if ranked_rows.is_tree(row) else [row])
    ]
    return [row for row, _ in lists], [number for _, number in lists]


def prompts(rows: Sequence[Any], source: Source, *, on_bad_row: OnBadRow) -> tuple[list[Prompt], RowReport]:
    """Prompts from rows of any shape, the answer dropped where there is one.

    Raises:
        UserError: no known shape, a bad row where ``on_bad_row`` is ``error``, or no usable row.
    """

    def fits(columns: Set[str]) -> bool:
        return bool(columns & {*row_shapes.PROMPT_COLUMNS, *row_shapes.CHAT_COLUMNS, "chosen", "text"})

    def build(row: row_shapes.Row, columns: Set[str], number: int, raw: dict[str, Any]) -> Prompt:
        return Prompt(row_shapes.prompt(row, columns), number, raw)

    known = "prompt; question; instruction (+ input); messages; conversations; text; chosen as a whole dialogue"
    return _collect(rows, source, on_bad_row, fits, build, f"prompts ({known})")


def _collect(
    rows: Sequence[Any],
    source: Source,
    on_bad_row: OnBadRow,
    fits: Callable[[Set[str]], bool],
    build: Callable[[row_shapes.Row, Set[str], int, dict[str, Any]], R],
    wanted: str,
    numbers: Sequence[int] | None = None,
) -> tuple[list[R], RowReport]:
    if source.limit is not None and source.limit < 1:
        raise UserError(f"{source.path}: limit must be at least 1, not {source.limit}")
    found, columns = columns_of(rows, source)
    check_mapping(source, found)
    if not fits(columns):
        shown = ", ".join(sorted(map(str, found))) or "(none)"
        if ranked_rows.is_ranked(columns) or any(map(ranked_rows.is_tree, rows)):
            raise UserError(
                f"{source.path}: columns {shown} are ranked lists of answers, which RankingDataModule reads for a "
                f"RewardModel; here {wanted} are needed"
            )
        raise UserError(
            f"{source.path}: columns {shown} have no known shape of {wanted}; "
            "name them in `columns`, e.g. {prompt: question}"
        )
    report = RowReport(source.label)
    records: list[R] = []
    for number, raw in zip(range(len(rows)) if numbers is None else numbers, rows, strict=True):
        if source.limit is not None and len(records) == source.limit:
            break
        report.total += 1
        try:
            if isinstance(raw, row_shapes.Unreadable):
                raise BadRow(raw.reason)
            if not isinstance(raw, dict):
                raise BadRow("malformed")
            records.append(build(renamed(raw, source.columns), columns, number, raw))
        except BadRow as reason:
            if on_bad_row == "error":
                raise UserError(
                    f"{source.path}, row {number}: {reason}; mend the row, or set on_bad_row to skip"
                ) from reason
            report.skip(str(reason), number)
    report.used = len(records)
    if not records:
        raise UserError(f"no usable row in {source.path}: {report.summary()}")
    return records, report


def columns_of(rows: Sequence[Any], source: Source) -> tuple[set[str], set[str]]:
    """The columns that a file has, and the same by our names for them."""
    found = {column for row in rows if isinstance(row, dict) for column in row}
    return found, (found - set(source.columns.values())) | set(source.columns)


def check_mapping(source: Source, found: Set[str]) -> None:
    """Refuse a ``columns`` that names what we or the file do not know. Raises UserError."""
    for ours, theirs in source.columns.items():
        if ours == "rows":  # where in the file its rows are: it has been read by that
            continue
        if ours not in row_shapes.KNOWN_COLUMNS:
            raise UserError(
                f"{source.path}: columns names '{ours}', which is none of {', '.join(sorted(row_shapes.KNOWN_COLUMNS))}"
            )
        if theirs not in found:
            raise UserError(
                f"{source.path}: columns asks for '{theirs}', but the file has {', '.join(sorted(map(str, found)))}"
            )


def renamed(raw: dict[str, Any], mapping: Mapping[str, Any]) -> dict[str, Any]:
    """A row by our names for its columns."""
    kept = {name: value for name, value in raw.items() if name not in mapping.values()}
    return kept | {ours: raw.get(theirs) for ours, theirs in mapping.items() if ours != "rows"}
