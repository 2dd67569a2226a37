"""Reward sources that need no model: a response is checked by a rule, against its row or by itself."""

from __future__ import annotations

import re
from decimal import Context, Decimal
from typing import Any, Literal

from torch import Tensor

from rlhf_lit.batches import Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.rollout.rewards import RewardSource, require_finite, score_tensor, shown

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    rf"""
    (?:(?<![A-Za-z0-9_)\]}}%.])(?P<minus>-))?    # the minus of 16-3 is no sign
    [$€£¥]?
    (?<![A-Za-z0-9_^/])                          # no part of a word (m2), an exponent or a date
    (?P<number>(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}(?![A-Za-z0-9]))?)
    (?:/(?P<denominator>[0-9]+(?:\.[0-9]+)?)(?![0-9/]))?
    """,
    re.VERBOSE,
)
_LATEX = (
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\{,\}"), ","),  # 1{,}080
    (re.compile(r"\\[,!]"), ""),  # 1,\!080 and 1\,080
    (re.compile(r"\\\$"), "$"),
)
# Enough digits that fractions of different value do not meet; no trap matters, as exponents have three digits.
_DIVISION = Context(prec=50)


def final_number(text: str) -> Decimal | None:
    r"""The number a text ends in, exactly.

    It is the one number on the line of the last ``####`` (GSM8K's mark) or between the braces of the last
    ``\boxed{…}``, whichever comes later; several different numbers there are no answer, so that hedging earns nothing.
    A text without either mark answers with its last number.

    ``1,080``, ``$18``, ``-5``, ``−5``, ``.5``, ``1e3`` and ``72.`` are numbers; a currency sign, a percent sign and a
    unit are left aside (``50%`` is 50). ``1/2`` and ``\frac{1}{2}`` are their quotient, to 50 digits; a mixed number
    (``1 1/2``) is two. The decimal mark is the point, the comma groups thousands.

    Returns:
        The number, or None where the text has no answer.
    """
    text = text.replace("−", "-")
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    marked = _marked(text)
    numbers = [_value(match) for match in _NUMBER.finditer(text if marked is None else marked)]
    if marked is not None and len(set(numbers)) > 1:
        return None
    return numbers[-1] if numbers else None


def _marked(text: str) -> str | None:
    """What stands in the place that a mark gives to the answer; None without a mark."""
    hashes, box = text.rfind("####"), text.rfind(r"\boxed{")
    if hashes < 0 and box < 0:
        return None
    if hashes > box:
        return text[hashes + len("####") :].strip().partition("\n")[0]
    inside = text[box + len(r"\boxed{") :]
    depth = 1
    for i, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return inside[:i]
    return inside


def _value(match: re.Match[str]) -> Decimal | None:
    number = Decimal((match["minus"] or "") + match["number"].replace(",", ""))
    if match["denominator"] is None:
        return number
    denominator = Decimal(match["denominator"])
    return _DIVISION.divide(number, denominator) if denominator else None


class RuleReward(RewardSource):
    """A source that judges each response by a rule."""

    def judge(self, sequences: Sequences, responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        """One number for each response; arguments as in ``RewardSource.forward``."""
        raise NotImplementedError

    def forward(
        self,
        sequences: Sequences,
        prompts: list[str],
        responses: list[str],
        rows: list[dict[str, Any]],
        budget: int,
    ) -> Tensor:
        scores = self.judge(sequences, responses, rows)
        return score_tensor(scores, responses, sequences.tokens.device, f"reward: {type(self).__name__}")


class NumberReward(RuleReward):
    """Whether the response ends in the number that its row names (see ``final_number``).

    Args:
        column: of the data row: the right answer, as a number or as a text that ends in it (GSM8K's own `answer` does).
        correct: score where the two numbers are equal.
        wrong: score where they differ, or the response has none.
    """

    def __init__(self, column: str = "answer", correct: float = 1.0, wrong: float = 0.0) -> None:
        super().__init__()
        require_finite("reward.correct", correct)
        require_finite("reward.wrong", wrong)
        self.column = column
        self.correct = correct
        self.wrong = wrong

    def judge(self, sequences: Sequences, responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        right = [self._answer(row, i) for i, row in enumerate(rows)]
        given = [final_number(response) for response in responses]
        return [self.correct if a == b else self.wrong for a, b in zip(given, right, strict=True)]

    def _answer(self, row: dict[str, Any], i: int) -> Decimal:
        """The right answer of row ``i``. Raises UserError where there is none."""
        if self.column not in row:
            raise UserError(f"reward.column: row {i} has no column {self.column!r}; it has {', '.join(row) or 'none'}")
        value = row[self.column]
        number = None
        if isinstance(value, str):
            number = final_number(value)
        elif isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            number = Decimal(str(value))  # as it was written, not as binary digits hold it
        if number is None or not number.is_finite():
            raise UserError(f"reward.column: {self.column!r} of row {i} holds no number: {shown(value)}")
        return number


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        problem = str(error)
    # Not within the except block: of a constructor's errors the command line shows those without a cause as one line.
    raise UserError(f"reward.pattern: {pattern!r} is no regular expression: {problem}")


class PatternReward(RuleReward):
    """Whether a regular expression (Python's `re`) is found in the response.

    Args:
        pattern: the expression; `(?s)` at its start lets a dot match line ends, `(?i)` ignores case.
        matched: score where it is found.
        unmatched: score where it is not.
        whole: the expression must describe the whole response, not a part of it.
    """

    def __init__(self, pattern: str, matched: float = 1.0, unmatched: float = 0.0, whole: bool = False) -> None:
        super().__init__()
        self.pattern = _compiled(pattern)
        require_finite("reward.matched", matched)
        require_finite("reward.unmatched", unmatched)
        self.matched = matched
        self.unmatched = unmatched
        self.whole = whole

    def judge(self, sequences: Sequences, responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        find = self.pattern.fullmatch if self.whole else self.pattern.search
        return [self.matched if find(response) else self.unmatched for response in responses]


class LengthReward(RuleReward):
    """−per_unit · |length − target|, or −per_unit · max(0, length − target) where only the excess is penalised.

    Args:
        target: the length aimed at.
        unit: `tokens` of the response, its EOS included, or `characters` of its text.
        per_unit: what each token or character off the target costs.
        penalise: `both` too long and too short, or only the `excess`.
    """

    def __init__(
        self,
        target: int,
        unit: Literal["tokens", "characters"] = "tokens",
        per_unit: float = 1.0,
        penalise: Literal["both", "excess"] = "both",
    ) -> None:
        super().__init__()
        if target < 0:
            raise UserError(f"reward.target must be at least 0, not {target}")
        if not per_unit > 0:
            raise UserError(
                f"reward.per_unit must be greater than 0, not {per_unit}; "
                "a negative weight in a RewardSum turns the reward around"
            )
        require_finite("reward.per_unit", per_unit)
        self.target = target
        self.unit = unit
        self.per_unit = per_unit
        self.penalise = penalise

    def judge(self, sequences: Sequences, responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        tokens = self.unit == "tokens"
        lengths = sequences.mask.sum(-1).tolist() if tokens else [len(response) for response in responses]
        beyond = [length - self.target for length in lengths]
        off = [abs(excess) if self.penalise == "both" else max(0, excess) for excess in beyond]
        return [-self.per_unit * distance for distance in off]
