"""The built-in world of a run, read from the config.yaml of today's runs and of older ones."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lit.playground import World
from rlhf_lit.report.evaluating import world_of


@pytest.mark.parametrize(
    ("data", "world"),
    [
        ({"train": {"path": "playground", "world": {"seed": 3, "noise": 0.5}}}, World(seed=3, noise=0.5)),
        ({"train": {"path": "playground"}, "world": {"seed": 4, "held_out": 8}}, World(seed=4, held_out=8)),
        ({"train": {"path": "playground"}}, World()),
        ({"train": {"path": "pairs.jsonl"}, "world": {"seed": 4}}, None),
    ],
)
def test_where_the_world_stands(data: dict[str, Any], world: World | None) -> None:
    assert world_of({"data": {"init_args": data}, "model": {}}) == world
