"""Which of two answers won, however a file writes it: 1 or 2, 0 or 1, A or B, a winner's name, a tie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lit.data.columns import Column
from rlhf_lit.data.rows import BadRow, Row, Tie
from rlhf_lit.errors import UserError

TIES = frozenset(
    ("tie", "ties", "tied", "draw", "equal", "same", "both", "neither", "tie (bothbad)", "bothbad", "both bad")
)
# Pairs of words that can only mean the first and the second answer.
WORDS = (("a", "b"), ("first", "second"), ("left", "right"), ("model_a", "model_b"), ("model_1", "model_2"))
NUMBERS = (("1", "2"), ("0", "1"))
# Columns whose values are the names of who gave the two answers (LMSYS's arena).
GIVERS = ("model_a", "model_b")
SHOWN = 6
STRAY = 0.01  # so many rows may have words of no known meaning; each is a bad row


@dataclass(frozen=True)
class Verdict:
    """Reads which of two answers won.

    Attributes:
        column: where the verdict is.
        first, second, tie: values that name the first answer, the second one, or none of them.
        by_giver: a verdict may also be the value of the row's ``model_a`` or ``model_b``.
    """

    column: Column
    first: frozenset[str]
    second: frozenset[str]
    tie: frozenset[str] = TIES
    by_giver: bool = False

    def winner(self, row: Row) -> int | None:
        """0 or 1, the place of the better answer; None where they tie.

        Raises:
            BadRow: no verdict, or an unknown one.
        """
        value = self.column.of(row)
        if value is None or value == "":
            raise BadRow(f"null {self.column.name}")
        word = _word(value)
        if self.by_giver and (place := _giver(row, word)) is not None:
            return place
        if word in self.first:
            return 0
        if word in self.second:
            return 1
        if word in self.tie:
            return None
        raise BadRow(f"unknown {self.column.name}")

    def order(self, row: Row) -> tuple[int, int]:
        """The places of the winner and of the loser. Raises Tie, and BadRow as :meth:`winner`."""
        winner = self.winner(row)
        if winner is None:
            raise Tie("tie")
        return winner, 1 - winner

    def __str__(self) -> str:
        """How the values are read, in words."""
        if self.by_giver:
            return f"the name in {' or '.join(GIVERS)} wins"
        return f"{' or '.join(sorted(self.first))} is the first answer, {' or '.join(sorted(self.second))} the second"


def verdict_by(column: Column, codes: Mapping[str, Any], path: str) -> Verdict:
    """As the user's ``columns.verdict`` says.

    Raises:
        UserError: one value has two meanings.
    """
    sets = [frozenset(map(_word, _several(codes.get(name)))) for name in ("first", "second", "tie")]
    for i, one in enumerate(sets):
        for other in sets[i + 1 :]:
            if both := one & other:
                raise UserError(f"{path}: columns.verdict: {sorted(both)[0]} has two meanings")
    first, second, tie = sets
    return Verdict(column, first, second, tie | (TIES - first - second))


def verdict_of(column: Column, answers: tuple[Column, Column], rows: Sequence[Row], path: str, mapped: bool) -> Verdict:
    """As the values of a file's first rows say.

    0 and 1 are places where the answers' names or the verdict's own say so (response_0, better_response_id), or where
    the user has named the column: elsewhere 1 as often means that the first one is better.

    Args:
        column: where the verdict is.
        answers: the two answers' columns.
        rows: the first ones.
        path: of the file, for the message.
        mapped: the user has named the column.

    Raises:
        UserError: the values do not tell.
    """
    found: Counter[str] = Counter()
    givers = 0
    for row in rows:
        value = row.get(column.source)
        if value is None or value == "":
            continue
        word = _word(value)
        if _giver(row, word) is None:
            found[word] += 1
        else:
            givers += 1
    said = {word: count for word, count in found.items() if word not in TIES}
    total = found.total() + givers
    if givers and sum(said.values()) <= STRAY * total:
        return Verdict(column, frozenset(), frozenset(), by_giver=True)
    if "1.5" in said and _fits({word: count for word, count in said.items() if word != "1.5"}, NUMBERS[0], 0):
        return Verdict(column, frozenset("1"), frozenset("2"), TIES | {"1.5"})  # AlpacaEval's tie
    one, two = (answer.source.lower() for answer in answers)
    from_zero = (one[-1:], two[-1:]) == ("0", "1")
    numbers = [*NUMBERS] if mapped or column.source.endswith(("_id", "_idx", "index")) else [NUMBERS[0]]
    pairs = [(one, two), *WORDS, *(reversed(NUMBERS) if from_zero else numbers)]
    fitting = [pair for pair in pairs if _fits(said, pair, total)]
    either = said.keys() <= {"0"} or said.keys() <= {"1"}  # of 0 and 1 as well as of 1 and 2
    if not fitting or (either and not from_zero):
        shown = [*said][:SHOWN] or ["ties alone"]
        values = ", ".join(shown) + (", …" if len(said) > SHOWN else "")
        raise UserError(
            f"{path}: the values of '{column.source}' ({values}) do not say which of '{answers[0].source}' and "
            f"'{answers[1].source}' won; say it, with the file's own values, as in "
            f"columns.verdict: {{column: {column.source}, first: 1, second: 2, tie: 0}}"
        )
    first, second = (frozenset((word,)) for word in fitting[0])
    return Verdict(column, first, second)


def _fits(said: Mapping[str, int], pair: Sequence[str], total: int) -> bool:
    """Whether the values are those of the pair, but for a few words."""
    strange = {word: count for word, count in said.items() if word not in pair and count}
    if any(word in said for word in pair) and not any(map(_is_number, strange)):
        return sum(strange.values()) <= STRAY * total
    return False


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _word(value: Any) -> str:
    """A verdict as it is compared: lower case, and 2.0 as 2."""
    if isinstance(value, bool):
        return str(value).lower()
    word = str(value).strip().lower()
    return word[:-2] if word.endswith(".0") and _is_number(word) else word


def _giver(row: Row, word: str) -> int | None:
    """The place of the answer whose giver has this name; None where it is neither's, or both's."""
    places = [i for i, name in enumerate(GIVERS) if isinstance(row.get(name), str) and _word(row[name]) == word]
    return places[0] if len(places) == 1 else None


def _several(value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    return value if isinstance(value, list | tuple) else (value,)
