"""Rows that are read as training goes on: nothing is written to disk, and no more than a block of rows is in memory.

What it gives up: rows are shuffled within blocks alone, and nobody knows how many there are. A run resumes exactly all
the same, since its place is a chunk of the file and a number of rows in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lit.batches import Record
from rlhf_lit.data.sources import CHUNK
from rlhf_lit.data.store import ArrowRows, Rows
from rlhf_lit.data.tokens import Loading
from rlhf_lit.errors import UserError, say
from rlhf_lit.randomness import permutation

REST = CHUNK  # rows at the end of a file that make no block of their own, where the buffer is no smaller


@dataclass(frozen=True)
class Block:
    """Rows that are shuffled together.

    Attributes:
        rows: as many as the buffer holds; at the end of the file more or fewer.
        chunk: of the file, in which the next block begins.
        used: usable rows of that chunk which belong to earlier blocks.
    """

    rows: ArrowRows
    chunk: int
    used: int


class Stream:
    """The rows of a source, block by block.

    Args:
        load: reads and tokenises.
        buffer: rows of a block.
        completed: the rows of a block with what depends on the others among them.
    """

    def __init__(self, load: Loading, buffer: int, completed: Callable[[Rows], Rows]) -> None:
        self.load = load
        self.buffer = buffer
        self.completed = completed

    def first(self) -> Rows:
        """The rows of the first block, not completed.

        Raises:
            UserError: there is no usable row.
        """
        block = next(self.blocks(), None)
        if block is None:
            raise UserError(f"data.{self.load.name}: no usable row in {self.load.source.path}")
        return block.rows

    def blocks(self, chunk: int = 0, used: int = 0) -> Iterator[Block]:
        """The blocks of one pass, from a place on that an earlier block named. A short rest of the file is part of the
        last one: alone it would hardly be shuffled, and may be a single prompt's rows."""
        _, parts = self.load.parts(lambda rows, done: None, skip=chunk)
        batches: list[Any] = []
        held = 0
        full: Block | None = None
        for number, part in enumerate(parts, chunk):
            batch = part.batch.slice(used)
            while batch.num_rows:
                taken = batch.slice(0, self.buffer - held)
                batches.append(taken)
                held += taken.num_rows
                used += taken.num_rows
                batch = batch.slice(taken.num_rows)
                if full is not None and held >= min(self.buffer, REST):
                    yield full
                    full = None
                if held == self.buffer:
                    full = Block(ArrowRows(batches), number, used)
                    batches, held = [], 0
            used = 0
        if full is not None and not held:
            yield full
        elif held:
            before = full.rows.batches if full is not None else ()
            yield Block(ArrowRows([*before, *batches]), number + 1, 0)


class StreamLoader:
    """Batches of a stream, each rank its share of every batch; its epoch is the whole run.

    Args:
        stream: the rows. A block is a whole number of batches, but for the last of a pass.
        batch_size: rows per batch over all ranks.
        collate: makes a batch record of a list of rows.
        steps: of the run.
        rank, world: which share is this rank's.
    """

    def __init__(
        self,
        stream: Stream,
        batch_size: int,
        collate: Callable[[Sequence[Mapping[str, Any]]], Record],
        steps: int,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.stream = stream
        self.batch_size = batch_size
        self.collate = collate
        self.steps = steps
        self.rank = rank
        self.world = world
        self.place = {"epoch": 0, "block": 0, "chunk": 0, "used": 0, "position": 0}
        self.seconds = 0.0  # spent on making batches

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Record]:
        batches = self._batches()
        for _ in range(len(self)):
            started = time.perf_counter()
            batch = next(batches)
            self.seconds += time.perf_counter() - started
            yield batch

    def _batches(self) -> Iterator[Record]:
        """Endless, from the place on, which is always that of the next batch."""
        while True:
            place = self.place
            for block in self.stream.blocks(place["chunk"], place["used"]):
                place = self.place
                rows = self.stream.completed(block.rows)
                order = permutation(len(rows), "shuffle", place["epoch"], place["block"]).tolist()
                following = {
                    "epoch": place["epoch"],
                    "block": place["block"] + 1,
                    "chunk": block.chunk,
                    "used": block.used,
                    "position": 0,
                }
                if place["position"] * self.batch_size >= len(order):  # of a run with smaller batches
                    self.place = following
                for start in range(place["position"] * self.batch_size, len(order), self.batch_size):
                    last = start + self.batch_size >= len(order)
                    self.place = following if last else {**self.place, "position": start // self.batch_size + 1}
                    own = order[start : start + self.batch_size][self.rank :: self.world]
                    yield self.collate([rows[i] for i in own])
            self.place = {"epoch": self.place["epoch"] + 1, "block": 0, "chunk": 0, "used": 0, "position": 0}

    def state_dict(self) -> dict[str, int]:
        """Where the next batch comes from, among rows in blocks of what size."""
        return {**self.place, "buffer": self.stream.buffer}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue where the state was taken.

        Raises:
            UserError: by a run that did not stream its rows.
        """
        if state.keys() != self.state_dict().keys():
            raise UserError("data.train.streaming: the run that is continued did not stream its rows; leave it out")
        self.place = {name: state[name] for name in self.place}
        if state["buffer"] != self.stream.buffer:
            say(
                f"note: data.stream_buffer: the stream goes on in blocks of {self.stream.buffer} rows, before of "
                f"{state['buffer']}: its order is another one than without the stop"
            )
