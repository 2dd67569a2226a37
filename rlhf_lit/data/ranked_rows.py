"""One row of a file with several answers to one prompt: which they are, in what order, and how they were rated."""

from __future__ import annotations

import json
from collections.abc import Mapping, Set
from itertools import combinations
from typing import Any

from rlhf_lit.data.rows import (
    LIST_COLUMNS,
    BadRow,
    Row,
    Turns,
    check_prompt,
    has_prompt,
    margin,
    number,
    preference,
    prompt_turns,
    turns_of,
)


def is_ranked(columns: Set[str]) -> bool:
    """Whether rows of these columns hold a prompt with a list of answers, and say which are better."""
    ordered = columns & {"ranked", "completions"} or (
        columns & {"answers", "responses"} and columns & {"ranks", "scores"}
    )
    return bool(ordered) and has_prompt(columns)


def answers(row: Row, columns: Set[str]) -> tuple[Turns, tuple[Turns, ...]]:
    """The prompt and its answers, from one of ``LIST_COLUMNS``. Raises BadRow."""
    column = next(c for c in LIST_COLUMNS if c in columns)
    given = _list(row, column)
    if column == "completions":  # UltraFeedback's
        if not all(isinstance(item, Mapping) for item in given):
            raise BadRow("completions are no records")
        given = [item.get("response") for item in given]
    prompt = prompt_turns(row, columns)
    check_prompt(prompt)
    found = tuple(turns_of({column: item}, column, "assistant") for item in given)
    for turns in found:
        if turns[0].role != "assistant" or turns[-1].role != "assistant":
            raise BadRow("no final assistant turn")
        if any(not turn.content.strip() for turn in turns if turn.role == "assistant"):
            raise BadRow(f"empty {column}")
    return prompt, found


def ranking(row: Row, columns: Set[str]) -> tuple[Turns, tuple[Turns, ...], tuple[int, ...], tuple[float, ...]]:
    """Prompt, answers, the rank of each (0 is the best, ties are equal), and its rating, whose differences are margins.

    A preference pair is a list of two.

    Raises:
        BadRow: as the name of the reason says.
    """
    if not is_ranked(columns):
        prompt, chosen, rejected = preference(row, columns)
        return prompt, (chosen, rejected), (0, 1), (margin(row, columns), 0.0)
    prompt, found = answers(row, columns)
    if len(found) < 2:
        raise BadRow("fewer than two answers")
    ranks, ratings = ranks_and_ratings(row, columns, len(found))
    if not any(ranks):
        raise BadRow("all answers of the same rank")
    for i, j in combinations(range(len(found)), 2):
        if found[i] == found[j] and ranks[i] != ranks[j]:
            raise BadRow("the same answer at two ranks")
    return prompt, found, ranks, ratings


def ranks_and_ratings(row: Row, columns: Set[str], count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The rank of each of ``count`` answers and its rating, as in :func:`ranking`. Raises BadRow."""
    quality, ratings = _quality(row, columns, count)
    for i, j in combinations(range(count), 2):
        if (quality[i] - quality[j]) * (ratings[i] - ratings[j]) < 0:
            raise BadRow("ranks and scores disagree")
    order = sorted(set(quality), reverse=True)
    return tuple(order.index(value) for value in quality), ratings


def _quality(row: Row, columns: Set[str], count: int) -> tuple[list[float], tuple[float, ...]]:
    """Of each answer, what orders them (higher is better), and its rating (0 where there are ranks alone)."""
    scores: list[float] | None = None
    if "completions" in columns:
        scores = [number(item, "overall_score") for item in _list(row, "completions")]
    elif "scores" in columns:
        scores = _numbers(row, "scores", count)
    if "ranks" in columns:
        quality = [-rank for rank in _numbers(row, "ranks", count)]
    elif "ranked" in columns:
        quality = [-float(place) for place in range(count)]
    else:
        assert scores is not None, "is_ranked() says so"
        quality = scores
    return quality, tuple(scores) if scores is not None else (0.0,) * count


def _list(row: Row, column: str) -> list[Any]:
    value = row.get(column)
    if value is None:
        raise BadRow(f"null {column}")
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a CSV file
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            raise BadRow(f"non-list {column}") from None
    if not isinstance(value, list):
        raise BadRow(f"non-list {column}")
    return value


def _numbers(row: Row, column: str, count: int) -> list[float]:
    """One finite number for each answer."""
    values = [number({column: value}, column) for value in _list(row, column)]
    if len(values) != count:
        raise BadRow(f"not as many {column} as answers")
    return values


def is_tree(row: Any) -> bool:
    """Whether a row is a message tree of OpenAssistant: its prompt is a message with replies."""
    return isinstance(row, Mapping) and isinstance(row.get("prompt"), Mapping) and "replies" in row["prompt"]


def lists_of_tree(row: Row) -> list[dict[str, Any]]:
    """A row ``{prompt, answers, ranks}`` for each message of a tree to which two or more ranked answers were given.

    The prompt is the path of messages that leads to them. A reply without a rank is left out. Where there is no such
    message, one row without answers is returned, so that the tree is counted.
    """
    found: list[dict[str, Any]] = []

    def visit(message: Any, path: list[dict[str, Any]]) -> None:
        if not isinstance(message, Mapping):
            return
        here = [*path, {"role": message.get("role"), "content": message.get("text")}]
        replies = message.get("replies") or []
        replies = [reply for reply in replies if isinstance(reply, Mapping)] if isinstance(replies, list) else []
        ranked = [reply for reply in replies if reply.get("role") == "assistant" and reply.get("rank") is not None]
        if len(ranked) >= 2:
            texts, ranks = [reply.get("text") for reply in ranked], [reply["rank"] for reply in ranked]
            found.append({"prompt": here, "answers": texts, "ranks": ranks})
        for reply in replies:
            visit(reply, here)

    visit(row["prompt"], [])
    return found or [{"prompt": None, "answers": [], "ranks": []}]
