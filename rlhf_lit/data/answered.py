"""Every row of a file that holds answers, whatever its shape and in the file's order, the unusable ones too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_lit.data import columns as c
from rlhf_lit.data import ranked_rows, reading, shapes
from rlhf_lit.data.columns import Column
from rlhf_lit.data.readers import MARGINS, TREE, RowReader
from rlhf_lit.data.rows import BadRow, Row, Turns, Unreadable
from rlhf_lit.data.shapes import RecordKind, Shape
from rlhf_lit.data.sources import Source
from rlhf_lit.data.trees import is_tree

Kind = Literal["single", "pair", "list"]
"""One answer to a row, a chosen and a rejected one, or several."""
KINDS: dict[str, Kind] = {"chat": "single", "answer": "single", "text": "single", "pair": "pair"}


@dataclass(frozen=True)
class Answered:
    """A prompt with its answers.

    Attributes:
        prompt: the turns before them; none of a raw text.
        answers: of a pair the chosen one, then the rejected one; of two with a verdict, in the file's order.
        ranks: of each answer, 0 for the best; None where the row does not say.
        row: number in its file, from 0.
        source: the row as the file has it; of a message tree, the list taken from it.
        tools: what the conversation may call.
    """

    prompt: Turns
    answers: tuple[Turns, ...]
    ranks: tuple[int, ...] | None
    row: int
    source: dict[str, Any]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Unusable:
    """A row without an answer that could be read, and why; ``row`` and ``source`` as in :class:`Answered`."""

    reason: str
    row: int
    source: dict[str, Any]


@dataclass(frozen=True)
class AnsweredFile:
    """A file's rows, one by one.

    Attributes:
        kind: what answers they hold; two answers with a verdict are a list, since they may tie.
        rows: in the file's order; a message tree stands for the ranked lists in it.
        unused: columns with text that took no part.
        notes: lines about how the file was read.
    """

    kind: Kind
    rows: list[Answered | Unusable]
    unused: set[str]
    notes: list[str]


def answered(rows: Sequence[Any], source: Source) -> AnsweredFile:
    """The rows of a file.

    Raises:
        UserError: columns of no known shape with an answer, or a mapping that does not fit.
    """
    reader = _reader(rows, source)
    kind = KINDS.get(reader.shape.form, "list")
    result: list[Answered | Unusable] = []
    unused: set[str] = set()
    for number, raw in enumerate(rows):
        unused |= reader.unused(raw)
        for part in reader.parts(raw):
            try:
                result += reader.read(part, number)
            except BadRow as reason:
                source_row = {} if isinstance(part, Unreadable) else {"text": part}
                result.append(Unusable(str(reason), number, part if isinstance(part, dict) else source_row))
    return AnsweredFile(kind, result, unused, reader.notes())


def _reader(rows: Sequence[Any], source: Source) -> RowReader[Answered]:
    first = shapes.first_rows(rows)
    others = [row for row in first if not is_tree(row)]
    if len(others) < len(first) and not any(isinstance(row, Mapping) for row in others):
        return RowReader(TREE, _build, trees=True)
    kind = RecordKind(
        "answers (prompt, question or instruction + completion, response, output or answer; messages; conversations; "
        "text; chosen + rejected; two answers with a verdict; prompt + answers or responses)",
        _candidates,
        needs={*c.PROMPT, *c.CHAT, *c.ANSWER, *c.PAIR, *c.VERSUS, *c.LISTS, *c.BESIDE, "ranks", "scores", "text"},
        beside=(*c.BESIDE, *MARGINS, "ranks", "scores"),
        word="with",
    )
    # A line of the scores is the file's own row: no column is put to it under another name.
    return RowReader(shapes.find_shape(others, source, kind), _build, trees=True)


def _candidates(here: Mapping[str, Column]) -> Iterator[Shape]:
    yield from shapes.two_answers(here)
    yield from shapes.lists(here)
    yield from shapes.chat(here)
    yield from shapes.answer(here)
    yield from shapes.raw_text(here)


def _build(shape: Shape, row: Row, number: int, source: dict[str, Any]) -> list[Answered]:
    answers: tuple[Turns, ...]
    ranks: tuple[int, ...] | None = None
    if shape.form == "pair":
        prompt, chosen, rejected = reading.preference(shape, row)
        reading.margin(shape, row, needed=False)  # refuses ratings that say the opposite
        answers, ranks = (chosen, rejected), (0, 1)
    elif shape.form == "versus":
        assert shape.verdict is not None
        prompt, answers = reading.two_answers(shape, row)
        winner = shape.verdict.winner(row)
        ranks = (0, 0) if winner is None else (winner, 1 - winner)
    elif shape.form == "list":
        prompt, answers = ranked_rows.answers(shape, row)
        if not answers:
            raise BadRow("no answers")
        if ranked_rows.is_ordered(shape):
            ranks = ranked_rows.ranks_and_ratings(shape, row, len(answers))[0]
    else:
        turns = reading.demonstration(shape, row)
        prompt, answers = turns[:-1], (turns[-1:],)
    return [Answered(prompt, answers, ranks, number, source, shape.tools(row))]
