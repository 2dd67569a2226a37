"""Where a run's time goes, on a clock that moves only where the test moves it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.batches import PromptBatch
from rlhf_lit.data import loader
from rlhf_lit.data.loader import BatchLoader
from rlhf_lit.data.mixture import shuffled
from rlhf_lit.rollout import loop
from rlhf_lit.rollout.loop import RolloutLoader
from rlhf_lit.trainer import timing


class Clock:
    """Stands still unless it is told to move on."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def takes(self, seconds: float, result: Any = None) -> Any:
        self.now += seconds
        return result


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in (timing, loader, loop):
        monkeypatch.setattr(module, "time", clock)
    return clock


def steps(loader: Any, clock: Clock, update: float, between: float, module: Any = None) -> list[dict[str, float]]:
    """What is logged of steps over the loader's batches, with something that takes time after each."""
    trainer: Any = SimpleNamespace(train_dataloader=loader)
    rows: list[dict[str, float]] = []
    module: Any = module or SimpleNamespace()
    module.log = lambda name, value: rows[-1].update({name: value})
    phases = timing.Phases()
    phases.on_train_start(trainer, module)
    for index, batch in enumerate(loader):
        rows.append({})
        phases.on_train_batch_start(trainer, module, batch, index)
        clock.takes(update)
        phases.on_train_batch_end(trainer, module, None, batch, index)
        clock.takes(between)
    return rows


def test_phases_of_steps_on_a_file(clock: Clock) -> None:
    loader = BatchLoader([1, 2, 3, 4], 2, lambda rows: clock.takes(0.5, rows), shuffled(4))
    first, second = steps(loader, clock, update=2.0, between=0.25)
    assert first == {"time/data": 0.5, "time/update": 2.0, "time/other": 0.0}
    assert second == {"time/data": 0.5, "time/update": 2.0, "time/other": 0.25}


class Minibatch(SimpleNamespace):
    """Experience of four episodes, as far as a loader looks at it."""

    def to(self, device: str) -> Minibatch:
        return self

    def select(self, rows: torch.Tensor) -> Minibatch:
        return self


class Sampler(OnPolicy):
    """As far as the clock looks at it."""

    def __init__(self) -> None:
        self.__dict__["rollout_seconds"] = 0.0

    def __setattr__(self, name: str, value: Any) -> None:
        self.__dict__[name] = value


def test_a_rollout_is_neither_data_nor_other(clock: Clock) -> None:
    """But for what it does besides sampling and scoring."""
    module = Sampler()

    def collect(prompts: PromptBatch, rollout: int) -> Any:
        module.rollout_seconds += 8.0
        return clock.takes(8.0 + 0.125, Minibatch())

    prompts = list(range(4))
    loader = RolloutLoader(prompts, lambda items: clock.takes(0.5), collect, lambda: False, 4, 1, 2, ppo_epochs=1)
    first, second = steps(loader, clock, update=2.0, between=0.25, module=module)
    assert first == {"time/data": 0.5, "time/update": 2.0, "time/other": 0.125}
    assert second == {"time/data": 0.0, "time/update": 2.0, "time/other": 0.25}


def test_a_loader_of_another_kind_leaves_its_time_in_other(clock: Clock) -> None:
    class Slow(list):
        def __iter__(self) -> Any:
            for batch in [1]:
                yield clock.takes(0.5, batch)

    assert steps(Slow(), clock, 2.0, 0.0) == [{"time/data": 0.0, "time/update": 2.0, "time/other": 0.5}]
