"""One row of a file with several answers to one prompt: which they are, in what order, and how they were rated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from itertools import combinations
from typing import Any

from rlhf_lit.data.messages import check_answers, turns
from rlhf_lit.data.reading import margin, preference
from rlhf_lit.data.rows import BadRow, Row, Turns, number
from rlhf_lit.data.shapes import Shape


def answers(shape: Shape, row: Row) -> tuple[Turns, tuple[Turns, ...]]:
    """The prompt and its answers, from a column of a list. Raises BadRow."""
    assert shape.answer is not None
    name = shape.answer.name
    given = _list(shape.answer.of(row), name)
    if name == "completions":  # UltraFeedback's
        if not all(isinstance(item, Mapping) for item in given):
            raise BadRow("completions are no records")
        given = [item.get("response") for item in given]
    prompt = shape.checked_prompt(row)
    found = tuple(turns(item, name, "assistant") for item in given)
    for answer in found:
        if answer[0].role != "assistant" or answer[-1].role != "assistant":
            raise BadRow("no final assistant turn")
        check_answers(answer, f"empty {name}")
    return prompt, found


def ranking(
    shape: Shape, row: Row, margins: bool
) -> tuple[Turns, tuple[Turns, ...], tuple[int, ...], tuple[float, ...]]:
    """Prompt, answers, the rank of each (0 is the best, ties are equal), and its rating, whose differences are margins.

    A preference pair is a list of two.

    Args:
        shape: of the file.
        row: one of it.
        margins: as ``needed`` of :func:`~rlhf_lit.data.reading.margin`.

    Raises:
        BadRow: as the name of the reason says.
    """
    if shape.form != "list":
        prompt, chosen, rejected = preference(shape, row)
        return prompt, (chosen, rejected), (0, 1), (margin(shape, row, margins), 0.0)
    prompt, found = answers(shape, row)
    if len(found) < 2:
        raise BadRow("fewer than two answers")
    ranks, ratings = ranks_and_ratings(shape, row, len(found))
    if not any(ranks):
        raise BadRow("all answers of the same rank")
    for i, j in combinations(range(len(found)), 2):
        if found[i] == found[j] and ranks[i] != ranks[j]:
            raise BadRow("the same answer at two ranks")
    return prompt, found, ranks, ratings


def ranks_and_ratings(shape: Shape, row: Row, count: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """The rank of each of ``count`` answers and its rating, as in :func:`ranking`. Raises BadRow."""
    quality, ratings = _quality(shape, row, count)
    for i, j in combinations(range(count), 2):
        if (quality[i] - quality[j]) * (ratings[i] - ratings[j]) < 0:
            raise BadRow("ranks and scores disagree")
    order = sorted(set(quality), reverse=True)
    return tuple(order.index(value) for value in quality), ratings


def _quality(shape: Shape, row: Row, count: int) -> tuple[list[float], tuple[float, ...]]:
    """Of each answer, what orders them (higher is better), and its rating (0 where there are ranks alone)."""
    assert shape.answer is not None
    scores: list[float] | None = None
    if shape.answer.name == "completions":
        given = _list(shape.answer.of(row), "completions")
        scores = [number(item.get("overall_score"), "overall_score") for item in given]
    elif "scores" in shape.parts:
        scores = _numbers(shape, row, "scores", count)
    if "ranks" in shape.parts:
        quality = [-rank for rank in _numbers(shape, row, "ranks", count)]
    elif shape.answer.name == "ranked":
        quality = [-float(place) for place in range(count)]
    else:
        assert scores is not None, "the shape is a ranked one"
        quality = scores
    return quality, tuple(scores) if scores is not None else (0.0,) * count


def _list(value: Any, name: str) -> list[Any]:
    if value is None:
        raise BadRow(f"null {name}")
    if isinstance(value, str) and value.lstrip().startswith("["):  # a cell of a CSV file
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise BadRow(f"non-list {name}") from None
    if not isinstance(value, list):
        raise BadRow(f"non-list {name}")
    return value


def _numbers(shape: Shape, row: Row, name: str, count: int) -> list[float]:
    """One finite number for each answer."""
    values = [number(value, name) for value in _list(shape.parts[name].of(row), name)]
    if len(values) != count:
        raise BadRow(f"not as many {name} as answers")
    return values


def is_ordered(shape: Shape) -> bool:
    """Whether rows with a list of answers say which are better."""
    assert shape.answer is not None
    return shape.answer.name in ("ranked", "completions") or bool(shape.parts.keys() & {"ranks", "scores"})
