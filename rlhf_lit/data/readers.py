"""Readers: one for each kind of record, made from a file's first rows, which reads its rows one by one."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

from rlhf_lit.data import columns as c
from rlhf_lit.data import ranked_rows, reading, shapes
from rlhf_lit.data.columns import Column, Columns
from rlhf_lit.data.messages import unread_fields
from rlhf_lit.data.reports import RowReport
from rlhf_lit.data.rows import (
    BadRow,
    Demonstration,
    Judged,
    Preference,
    Prompt,
    Ranking,
    Row,
    Unreadable,
    label,
)
from rlhf_lit.data.shapes import RecordKind, Shape
from rlhf_lit.data.sources import Source
from rlhf_lit.data.trees import is_tree, lists_of_tree
from rlhf_lit.errors import UserError

R = TypeVar("R")
MARGINS = ("margin", "score_chosen", "score_rejected")
# Columns of which a reader of prompts says nothing: answers to them, and what judges these.
OF_ANSWERS = frozenset(
    (*c.ANSWER, *c.LISTS, *c.PAIR, *c.VERDICTS, *c.RATINGS, *(name for pair in c.ANSWERS_OF_TWO for name in pair))
)
# Names of columns whose numbers say how good an answer is, or how much a row counts.
JUDGING = re.compile(
    "score|rating|rank|reward|margin|weight|prefer|winner|better|safer|chosen|rejected|desirable", re.IGNORECASE
)
# The shape of the lists that message trees are made of.
TREE = Shape(
    "list", Column("prompt", "prompt"), Column("answers", "answers"), parts={"ranks": Column("ranks", "ranks")}
)

Build = Callable[[Shape, Row, int, dict[str, Any]], list[R]]


@dataclass(frozen=True)
class RowReader(Generic[R]):
    """Reads the rows of one file. It can be pickled.

    Attributes:
        shape: of the file's rows.
        build: the records of a row of that shape.
        mapped: what the user's `columns` name, by our names.
        per_row: records that a whole row gives: two of a pair whose answers are judged one by one.
        trees: a row may be a message tree, which holds several lists.
        silent: columns that are never called unused.
        unused_are: what the other unused ones are called.
    """

    shape: Shape
    build: Build[R]
    mapped: Mapping[str, Column] = field(default_factory=dict)
    per_row: int = 1
    trees: bool = False
    silent: frozenset[str] = frozenset()
    unused_are: str = "columns that were not used"
    used: frozenset[str] = field(init=False)
    core: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "core", frozenset(name for part in self.shape.core for name in part.sources))
        object.__setattr__(self, "used", self.shape.sources | self.silent)

    def read(self, raw: Any, number: int) -> list[R]:
        """The records of a row.

        Args:
            raw: the row as the file has it.
            number: its number in the file.

        Raises:
            Tie: two answers of which none won.
            BadRow: it cannot be used.
        """
        if not isinstance(raw, dict):
            raise BadRow(raw.reason if isinstance(raw, Unreadable) else "malformed")
        if isinstance(raw, TreeList):
            return self.build(TREE, raw, number, raw)
        if self.trees and is_tree(raw):
            return [record for part in self.parts(raw) for record in self.read(part, number)]
        source = {**raw, **{name: _kept(column, raw) for name, column in self.mapped.items()}} if self.mapped else raw
        return self.build(self.shape, raw, number, source)

    def parts(self, raw: Any) -> Sequence[Any]:
        """The row itself; of a message tree the lists in it, each of which ``read`` takes as a row."""
        return [TreeList(part) for part in lists_of_tree(raw)] if self.trees and is_tree(raw) else (raw,)

    def unused(self, raw: Any) -> set[str]:
        """The columns of a row that hold text, or may judge an answer, and take no part in what is read; fields of its
        messages as ``name of messages``."""
        if not isinstance(raw, dict) or isinstance(raw, TreeList):
            return set()
        found = {f"{name} of messages" for column in self.core for name in unread_fields(raw.get(column))}
        if raw.keys() <= self.used or is_tree(raw):
            return found
        return found | {
            column
            for column in raw.keys() - self.used
            if _holds_text(raw[column]) or (raw[column] is not None and _may_judge(column))
        }

    def report(self, source: Source) -> RowReport:
        """A report of the file that says how it is read, before any row is counted."""
        return RowReport(source.label, notes=self.notes(), unused_are=self.unused_are)

    def notes(self) -> list[str]:
        """How the file is read, where that is not to be seen from its columns' names."""
        verdict = self.shape.verdict
        return [] if verdict is None else [f"verdicts of '{verdict.column.source}': {verdict}"]


class TreeList(dict[str, Any]):
    """A list of ranked answers that was taken from a message tree."""


def _kept(column: Column, raw: Row) -> Any:
    """What a mapped column holds in this row; None where it cannot be read."""
    try:
        return column.of(raw)
    except BadRow:
        return None


def _may_judge(column: str) -> bool:
    return column in c.VERDICTS or JUDGING.search(column) is not None


def _holds_text(value: Any) -> bool:
    if isinstance(value, str):
        return bool(value) and not value.isspace()
    if isinstance(value, Mapping):
        return any(map(_holds_text, value.values()))
    return isinstance(value, list) and any(map(_holds_text, value))


def demonstration_reader(first_rows: Sequence[Any], source: Source) -> RowReader[Demonstration]:
    """Of demonstrations; of two answers, the better one is imitated.

    Raises:
        UserError: as :func:`~rlhf_lit.data.shapes.find_shape` says.
    """

    def candidates(here: Mapping[str, Column]) -> Iterator[Shape]:
        judged = list(shapes.two_answers(here))
        if not judged:
            yield from shapes.chat(here)
        yield from shapes.answer(here)
        yield from judged
        if judged:
            yield from (shape for shape in shapes.chat(here) if shape.prompt is not None and shape.prompt.mapped)
        yield from shapes.raw_text(here)

    kind = RecordKind(
        "demonstrations (instruction (+ input) + output or response; prompt + completion; question + answer; messages; "
        "conversations; text; chosen + rejected)",
        candidates,
        needs={*c.PROMPT, *c.CHAT, *c.ANSWER, *c.BESIDE, "text"},
        beside=c.BESIDE,
    )
    return _reader(first_rows, source, kind, _demonstration)


def _demonstration(shape: Shape, row: Row, number: int, source: dict[str, Any]) -> list[Demonstration]:
    return [Demonstration(reading.demonstration(shape, row), number, source, shape.tools(row))]


def preference_reader(first_rows: Sequence[Any], source: Source, *, margins: bool = False) -> RowReader[Preference]:
    """Of preference pairs.

    Args:
        first_rows: the file's, by which its shape is found.
        source: where they come from.
        margins: the loss reads them: a row with a null one is bad.

    Raises:
        UserError: as :func:`~rlhf_lit.data.shapes.find_shape` says, or rows of single answers with a label.
    """
    here = Columns.of(source, shapes.columns_of(first_rows)).available(shapes.columns_of(first_rows))
    if "label" in here and not any(shapes.two_answers(here)):
        raise UserError(
            f"{source.path}: rows of single answers with a label are no pairs: KTO with UnpairedDataModule learns from "
            "them (configs/dpo/kto.yaml)"
        )
    kind = RecordKind(
        "preference pairs (prompt, question, instruction (+ input), messages or conversations + chosen + rejected; "
        "chosen + rejected as whole dialogues; two answers such as output_1 and output_2 with a verdict)",
        shapes.two_answers,
        needs={*c.PROMPT, *c.CHAT, *c.PAIR, *c.VERSUS, *c.BESIDE, "label"},
        beside=(*c.BESIDE, *MARGINS),
    )
    return _reader(first_rows, source, kind, partial(_preference, margins=margins))


def _preference(shape: Shape, row: Row, number: int, source: dict[str, Any], margins: bool = False) -> list[Preference]:
    prompt, chosen, rejected = reading.preference(shape, row)
    margin = reading.margin(shape, row, margins)
    return [Preference(prompt, chosen, rejected, margin, number, source, shape.tools(row))]


def judged_reader(first_rows: Sequence[Any], source: Source) -> RowReader[Judged]:
    """Of answers judged one by one: rows of any supervised shape with a ``label``; of a pair, both sides.

    Raises:
        UserError: as :func:`~rlhf_lit.data.shapes.find_shape` says.
    """

    def candidates(here: Mapping[str, Column]) -> Iterator[Shape]:
        if "label" in here:
            if not here.keys() >= {*c.PAIR}:
                yield from map(labelled(here), shapes.chat(here))
            yield from map(labelled(here), shapes.answer(here))
        yield from shapes.two_answers(here)

    kind = RecordKind(
        "judged answers (prompt + completion, instruction (+ input) + output, messages or conversations, each with "
        "label; chosen + rejected; two answers with a verdict)",
        candidates,
        needs={*c.PROMPT, *c.CHAT, *c.ANSWER, *c.BESIDE, "label"},
        beside=(*c.BESIDE, *MARGINS),
    )
    reader = _reader(first_rows, source, kind, _judged)
    return reader if "label" in reader.shape.parts else replace(reader, build=_both_judged, per_row=2)


def labelled(here: Mapping[str, Column]) -> Callable[[Shape], Shape]:
    """Puts the ``label`` column to a shape."""
    return lambda shape: Shape(shape.form, shape.prompt, shape.answer, parts={"label": here["label"]})


def _judged(shape: Shape, row: Row, number: int, source: dict[str, Any]) -> list[Judged]:
    turns = reading.demonstration(shape, row)
    last = max(i for i, turn in enumerate(turns) if turn.role == "user")
    good = label(shape.parts["label"].of(row))
    return [Judged(turns[: last + 1], turns[last + 1 :], good, number, source, shape.tools(row))]


def _both_judged(shape: Shape, row: Row, number: int, source: dict[str, Any]) -> list[Judged]:
    (pair,) = _preference(shape, row, number, source)
    return [
        Judged(pair.prompt, response, good, number, source, pair.tools)
        for response, good in ((pair.chosen, True), (pair.rejected, False))
    ]


def ranking_reader(
    first_rows: Sequence[Any], source: Source, *, most: int | None = None, margins: bool = False
) -> RowReader[Ranking]:
    """Of ranked lists of answers; a pair is a list of two, a message tree gives several.

    Args:
        first_rows, source, margins: as in :func:`preference_reader`.
        most: a list of more answers is a bad row.

    Raises:
        UserError: as :func:`~rlhf_lit.data.shapes.find_shape` says.
    """

    def candidates(here: Mapping[str, Column]) -> Iterator[Shape]:
        yield from shapes.ranked(here)
        yield from shapes.two_answers(here)

    kind = RecordKind(
        "ranked answers (prompt or another column of a prompt + answers or responses + ranks or scores; + ranked, the "
        "best first; + completions with response and overall_score; message trees; chosen + rejected; two answers with "
        "a verdict)",
        candidates,
        needs={*c.PROMPT, *c.CHAT, *c.LISTS, *c.PAIR, *c.VERSUS, *c.BESIDE, "ranks", "scores", "label"},
        beside=(*c.BESIDE, *MARGINS, "ranks", "scores"),
    )
    return _reader(first_rows, source, kind, partial(_ranking, most=most, margins=margins), trees=True)


def _ranking(
    shape: Shape, row: Row, number: int, source: dict[str, Any], most: int | None = None, margins: bool = False
) -> list[Ranking]:
    ranking = Ranking(*ranked_rows.ranking(shape, row, margins), number, source, shape.tools(row))
    if most is not None and len(ranking.answers) > most:
        raise BadRow(f"more than {most} answers")
    return [ranking]


def prompt_reader(first_rows: Sequence[Any], source: Source) -> RowReader[Prompt]:
    """Of prompts, the answer dropped where there is one.

    Raises:
        UserError: as :func:`~rlhf_lit.data.shapes.find_shape` says.
    """
    kind = RecordKind(
        "prompts (prompt; question; instruction (+ input); messages; conversations; text; chosen as a whole dialogue)",
        _prompts,
        needs={*c.PROMPT, *c.CHAT, *c.BESIDE, "text"},
        beside=c.BESIDE,
        judges=False,
    )
    reader = _reader(first_rows, source, kind, _prompt)
    mapped = {column for part in reader.mapped.values() for column in part.sources}
    # Rewards are handed whole rows.
    return replace(
        reader, silent=OF_ANSWERS | mapped, unused_are="columns that are no part of a prompt, for rewards alone"
    )


def _prompts(here: Mapping[str, Column]) -> Iterator[Shape]:
    column = c.slot((*c.PROMPT, *c.CHAT), here)
    if column is not None:
        yield Shape("prompt", column)
    for name in ("chosen", "first", "conversation_a"):
        if name in here and (name != "first" or here[name].mapped):
            yield Shape("pair", None, here[name])
    yield from shapes.raw_text(here)


def _prompt(shape: Shape, row: Row, number: int, source: dict[str, Any]) -> list[Prompt]:
    return [Prompt(reading.prompt(shape, row), number, source, shape.tools(row))]


def _reader(
    first_rows: Sequence[Any],
    source: Source,
    kind: RecordKind,
    build: Build[R],
    trees: bool = False,
) -> RowReader[R]:
    rows = shapes.first_rows(first_rows)
    if trees:
        others = [row for row in rows if not is_tree(row)]
        if len(others) < len(rows) and not any(isinstance(row, Mapping) for row in others):
            return RowReader(TREE, build, trees=True)
        rows = others
    columns = Columns.of(source, shapes.columns_of(rows))
    return RowReader(shapes.find_shape(rows, source, kind), build, columns.mapped, trees=trees)
