"""Which column of a file holds what: our names for columns, and what the user's ``columns`` say about them."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any

from rlhf_lit.data.rows import BadRow, Row, checked_text
from rlhf_lit.data.sources import Source
from rlhf_lit.errors import UserError

PROMPT = ("instruction", "prompt", "question")
ANSWER = ("output", "response", "completion", "answer")
CHAT = ("messages", "conversations")
# Several answers to one prompt. `ranked` stands for their order too: the best comes first.
LISTS = ("ranked", "answers", "responses", "completions")
# Two answers and which of them is better.
PAIR = ("chosen", "rejected")
VERSUS = ("first", "second", "verdict")
BESIDE = ("input", "system", "history", "tools")
RATINGS = ("ranks", "scores", "margin", "score_chosen", "score_rejected", "label")
KNOWN = frozenset((*PROMPT, *ANSWER, *CHAT, *LISTS, *PAIR, *VERSUS, *BESIDE, *RATINGS, "text"))
# A template over several columns gives a text.
TEXTS = frozenset((*PROMPT, *ANSWER, *PAIR, "first", "second", "input", "system", "text"))
# Columns of a file that may say which of two answers is better, without being asked for.
VERDICTS = ("verdict", "winner", "preference", "preferred", "better", "better_response_id", "label", "labels")
# How files name two answers whose order says nothing: output_1 and output_2, response_a and response_b, …
_STEMS = ("output", "response", "answer", "completion", "conversation")
_ENDS = (("1", "2"), ("a", "b"), ("A", "B"), ("0", "1"))
ANSWERS_OF_TWO = tuple(
    (f"{stem}{between}{one}", f"{stem}{between}{two}") for stem in _STEMS for between in ("_", "") for one, two in _ENDS
)
# Names that a file's own columns may have and mean the same.
GUESSED = KNOWN | {*VERDICTS, *(name for pair in ANSWERS_OF_TWO for name in pair)}
# `rows` says where in a file its rows are: reading the file is done with it.
OF_THE_FILE = frozenset(("rows",))


@dataclass(frozen=True)
class Column:
    """Where a part of a row comes from.

    Attributes:
        name: ours, mapped or not; reasons of bad rows have it.
        source: the file's name; of a template the template itself.
        mapped: the user asked for it, so that a number in it is text as well.
        pieces: of a template: literal text, and the column and form that follow it (none after the last).
    """

    name: str
    source: str
    mapped: bool = False
    pieces: tuple[tuple[str, str | None, str], ...] = ()

    @property
    def sources(self) -> frozenset[str]:
        """The file's columns that it reads."""
        if not self.pieces:
            return frozenset((self.source,))
        return frozenset(column for _, column, _ in self.pieces if column is not None)

    def of(self, row: Row) -> Any:
        """The value; text of a number or a boolean where the column is mapped to a text. Raises BadRow."""
        if not self.mapped:
            return row.get(self.source)
        if self.pieces:
            return "".join(
                literal + ("" if column is None else filled(row.get(column), column, form))
                for literal, column, form in self.pieces
            )
        value = row.get(self.source)
        return as_written(value, self.name) if self.name in TEXTS and isinstance(value, int | float) else value

    def text(self, row: Row) -> str:
        """The text. Raises BadRow where there is none."""
        return checked_text(self.of(row), self.name)


def as_written(value: float, name: str) -> str:
    """A number or a boolean as JSON writes it: ``8.0``, ``true``. (Zeros at the end of ``8.50`` are gone by then.)"""
    if not isinstance(value, bool) and isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"non-text {name}")
    try:
        return json.dumps(value)
    except ValueError:  # an integer of more digits than Python writes
        raise BadRow(f"non-text {name}") from None


def filled(value: Any, column: str, form: str) -> str:
    """A value in a template: a text or number as it stands, "" too; of a list a line for each, lettered where ``form``
    says `letters`; of a mapping a line `key. value` for each. Raises BadRow."""
    if isinstance(value, str):
        return value
    if isinstance(value, int | float):
        return as_written(value, column)
    if isinstance(value, Mapping) and value.keys() == {"text", "label"} and isinstance(value["text"], list):  # ARC's
        value = dict(zip(map(str, value["label"]), value["text"], strict=False))
    if isinstance(value, Mapping):
        return "\n".join(f"{key}. {_entry(item, column)}" for key, item in value.items())
    if isinstance(value, list):
        lines = [_entry(item, column) for item in value]
        if form == "letters":
            lines = [f"{chr(ord('A') + i)}. {line}" for i, line in enumerate(lines)]
        return "\n".join(lines)
    raise BadRow(f"null {column}" if value is None else f"non-text {column}")


def _entry(value: Any, column: str) -> str:
    if isinstance(value, str | int | float):
        return value if isinstance(value, str) else as_written(value, column)
    raise BadRow(f"non-text {column}")


@dataclass(frozen=True)
class Columns:
    """What the user's ``columns`` say.

    Attributes:
        mapped: our name → where it comes from.
        codes: what verdicts mean, as the user wrote it; None where that is to be seen from the values.
        no_verdict: the user said that no column is one.
    """

    mapped: Mapping[str, Column] = field(default_factory=dict)
    codes: Mapping[str, Any] | None = None
    no_verdict: bool = False

    @classmethod
    def of(cls, source: Source, found: Collection[str]) -> Columns:
        """Those of a source whose rows have the columns ``found``.

        Raises:
            UserError: they name what we or the file do not know.
        """
        mapped: dict[str, Column] = {}
        codes, no_verdict = None, False
        for ours, theirs in source.columns.items():
            if ours in OF_THE_FILE:
                continue
            if ours not in KNOWN:
                known = ", ".join(sorted(KNOWN))
                raise UserError(f"{source.path}: columns names '{ours}', which is none of {known}")
            if ours == "verdict" and theirs is None:
                no_verdict = True
                continue
            if ours == "verdict" and isinstance(theirs, Mapping):
                codes = _checked_codes(theirs, source)
                theirs = codes["column"]
            mapped[ours] = _column(ours, theirs, source, found)
        for slot in (PROMPT, CHAT):
            _refuse_two(slot, mapped, source)
        return cls(mapped, codes, no_verdict)

    @property
    def taken(self) -> frozenset[str]:
        """The file's columns that mapped ones read."""
        return frozenset(column for part in self.mapped.values() for column in part.sources)

    def available(self, present: Collection[str]) -> dict[str, Column]:
        """What rows with the columns ``present`` hold, by our names: what is mapped, else columns of these names."""
        here = {name: column for name, column in self.mapped.items() if column.sources <= set(present)}
        taken = self.taken
        for name in present:
            if name in GUESSED and name not in self.mapped and name not in taken:
                here[name] = Column(name, name)
        return here


def slot(names: Sequence[str], here: Mapping[str, Column]) -> Column | None:
    """The column of a part that may have several names: the mapped one, else the first."""
    columns = [here[name] for name in names if name in here]
    return next((column for column in columns if column.mapped), columns[0] if columns else None)


def _refuse_two(names: Sequence[str], mapped: Mapping[str, Column], source: Source) -> None:
    both = [name for name in names if name in mapped]
    if len(both) > 1:
        raise UserError(
            f"{source.path}: columns names both '{both[0]}' and '{both[1]}', which are one part of a row; keep one"
        )


def _column(ours: str, theirs: Any, source: Source, found: Collection[str]) -> Column:
    if not isinstance(theirs, str):
        raise UserError(f"{source.path}: columns.{ours} must be the name of a column, not {theirs!r}")
    if theirs in found:
        return Column(ours, theirs, mapped=True)
    pieces = tuple(_pieces(theirs, source, ours)) if "{" in theirs else ()
    names = [column for _, column, _ in pieces if column is not None]
    if not names:
        raise UserError(f"{source.path}: columns asks for '{theirs}', but the file has {_listed(found)}")
    if ours not in TEXTS:
        raise UserError(f"{source.path}: columns.{ours} cannot be a template over columns; it holds no text")
    for name in names:
        if name not in found:
            raise UserError(
                f"{source.path}: columns.{ours} has {{{name}}}, but the file has {_listed(found)} "
                "(a brace of the text itself is written twice)"
            )
    return Column(ours, theirs, True, pieces)


def _pieces(template: str, source: Source, ours: str) -> Iterator[tuple[str, str | None, str]]:
    try:
        for literal, name, form, conversion in Formatter().parse(template):
            if conversion or form not in (None, "", "letters"):
                raise ValueError(f"{{{name}}} may only be followed by :letters")
            yield literal, name, form or ""
    except ValueError as error:
        raise UserError(
            f"{source.path}: columns.{ours} is no template: {error} (a brace of the text itself is written twice)"
        ) from error


def _checked_codes(codes: Mapping[str, Any], source: Source) -> dict[str, Any]:
    known = {"column", "first", "second", "tie"}
    if not {"column", "first", "second"} <= codes.keys() or not codes.keys() <= known:
        raise UserError(
            f"{source.path}: columns.verdict must be a column's name or "
            f"{{column: NAME, first: …, second: …, tie: …}}, not {dict(codes)}"
        )
    return dict(codes)


def _listed(found: Collection[str]) -> str:
    return ", ".join(sorted(map(str, found)))
