"""The loader that closes the loop of on-policy training: prompts in, minibatches of experience out.

Its order is a function of (seed, epoch) and its state a counter and the experience in hand: a killed run resumes
exactly. It is *sized*: Lightning prefetches from unsized iterables, which would make every rollout one update stale.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from rlhf_lit.batches import ExperienceBatch, PromptBatch, Record, Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.randomness import permutation


class Collect(Protocol):
    """What turns prompts into experience: the running module."""

    def __call__(self, prompts: PromptBatch, rollout: int) -> ExperienceBatch: ...


class RolloutLoader:
    """Prompts in, minibatches of experience out: the one place where PPO's loop closes.

    When the buffer is spent, the next ``rollout_size`` prompts are answered by the present policy; the rollout is then
    handed out in minibatches, each one optimizer step, for ``ppo_epochs`` passes in a fresh order.

    Args:
        prompts: the prompt data set.
        collate: makes a prompt batch of [(prompt, stream index, sample number)].
        collect: answers a prompt batch; called when a minibatch is asked for, never before.
        spent: whether the rest of the present rollout is to be passed over.
        rollout_size: prompts per rollout, over all ranks.
        samples_per_prompt: responses to each.
        minibatch_size: responses per optimizer step, over all ranks; divides rollout_size × samples_per_prompt.
        ppo_epochs: passes over a rollout.
        rank, world: which share is this rank's.
        order: of the prompts in each pass over them (pass number → places); None is a random one of all of them.

    Raises:
        UserError: fewer prompts in a rollout than ranks.
    """

    def __init__(
        self,
        prompts: Sequence[Any],
        collate: Callable[[list[tuple[Any, int, int]]], PromptBatch],
        collect: Collect,
        spent: Callable[[], bool],
        rollout_size: int,
        samples_per_prompt: int,
        minibatch_size: int,
        ppo_epochs: int,
        rank: int = 0,
        world: int = 1,
        order: Callable[[int], Tensor] | None = None,
    ) -> None:
        if rollout_size < world:
            raise UserError(
                f"data.rollout_size: {rollout_size} prompts are too few for {world} ranks, which need one each"
            )
        self.prompts = prompts
        self.collate = collate
        self.collect = collect
        self.spent = spent
        self.rollout_size = rollout_size
        self.samples_per_prompt = samples_per_prompt
        self.minibatch_size = minibatch_size
        self.ppo_epochs = ppo_epochs
        self.order = order or (lambda number: permutation(len(prompts), "shuffle", number))
        self.rank = rank
        self.world = world
        self.rollout = 0
        self.step = 0
        self.buffer: ExperienceBatch | None = None
        self.seconds = 0.0  # spent on prompts and minibatches
        self._collecting = 0.0  # and on the rollouts in between

    @property
    def episodes_per_rollout(self) -> int:
        """Responses of one rollout, over all ranks."""
        return self.rollout_size * self.samples_per_prompt

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps made on one rollout."""
        return self.ppo_epochs * (self.episodes_per_rollout // self.minibatch_size)

    def __len__(self) -> int:
        """Optimizer steps of one pass over the prompts, rounded up to whole rollouts."""
        return math.ceil(len(self.prompts) / self.rollout_size) * self.steps_per_rollout

    def __iter__(self) -> Iterator[ExperienceBatch]:
        for _ in range(len(self)):
            started, collecting = time.perf_counter(), self._collecting
            minibatch = self._next()
            self.seconds += time.perf_counter() - started - (self._collecting - collecting)
            yield minibatch

    def _next(self) -> ExperienceBatch:
        if self.buffer is not None and self.spent():
            self.rollout, self.step, self.buffer = self.rollout + 1, 0, None
        if self.buffer is None:
            prompts = self._prompts_of(self.rollout)
            started = time.perf_counter()
            self.buffer = self.collect(prompts, self.rollout).to("cpu")
            self._collecting += time.perf_counter() - started
        buffer = self.buffer
        per_epoch = self.episodes_per_rollout // self.minibatch_size
        epoch, minibatch = divmod(self.step, per_epoch)
        # One order for all ranks over the whole rollout; each rank holds the rows that are its own.
        order = permutation(self.episodes_per_rollout, "minibatches", self.rollout, epoch)
        episodes = order[minibatch * self.minibatch_size : (minibatch + 1) * self.minibatch_size]
        own = self._rows_of(episodes[self._ranks_of(episodes) == self.rank])
        self.step += 1
        if self.step == self.steps_per_rollout:
            self.rollout, self.step, self.buffer = self.rollout + 1, 0, None
        return buffer.select(own)

    def _prompts_of(self, rollout: int) -> PromptBatch:
        """This rank's prompts of a rollout. Prompts are a stream of passes, each in an order of its own."""
        orders: dict[int, Tensor] = {}
        items: list[tuple[Any, int, int]] = []
        for place in range(self.rank, self.rollout_size, self.world):
            index = rollout * self.rollout_size + place
            epoch, position = divmod(index, len(self.prompts))
            if epoch not in orders:
                orders[epoch] = self.order(epoch)
            prompt = self.prompts[int(orders[epoch][position])]
            items.extend((prompt, index, sample) for sample in range(self.samples_per_prompt))
        return self.collate(items)

    # Episodes are numbered prompt by prompt. Prompts are dealt to the ranks in turn, with all of their responses, so
    # that what compares the responses to one prompt finds them on one rank.

    def _ranks_of(self, episodes: Tensor) -> Tensor:
        """Which rank holds each episode."""
        return episodes // self.samples_per_prompt % self.world

    def _rows_of(self, episodes: Tensor) -> Tensor:
        """The row of each episode in its rank's buffer."""
        prompt, sample = episodes // self.samples_per_prompt, episodes % self.samples_per_prompt
        return prompt // self.world * self.samples_per_prompt + sample

    def state_dict(self) -> dict[str, Any]:
        """The position, and the experience that is not used up yet: the whole rollout's, in the order of its episodes,
        whichever ranks hold it. All ranks must ask for it together."""
        return {
            "rollout": self.rollout,
            "step": self.step,
            "buffer": None if self.buffer is None else _tensors(self._whole(self.buffer)),
        }

    def _whole(self, buffer: ExperienceBatch) -> ExperienceBatch:
        """The ranks' buffers as one."""
        if self.world == 1:
            return buffer
        parts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(parts, _tensors(buffer))
        joined = _experience(parts[0])
        for part in parts[1:]:
            joined = joined.join(_experience(part))
        episodes = torch.arange(self.episodes_per_rollout)
        sizes = torch.tensor([len(part["sequences"]["lengths"]) for part in parts])
        before = sizes.cumsum(0) - sizes
        return joined.select(before[self._ranks_of(episodes)] + self._rows_of(episodes))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where the state was taken, by however many ranks.

        What this run sets holds: the saved experience goes through in its micro-batches, and is passed over where a
        rollout now has another number of episodes, or fewer steps than were made on it.
        """
        self.rollout, self.step, self.buffer = state["rollout"], state["step"], None
        if state["buffer"] is None:
            return
        saved, episodes = _experience(state["buffer"]), torch.arange(self.episodes_per_rollout)
        if len(saved) != len(episodes) or self.step >= self.steps_per_rollout:
            self.rollout, self.step = self.rollout + 1, 0
            return
        budget = self._prompts_of(self.rollout).micro_batch_tokens
        self.buffer = replace(saved, micro_batch_tokens=budget).select(episodes[self._ranks_of(episodes) == self.rank])


def _tensors(record: Record) -> dict[str, Any]:
    """A record as nested dicts of tensors and numbers, which load without unpickling code."""
    values = {f.name: getattr(record, f.name) for f in fields(record)}  # type: ignore[arg-type]
    return {name: _tensors(value) if isinstance(value, Record) else value for name, value in values.items()}


def _experience(state: dict[str, Any]) -> ExperienceBatch:
    """What ``_tensors`` made of a rollout, as a record again."""
    rest = {name: value for name, value in state.items() if name != "sequences"}
    return ExperienceBatch(Sequences(**state["sequences"]), **rest)
