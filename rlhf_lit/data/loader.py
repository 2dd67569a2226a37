"""A loader whose order is a function of (seed, epoch) and whose state is a counter: a killed run resumes exactly.

Lightning never exhausts it, so the epoch rolls over before its last batch is handed out.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rlhf_lit.batches import Record
from rlhf_lit.data.mixture import Order
from rlhf_lit.errors import UserError

Example = TypeVar("Example")


class BatchLoader:
    """Batches of a data set, each rank its share of every batch.

    Args:
        examples: the whole data set.
        batch_size: examples per batch over all ranks; the last batch of an epoch may be smaller.
        collate: makes a batch record of a list of examples.
        order: of the rows in each epoch; None is always the file's.
        rank, world: which share is this rank's.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        batch_size: int,
        collate: Callable[[list[Example]], Record],
        order: Order | None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.examples = examples
        self.batch_size = batch_size
        self.collate = collate
        self.order = order
        self.rank = rank
        self.world = world
        self.epoch = 0
        self.position = 0
        self.seconds = 0.0  # spent on making batches

    def __len__(self) -> int:
        return math.ceil(len(self.examples) / self.batch_size)

    def __iter__(self) -> Iterator[Record]:
        """As many batches as an epoch has. Shuffled ones go on where the last iteration left off, into the next epoch
        where need be, so that a limit on the batches passes over no row; others begin at the first row each time."""
        if self.order is None:
            for step in range(len(self)):
                yield self._batch(torch.arange(len(self.examples)), step)
            return
        epoch, order = self.epoch, self.order(self.epoch)
        for _ in range(len(self)):
            if self.epoch != epoch:
                epoch, order = self.epoch, self.order(self.epoch)
            step = self.position
            last = step + 1 == len(self)
            self.epoch, self.position = (self.epoch + 1, 0) if last else (self.epoch, step + 1)
            yield self._batch(order, step)

    def _batch(self, order: Tensor, step: int) -> Record:
        started = time.perf_counter()
        rows = order[step * self.batch_size : (step + 1) * self.batch_size][self.rank :: self.world]
        batch = self.collate([self.examples[i] for i in rows.tolist()])
        self.seconds += time.perf_counter() - started
        return batch

    def state_dict(self) -> dict[str, int]:
        """Where the next batch comes from."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where the state was taken; in larger batches, with the next epoch where that is past the end.

        Raises:
            UserError: by a run that streamed its rows.
        """
        if "chunk" in state:
            raise UserError("data.train.streaming: the run that is continued streamed its rows; set it to true")
        self.epoch, self.position = state["epoch"], state["position"]
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0
