"""A reward for mathematics: whether a response's answer equals the gold one, as math-verify decides."""

from __future__ import annotations

import re
from typing import Any

from rlhf_lit.rollout.judges import Judges
from rlhf_lit.rollout.killable import KillablePool
from rlhf_lit.rollout.verifiable import GoldReward, UnreadableGold, text_of

GOLD_SECONDS = 60.0
"""How long reading one gold answer may take: so long that ranks and machines agree on which can be read."""
_DIGITS = re.compile(r"-?[0-9]+(\.[0-9]+)?")


class MathReward(GoldReward[str]):
    r"""Whether the response's answer and the row's are the same mathematics.

    Fractions, roots, intervals, sets, tuples, matrices, equations, percentages and units are read from LaTeX or plain
    text, and compared by `math-verify`: ½, 0.5 and ``\frac12`` are equal, as are ``3\sqrt{13}`` and ``\sqrt{117}``, and
    {1, 2} and {2, 1}; (3, 4] and (3, 4) are not. The response's answer is that of its last ``\boxed{…}`` or ``####``,
    else the last formula or number in it. A gold answer is a number, a formula (`$` around it or not), or a text with
    one of these marks.

    Args:
        column: of the data row, with the gold answer.
        correct: score where the two are equal.
        wrong: score where they are not, the response has no answer, or the comparison took too long.
        seconds: how long one comparison may take; it runs in a process that is then killed. Such comparisons are said
            at the 1st, 10th, 100th, ….
        workers: processes that compare; null is one for each core, four at most.

    Raises:
        UserError: a limit or a number of workers that is not positive.
    """

    def __init__(
        self,
        column: str = "answer",
        correct: float = 1.0,
        wrong: float = 0.0,
        seconds: float = 5.0,
        workers: int | None = None,
    ) -> None:
        super().__init__(column, correct, wrong)
        self.judges = Judges("rlhf_lit.rollout.math_equality:equal", "MathReward", seconds, workers)

    def gold(self, row: dict[str, Any]) -> str:
        value = self.value(row)
        text = text_of(value)
        if text is None or not text.strip() or text in ("nan", "inf", "-inf"):
            raise UnreadableGold(f"no mathematics in {self.column}")
        return text

    def unreadable(self, row: dict[str, Any]) -> str | None:
        return self.all_unreadable([row])[0]

    def all_unreadable(self, rows: list[dict[str, Any]]) -> list[str | None]:
        reasons = [super(MathReward, self).unreadable(row) for row in rows]
        golds = {self.gold(row) for row, reason in zip(rows, reasons, strict=True) if reason is None}
        parsed = sorted(gold for gold in golds if not _DIGITS.fullmatch(gold))
        readers = KillablePool("rlhf_lit.rollout.math_equality:readable", self.judges.pool.size)
        results = readers.map([[gold] for gold in parsed], GOLD_SECONDS)
        readers.close()
        none = {gold for gold, result in zip(parsed, results, strict=True) if result is not True}
        return [
            reason or (f"no mathematics in {self.column}" if self.gold(row) in none else None)
            for row, reason in zip(rows, reasons, strict=True)
        ]

    def agree(self, responses: list[str], golds: list[str]) -> list[bool]:
        return [result is True for result in self.judges(responses, golds)]
