"""What ReasoningGymReward's worker processes run: the score of a task's own program. Imported by the workers alone."""

from __future__ import annotations

from functools import cache
from typing import Any

from reasoning_gym import get_score_answer_fn
from reasoning_gym.utils import extract_answer

TUPLES = {"arc_agi", "rearc"}
"""Tasks that compare grids with the metadata's, as tuples; JSON has lists."""


def score(response: str, entry: dict[str, Any]) -> float:
    """The task's score of a response.

    Args:
        response: with the answer in `<answer>…</answer>`, or nothing else.
        entry: `question`, `answer` and `metadata` of the row.
    """
    task = entry["metadata"]["source_dataset"]
    if task in TUPLES:
        entry = _tupled(entry)
    answer = extract_answer(response)
    return float(_program(task)(response.strip() if answer is None else answer, entry))


_program = cache(get_score_answer_fn)


def _tupled(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(map(_tupled, value))
    return {key: _tupled(inner) for key, inner in value.items()} if isinstance(value, dict) else value
