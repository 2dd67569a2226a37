"""Reward sources that need no model: a response is checked by a rule, against its row or by itself.

Those that stand on a library are files of their own: ``math_reward.py``, ``instruction_reward.py``,
``reasoning_gym.py``; multiple choice is ``choice_reward.py``.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Sequence
from decimal import Decimal
from typing import Any, Generic, Literal, TypeVar

from torch import Tensor

from rlhf_lit.batches import Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.rollout.final_number import final_number, gold_number
from rlhf_lit.rollout.rewards import RewardSource, require_finite, score_tensor, shown

Gold = TypeVar("Gold")


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


class UnreadableGold(Exception):
    """A row whose gold answer cannot be read; the text is the short reason it is counted under."""


class GoldReward(RuleReward, Generic[Gold]):
    """A source that holds each response against the gold answer of its row.

    Args:
        column: of the data row, as the file or `data.train.columns` names it.
        correct: score of a right response.
        wrong: score of any other.
    """

    def __init__(self, column: str = "answer", correct: float = 1.0, wrong: float = 0.0) -> None:
        super().__init__()
        require_finite("reward.correct", correct)
        require_finite("reward.wrong", wrong)
        self.column = column
        self.correct = correct
        self.wrong = wrong

    def gold(self, row: dict[str, Any]) -> Gold:
        """The gold answer of a row. Raises UnreadableGold."""
        raise NotImplementedError

    def agree(self, responses: list[str], golds: list[Gold]) -> Sequence[bool]:
        """Of each response, whether it is right."""
        raise NotImplementedError

    def value(self, row: dict[str, Any]) -> Any:
        """What the row's column holds. Raises UnreadableGold where the row has none, or null."""
        if self.column not in row:
            raise UnreadableGold(f"no column {self.column!r}")
        if row[self.column] is None:
            raise UnreadableGold(f"null {self.column}")
        return row[self.column]

    def unreadable(self, row: dict[str, Any]) -> str | None:
        try:
            self.gold(row)
        except UnreadableGold as reason:
            return str(reason)
        return None

    def judge(self, sequences: Sequences, responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        golds = [self._gold_or_stop(row) for row in rows]
        return [self.correct if right else self.wrong for right in self.agree(responses, golds)]

    def _gold_or_stop(self, row: dict[str, Any]) -> Gold:
        """As ``gold``, of rows that no data module has asked ``unreadable`` about. Raises UserError."""
        try:
            return self.gold(row)
        except UnreadableGold as reason:
            held = shown(row[self.column]) if self.column in row else f"columns {', '.join(row) or 'none'}"
            raise UserError(f"reward.column: {reason}; a row has {held}") from reason


class NumberReward(GoldReward[Decimal]):
    """Whether the response ends in the number that its row names (see ``final_number``).

    The column holds the right answer as a number, or as a text that is plainly one at its end (``gold_number``; GSM8K's
    own `answer` is). Other golds (``3\\sqrt{13}``, ``(3,4]``) are MathReward's.
    """

    def gold(self, row: dict[str, Any]) -> Decimal:
        value = self.value(row)
        number = None
        if isinstance(value, str):
            number = gold_number(value)
        elif isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            number = Decimal(str(value))  # as it was written, not as binary digits hold it
        if number is None or not number.is_finite():
            raise UnreadableGold(f"{self.column} is not plainly a number")
        return number

    def agree(self, responses: list[str], golds: list[Decimal]) -> list[bool]:
        return [final_number(response) == gold for response, gold in zip(responses, golds, strict=True)]


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalised(text: str, case: bool, white_space: bool, punctuation: bool) -> str:
    """A text in Unicode's composed form, without the differences that are not to count.

    Args:
        text: any text.
        case: whether case counts.
        white_space: whether the amount and kind of white space counts; that around the text never does.
        punctuation: whether ASCII punctuation counts.
    """
    text = unicodedata.normalize("NFC", text)
    if not case:
        text = text.casefold()
    if not punctuation:
        text = text.translate(_PUNCTUATION)
    return text.strip() if white_space else " ".join(text.split())


def text_of(value: Any) -> str | None:
    """A cell as the text that a response would write: numbers as they print; None of lists, tables and truth values."""
    if isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float | Decimal) and not isinstance(value, bool) else None


class ExactMatch(GoldReward[list[str]]):
    """Whether the response is the row's answer, and nothing else.

    Args:
        column: of the data row: a text or a number, or a list of them any of which is right.
        case: whether case counts.
        white_space: whether the amount of white space counts; that at either end never does.
        punctuation: whether ASCII punctuation counts.
        correct: score of a right response.
        wrong: score of any other.
    """

    def __init__(
        self,
        column: str = "answer",
        case: bool = True,
        white_space: bool = False,
        punctuation: bool = True,
        correct: float = 1.0,
        wrong: float = 0.0,
    ) -> None:
        super().__init__(column, correct, wrong)
        self.case = case
        self.white_space = white_space
        self.punctuation = punctuation

    def gold(self, row: dict[str, Any]) -> list[str]:
        value = self.value(row)
        golds = [text_of(item) for item in (value if isinstance(value, list | tuple) else [value])]
        found = [self._normalised(gold) for gold in golds if gold is not None]
        if not found or len(found) < len(golds):
            raise UnreadableGold(f"{self.column} is no text")
        if not all(found):
            raise UnreadableGold(f"nothing to match in {self.column}")
        return found

    def agree(self, responses: list[str], golds: list[list[str]]) -> list[bool]:
        return [self._normalised(response) in gold for response, gold in zip(responses, golds, strict=True)]

    def _normalised(self, text: str) -> str:
        return normalised(text, self.case, self.white_space, self.punctuation)


class ContainsAll(GoldReward[list[str]]):
    """Whether the response contains every one of several strings.

    Args:
        strings: what every response has to contain; null takes the row's column.
        column: of the data row, where ``strings`` is null: a string, or a list of them.
        case: whether case counts.
        correct: score where all are there.
        wrong: score where one is not.

    Raises:
        UserError: ``strings`` is empty, or has an empty one.
    """

    def __init__(
        self,
        strings: list[str] | None = None,
        column: str = "answer",
        case: bool = True,
        correct: float = 1.0,
        wrong: float = 0.0,
    ) -> None:
        super().__init__(column, correct, wrong)
        if strings is not None and not all(strings or [""]):
            raise UserError("reward.strings: name at least one string, none of them empty; null takes the row's column")
        self.strings = strings
        self.case = case

    def gold(self, row: dict[str, Any]) -> list[str]:
        if self.strings is not None:
            return [self._folded(text) for text in self.strings]
        value = self.value(row)
        texts = [text_of(item) for item in (value if isinstance(value, list | tuple) else [value])]
        found = [self._folded(text) for text in texts if text]
        if not found or len(found) < len(texts):
            raise UnreadableGold(f"{self.column} is no list of strings")
        return found

    def agree(self, responses: list[str], golds: list[list[str]]) -> list[bool]:
        texts = [self._folded(response) for response in responses]
        return [all(part in text for part in gold) for text, gold in zip(texts, golds, strict=True)]

    def _folded(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text)
        return text if self.case else text.casefold()


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        problem = str(error)
    # Not within the except block: of a constructor's errors the command line shows those without a cause as one line.
    raise UserError(f"reward.pattern: {pattern!r} is no regular expression: {problem}")


class RegexReward(RuleReward):
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
