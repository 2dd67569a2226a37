"""What a row is made of (turns and values), the records it becomes, and why a row cannot be used.

Text is kept as it stands, white space included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

# The largest number that a float32 holds: margins and ratings become such.
LARGEST = 3.4e38
LABELS = {
    **dict.fromkeys((True, "true", "1", "1.0", "yes", "good", "desirable"), True),
    **dict.fromkeys((False, "false", "0", "0.0", "-1", "-1.0", -1, "no", "bad", "undesirable"), False),
}


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``; ``text`` of raw text, a conversation of that one turn.
        content: its text; "" of an assistant that calls tools and says nothing.
        tool_calls: what an assistant calls, as the file has it, but for arguments that are JSON in a text: these are
            the object itself, which chat templates write as JSON again.
        supervised: whether an assistant turn is learned.
        extra: what else a chat template may read, e.g. ``name``, ``tool_call_id``, ``reasoning_content``.
    """

    role: str
    content: str
    tool_calls: tuple[Any, ...] = field(default=(), hash=False)
    supervised: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


Turns = tuple[Message, ...]
Row = Mapping[str, Any]

OnBadRow = Literal["skip", "error"]
"""What a bad row leads to: it is counted and left out, or the run ends."""


@dataclass(frozen=True)
class Demonstration:
    """A conversation to imitate.

    Attributes:
        messages: the turns; the last is the assistant's. Raw text is one turn of the role ``text``.
        row: number in its file, from 0.
        source: the row as the file has it, and what it holds under our names for columns that the user mapped.
        tools: what its conversation may call.
    """

    messages: Turns
    row: int
    source: dict[str, Any]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt.

    Attributes:
        prompt: the turns before the answers.
        chosen, rejected: the answers: one assistant turn each, or more where the file says so.
        margin: how much better the chosen one was rated, 0 where the row does not say.
        row: number in its file, from 0.
        source, tools: as in :class:`Demonstration`.
    """

    prompt: Turns
    chosen: Turns
    rejected: Turns
    margin: float
    row: int
    source: dict[str, Any]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Judged:
    """One answer to a prompt, judged good or bad.

    Attributes:
        prompt: the turns before the answer.
        response: the answer: one assistant turn, or more where the file says so.
        desirable: whether it is a good one.
        row: number in its file, from 0.
        source, tools: as in :class:`Demonstration`.
    """

    prompt: Turns
    response: Turns
    desirable: bool
    row: int
    source: dict[str, Any]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Ranking:
    """Several answers to one prompt, ordered.

    Attributes:
        prompt: the turns before the answers.
        answers: each one assistant turn, or more where the file says so.
        ranks: of each answer, 0 for the best; equal where they tie.
        ratings: of each answer, differences of which are margins; 0 where the file has ranks alone.
        row: number in its file, from 0.
        source: as in :class:`Demonstration`; of a message tree, the list taken from it.
        tools: as in :class:`Demonstration`.
    """

    prompt: Turns
    answers: tuple[Turns, ...]
    ranks: tuple[int, ...]
    ratings: tuple[float, ...]
    row: int
    source: dict[str, Any]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered; ``row``, ``source`` and ``tools`` as in :class:`Demonstration`."""

    prompt: Turns
    row: int
    source: dict[str, Any]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Unreadable:
    """Stands in the place of a row that could not be parsed; it is a bad row for the reason given."""

    reason: str


class BadRow(Exception):
    """A row that cannot be used; the text is the short reason it is counted under."""


class Tie(BadRow):
    """Two answers neither of which won. Counted like a bad row, but nothing is wrong with it: it never ends a run."""


def checked_text(value: Any, name: str) -> str:
    """A value that must be text. Raises BadRow where it is null, not text, blank, or cannot be written as UTF-8."""
    if not isinstance(value, str):
        raise BadRow(f"null {name}" if value is None else f"non-text {name}")
    if not value or value.isspace():
        raise BadRow(f"empty {name}")
    if not value.isascii():
        check_characters(value, name)
    return value


def optional_text(value: Any, name: str) -> str:
    """A value's text, "" where it is null or blank. Raises BadRow where it is not text."""
    if value is None or (isinstance(value, str) and (not value or value.isspace())):
        return ""
    return checked_text(value, name)


def check_characters(value: str, name: str) -> None:
    """Refuse half of a surrogate pair, which no tokenizer takes. Raises BadRow."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise BadRow(f"lone surrogate in {name}") from None


def label(value: Any) -> bool:
    """A judgement: true or false, 1 or 0 (or -1), or a word such as yes, bad, desirable. Raises BadRow."""
    if value is None:
        raise BadRow("null label")
    word = value.strip().lower() if isinstance(value, str) else value
    found = LABELS.get(word) if isinstance(word, str | int | float) else None
    if found is None:
        raise BadRow("non-boolean label")
    return found


def number(value: Any, name: str) -> float:
    """A number that a float32 holds, as text too. Raises BadRow."""
    try:
        found = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not abs(found) <= LARGEST:
        raise BadRow(f"non-number {name}")
    return found
