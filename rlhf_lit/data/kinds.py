"""Validated records from raw rows: demonstrations, preference pairs and prompts, whatever file they came from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from rlhf_lit.data.rows import Message

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

    messages: tuple[Message, ...]
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

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
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

    prompt: tuple[Message, ...]
    response: tuple[Message, ...]
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

    prompt: tuple[Message, ...]
    answers: tuple[tuple[Message, ...], ...]
    ranks: tuple[int, ...]
    ratings: tuple[float, ...]
    row: int
    source: dict[str, Any]
    tools: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered; ``row``, ``source`` and ``tools`` as in :class:`Demonstration`."""

    prompt: tuple[Message, ...]
    row: int
    source: dict[str, Any]
    tools: tuple[Any, ...] = ()
