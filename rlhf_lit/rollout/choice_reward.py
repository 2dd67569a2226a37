"""A reward for multiple choice: the option that a response names, by its letter or by its text."""

from __future__ import annotations

import re
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_lit.errors import UserError
from rlhf_lit.rollout.final_number import marked_answer
from rlhf_lit.rollout.verifiable import GoldReward, UnreadableGold, normalised, text_of

_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boxed)\b|[*_`$\"'“”‘’{}\\]")
_STATED = re.compile(r"\b(?:answer|choice|option)\b(?:\s+is\b|\s*[:=])+", re.IGNORECASE)
_LABEL = r"[A-Za-z]|[0-9]{1,2}"
# A letter that stands for an option: (B), B), B., B: and B alone; what follows is its text or a reason.
_NAMED = re.compile(
    rf"(?:(?i:option|choice|answer)\s+)?(?:\((?P<in>{_LABEL})\)|(?P<out>{_LABEL})(?=[).:,;]|\s|$))"
    r"[).:,;]*(?P<rest>.*)",
    re.DOTALL,
)
_ANOTHER = re.compile(
    rf"\((?P<in>{_LABEL})\)|(?:\b(?:or|and)\s+)\(?(?P<out>{_LABEL})(?=[).:,;]|\s|$)|^\(?(?P<next>{_LABEL})(?=[).:,;]|$)"
)


@dataclass(frozen=True)
class Options:
    """The options of a row.

    Attributes:
        labels: their letters, or what stands for them.
        texts: what each says, normalised; empty where the row does not tell.
        right: number of the right one.
    """

    labels: tuple[str, ...]
    texts: tuple[str, ...]
    right: int


class ChoiceReward(GoldReward[Options]):
    """Whether the response names the right option of its row, by its letter or by its text.

    The response's answer is what stands in its last ``\\boxed{…}``, behind its last ``####`` or "the answer is", else
    the whole response, else its last line, else its first. "B", "(b)", "B. Paris", "**B**" name option B, as "Paris"
    does.
    An answer that names two options, or a letter with another option's text, names none.

    Args:
        column: of the data row: the right option as a letter, a number counted from 0, or the option's text.
        options: column with the options: a list of texts, a mapping of letters to texts, or the pair of lists `text`
            and `label`; null where rows have letters alone.
        letters: what stands for the options of a list, in order.
        correct: score of the right option.
        wrong: score of another one, of several and of none.

    Raises:
        UserError: ``letters`` has two alike, or less than two.
    """

    def __init__(
        self,
        column: str = "answer",
        options: str | None = "options",
        letters: str = string.ascii_uppercase,
        correct: float = 1.0,
        wrong: float = 0.0,
    ) -> None:
        super().__init__(column, correct, wrong)
        if len(letters) < 2 or len(set(letters)) < len(letters):
            raise UserError(f"reward.letters: needs two or more different ones, not {letters!r}")
        self.options = options
        self.letters = letters

    def gold(self, row: dict[str, Any]) -> Options:
        labels, texts = self._options(row)
        value = self.value(row)
        text = text_of(value)
        if text is None:
            raise UnreadableGold(f"{self.column} names no option")
        candidates = set()
        if isinstance(value, int):
            if 0 <= value < len(labels):
                candidates.add(value)
        else:
            letter = text.strip().strip("().").upper()
            candidates.update(i for i, label in enumerate(labels) if label.upper() == letter)
        # A letter before a text: the options of "Which letter …?" may be letters in another order.
        if not candidates or isinstance(value, int):
            candidates.update(i for i, option in enumerate(texts) if option == _plain(text))
        if isinstance(value, str) and not candidates and text.strip().isdecimal() and int(text) < len(labels):
            candidates.add(int(text))  # of a CSV file
        if not candidates:
            raise UnreadableGold(f"{self.column} names no option")
        if len(candidates) > 1:
            raise UnreadableGold(f"{self.column} may mean several options")
        return Options(labels, texts, candidates.pop())

    def _options(self, row: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Labels and normalised texts. Raises UnreadableGold."""
        if self.options is None:
            return tuple(self.letters), ()
        if row.get(self.options) is None:
            raise UnreadableGold(f"no {self.options}")
        found = row[self.options]
        labels: list[Any] = list(self.letters)
        if isinstance(found, Mapping):
            # ARC's pair of lists, else letter → text
            pair = {"label", "text"} <= set(found)
            labels, found = (found["label"], found["text"]) if pair else (list(found), list(found.values()))
        if not isinstance(found, list | tuple) or not isinstance(labels, list | tuple):
            raise UnreadableGold(f"{self.options} is no list of options")
        # A mapping that was stored as a table has nulls where other rows have more options.
        both = zip(labels, found, strict=False)
        pairs = [(text_of(label), text_of(option)) for label, option in both if option is not None]
        texts = tuple(_plain(option) for _, option in pairs if option)
        names = tuple(label for label, _ in pairs if label)
        if len(found) > len(labels) or not len(pairs) == len(texts) == len(names) or len(pairs) < 2:
            raise UnreadableGold(f"{self.options} is no list of options")
        return names, texts

    def agree(self, responses: list[str], golds: list[Options]) -> list[bool]:
        return [chosen(response, gold) == gold.right for response, gold in zip(responses, golds, strict=True)]


def chosen(response: str, options: Options) -> int | None:
    """The number of the option that a response names; None where it names none, or several."""
    marked = marked_answer(response)
    if marked is not None:
        return _named(marked, options, stated=True)
    stated = list(_STATED.finditer(response))
    if stated:
        answer = response[stated[-1].end() :].strip().partition("\n")[0]
        return _named(answer, options, stated=True)
    lines = [line for line in response.splitlines() if line.strip()]
    for answer in (response, *lines[-1:], *lines[:1]):
        found = _named(answer, options, stated=False)
        if found is not None:
            return found
    return None


def _named(answer: str, options: Options, stated: bool) -> int | None:
    """The option that an answer's letter or text names.

    Args:
        answer: without what leads up to it.
        options: those of the row.
        stated: it was announced as the answer, so that words may follow a bare letter, or precede an option's text.
    """
    plain = _plain(answer)
    whole = [i for i, text in enumerate(options.texts) if text == plain]
    if len(whole) == 1:
        return whole[0]
    cleaned = _MARKUP.sub("", answer).strip()
    match = _NAMED.match(cleaned)
    label = match and (match["in"] or match["out"])
    i = _place(label, options.labels) if label else None
    if match is None or label is None or i is None:
        return _mentioned(plain, options) if stated else None
    rest = match["rest"].strip()
    bare = match["out"] is not None and cleaned[match.end("out") : match.end("out") + 1].isspace()
    if bare and rest and not stated and _plain(rest) not in options.texts:
        return None  # "A dog barks" begins with an article
    if bare and rest and label.islower():
        return _mentioned(plain, options) if stated else None
    for other in _ANOTHER.finditer(rest):
        if (j := _place(other[other.lastgroup or ""], options.labels)) is not None and j != i:
            return None
    text = _plain(rest)
    if text in options.texts and options.texts[i : i + 1] != (text,):
        return None  # the letter of one and the text of another
    return i


def _place(label: str, labels: tuple[str, ...]) -> int | None:
    return next((i for i, own in enumerate(labels) if own.upper() == label.upper()), None)


def _mentioned(plain: str, options: Options) -> int | None:
    """The one option whose text occurs in an answer, as whole words; of texts within one another, the longest."""
    found = [i for i, text in enumerate(options.texts) if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", plain)]
    longest = [i for i in found if not any(i != j and options.texts[i] in options.texts[j] for j in found)]
    return longest[0] if len(longest) == 1 else None


def _plain(text: str) -> str:
    """Case, white space, mark-up and punctuation at the ends put aside."""
    cleaned = normalised(_MARKUP.sub("", text), case=False, white_space=False, punctuation=True)
    return cleaned.strip(" .,;:!?")
