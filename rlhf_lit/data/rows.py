"""What a row is made of: turns and values, and why a row cannot be used.

Text is kept as it stands, white space included.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

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
