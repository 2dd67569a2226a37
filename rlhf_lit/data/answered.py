"""Every row of a file that holds answers, whatever its shape and in the file's order, the unusable ones too."""

from __future__ import annotations

from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_lit.data import ranked_rows
from rlhf_lit.data import rows as row_shapes
from rlhf_lit.data.records import check_mapping, columns_of, renamed, without_trees
from rlhf_lit.data.rows import BadRow, Turns
from rlhf_lit.data.sources import Source
from rlhf_lit.errors import UserError

Kind = Literal["single", "pair", "list"]
"""One answer to a row, a chosen and a rejected one, or several."""


@dataclass(frozen=True)
class Answered:
    """A prompt with its answers.

    Attributes:
        prompt: the turns before them; none of a plain text.
        answers: of a pair the chosen one, then the rejected one.
        ranks: of each answer, 0 for the best; None where the row does not say.
        row: number in its file, from 0.
        source: the row as the file has it; of a message tree, the list taken from it.
    """

    prompt: Turns
    answers: tuple[Turns, ...]
    ranks: tuple[int, ...] | None
    row: int
    source: dict[str, Any]


@dataclass(frozen=True)
class Unusable:
    """A row without an answer that could be read, and why; ``row`` and ``source`` as in :class:`Answered`."""

    reason: str
    row: int
    source: dict[str, Any]


def answered(rows: Sequence[Any], source: Source) -> tuple[Kind, list[Answered | Unusable]]:
    """The rows of a file, one by one; a message tree stands for the ranked lists in it.

    Raises:
        UserError: columns of no known shape with an answer, or a mapping that does not fit.
    """
    taken, numbers = without_trees(rows)
    found, columns = columns_of(taken, source)
    check_mapping(source, found)
    kind = _kind(columns)
    if kind is None:
        raise UserError(
            f"{source.path}: columns {', '.join(sorted(map(str, found))) or '(none)'} have no known shape with answers "
            "(prompt, question or instruction + completion, response, output or answer; messages; conversations; text; "
            "chosen + rejected; prompt + answers or responses); name them in `columns`, e.g. {prompt: question}"
        )
    result: list[Answered | Unusable] = []
    for number, raw in zip(numbers, taken, strict=True):
        try:
            if not isinstance(raw, dict):
                raise BadRow("malformed")
            prompt, answers, ranks = _read(renamed(raw, source.columns), columns, kind)
            result.append(Answered(prompt, answers, ranks, number, raw))
        except BadRow as reason:
            result.append(Unusable(str(reason), number, raw if isinstance(raw, dict) else {"text": raw}))
    return kind, result


def _kind(columns: Set[str]) -> Kind | None:
    prompted = bool(columns & {*row_shapes.PROMPT_COLUMNS, *row_shapes.CHAT_COLUMNS})
    if columns >= {"chosen", "rejected"}:
        return "pair"
    if prompted and columns & {*row_shapes.LIST_COLUMNS}:
        return "list"
    if columns & {*row_shapes.CHAT_COLUMNS, "text"} or (prompted and columns & {*row_shapes.ANSWER_COLUMNS}):
        return "single"
    return None


def _read(
    row: row_shapes.Row, columns: Set[str], kind: Kind
) -> tuple[Turns, tuple[Turns, ...], tuple[int, ...] | None]:
    if kind == "pair":
        prompt, chosen, rejected = row_shapes.preference(row, columns)
        return prompt, (chosen, rejected), (0, 1)
    if kind == "single":
        turns = row_shapes.demonstration(row, columns)
        return turns[:-1], (turns[-1:],), None
    prompt, answers = ranked_rows.answers(row, columns)
    if not answers:
        raise BadRow("no answers")
    ranks = ranked_rows.ranks_and_ratings(row, columns, len(answers))[0] if ranked_rows.is_ranked(columns) else None
    return prompt, answers, ranks
