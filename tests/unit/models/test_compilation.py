"""Compiled decoder layers: the gradients of the same layers as they are, in every role, and few graphs.

As a rule the graphs are run as dynamo has traced them. What the compiler makes of them is in test_compile.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partialmethod
from pathlib import Path

import pytest
import tiny
import torch
from torch import nn
from torch._dynamo.utils import counters

from rlhf_lit.algorithms import SFT
from rlhf_lit.models.base import Base, LoRA


@pytest.fixture(params=["eager"], autouse=True)
def backend(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[str]:
    """What runs the graphs. Each test begins without any, and leaves none."""
    monkeypatch.setattr(nn.Module, "compile", partialmethod(nn.Module.compile, backend=request.param))
    torch.compiler.reset()
    counters.clear()
    yield request.param
    torch.compiler.reset()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.soak)], indirect=True)
def test_a_rollout_and_a_step_are_those_of_plain_layers(tmp_path: Path) -> None:
    """With adapters, of which each role has its own on the same layers, or none."""
    folder = tiny.save_model(tmp_path, num_key_value_heads=2)
    steps, rollouts = [], []
    for compiled in (False, True):
        module = tiny.make_ppo(Base(name=folder, lora=LoRA(rank=4), compile=compiled))
        rollouts.append(module.rollout(tiny.prompts(), 0))
        tiny.disturb(module, 0.03)
        steps.append(tiny.Step(module, rollouts[-1]))
        assert (graphs() > 0) == compiled
    plain, found = rollouts
    assert torch.equal(plain.sequences.tokens, found.sequences.tokens)
    for name, column in plain.columns().items():
        torch.testing.assert_close(found.columns()[name], column, rtol=0, atol=1e-5)
    assert steps[0].norm > 0.1
    assert steps[0].distance(steps[1]) < 1e-5


def test_layers_and_lengths_share_their_graphs_and_sampling_has_none(tmp_path: Path) -> None:
    module = tiny.build(SFT(Base(name=tiny.save_model(tmp_path), compile=True)))
    tiny.Step(module, tiny.supervised(budget=40))
    assert 0 < graphs() <= 4, "before the attention, after it, and the layer around both"
    tiny.Step(module, tiny.supervised(budget=20))
    made = graphs()
    assert made <= 12, "one row alone, and several of one length, too"
    for budget in (50, 60, 90):
        tiny.Step(module, tiny.supervised(budget))
    assert module.respond(tiny.prompts()).sequences.mask.any()
    assert graphs() == made
