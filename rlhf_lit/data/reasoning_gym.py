"""Rows of `reasoning-gym`, whose tasks make up questions that a program can check (ReasoningGymReward does)."""

from __future__ import annotations

import json
from difflib import get_close_matches
from importlib.util import find_spec
from typing import Any
from urllib.parse import parse_qsl

from rlhf_lit.errors import UserError

PREFIX = "reasoning-gym:"


def is_reasoning_gym(path: str) -> bool:
    """Whether a source's path names a task of reasoning-gym."""
    return path.startswith(PREFIX)


def rows(path: str) -> list[dict[str, Any]]:
    """The rows that a path names: `reasoning-gym:TASK`, with options as in an address.

    `reasoning-gym:leg_counting?size=1000&seed=1&max_animals=5` is 1 000 rows of the task `leg_counting`, made from the
    seed 1, the task's own setting `max_animals` being 5. The default is 500 rows of the seed 0; another seed gives
    other rows, to evaluate on.

    Args:
        path: of the source.

    Returns:
        Rows with `question`, `answer` (null where a task has no single one) and `metadata`, as JSON text, for the
        reward.

    Raises:
        UserError: the package is missing, there is no such task or setting, or a setting is out of range.
    """
    if find_spec("reasoning_gym") is None:
        raise UserError(f"{path} needs the package reasoning-gym: pip install 'rlhf_lit[tasks]'")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    task, _, query = path.removeprefix(PREFIX).partition("?")
    if task not in DATASETS or task == "composite":
        close = get_close_matches(task, DATASETS)
        hint = f"; perhaps {', '.join(close)}" if close else ""
        raise UserError(f"{path}: reasoning-gym has no task {task!r}{hint}")
    settings = {"size": 500, "seed": 0} | {key: _value(text) for key, text in parse_qsl(query, keep_blank_values=True)}
    if not isinstance(settings["size"], int) or settings["size"] < 1:
        raise UserError(f"{path}: size must be a whole number of rows, at least 1, not {settings['size']}")
    try:
        data = reasoning_gym.create_dataset(task, **settings)
        entries = [data[i] for i in range(len(data))]
    except Exception as error:  # a task's own checks are assertions; an unknown setting is a TypeError
        raise UserError(f"{path}: reasoning-gym refuses these settings: {' '.join(str(error).split())}") from error
    return [
        {
            "question": entry["question"],
            "answer": entry["answer"],
            # As text, for a store of columns would give every row the keys of all.
            "metadata": json.dumps(entry["metadata"], default=str),
        }
        for entry in entries
    ]


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
