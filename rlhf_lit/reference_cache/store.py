"""The cache of one reference: what is missing is computed once, what is there is read from mapped memory.

A row is found by its tokens and its mask alone. Files are immutable and appear whole, so any number of processes may
read and build at once; a lock only keeps two of them from computing the same rows.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from rich.filesize import decimal
from torch import Tensor

from rlhf_lit.batches import Sequences
from rlhf_lit.batches.micro_batches import cut_by_tokens
from rlhf_lit.errors import UserError, say
from rlhf_lit.files import atomic
from rlhf_lit.reference_cache import catalogue, progress, segments
from rlhf_lit.reference_cache.identity import ReferenceIdentity, in_words
from rlhf_lit.reference_cache.index import Index, Key, key_of
from rlhf_lit.reference_cache.pending import Pending, unwritable

# A row before it is padded: its token ids, and which of them count.
Row = tuple[Sequence[int], Sequence[bool]]

# Seconds between two looks at whether another process has finished.
POLL = 1.0
# Other ranks wait in a collective for the one that waits for the lock, and collectives give up after half an hour.
PATIENCE_OF_RANKS = 1200.0
# Seconds after which every network file system shows what another machine has written.
SETTLING = 120.0


class ReferenceCache:
    """Rows and their log π₀ under one reference, in a folder that all runs share.

    Args:
        folder: the cache folder; the rows stand in ``reference/<digest>/`` of it.
        identity: the reference.
    """

    def __init__(self, folder: str | Path, identity: ReferenceIdentity) -> None:
        self.cache = Path(folder).expanduser()
        self.identity = identity
        self.folder = catalogue.folder_of(self.cache, identity.digest)
        self._index = Index(self.folder, identity.digest)

    def __len__(self) -> int:
        """Rows that can be read."""
        return len(self._index)

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return self._index.size

    def missing(self, rows: Sequence[Row]) -> list[int]:
        """Which rows are not there; of equal ones the first. Where none is, the cache counts as used today."""
        self._index.refresh()
        absent = self._index.absent([key_of(*row) for row in rows])
        if not absent:
            self._mark_used()
        return absent

    def require(self, rows: Sequence[Row]) -> None:
        """Refuse to go on without all of the rows.

        Raises:
            UserError: how many are not there, and why that may be.
        """
        absent = self.missing(rows)
        if not absent:
            return
        distinct = len({key_of(*row).digest for row in rows})
        lack = f"{self.folder}: the reference log-probs of {len(absent)} of {distinct} rows are missing"
        if len(absent) < distinct:
            raise UserError(f"{lack}; let a run compute them first")
        if len(self):
            raise UserError(
                f"{lack}, and the {len(self)} that are there, of the same reference, were tokenised otherwise (another "
                "tokenizer, template or max_length) or come from other data"
            )
        others = [stored for stored in catalogue.stored_references(self.cache) if stored.rows]
        if not others:
            raise UserError(f"{lack}; nothing is cached in {self.cache}, so let a run compute them first")
        theirs = "; ".join(in_words(stored.description) for stored in others[:3])
        more = f"; and {len(others) - 3} more" if len(others) > 3 else ""
        raise UserError(
            f"{lack}: the reference differs from those in {self.cache}. This one is {self.identity.words}; there are "
            f"{theirs}{more}"
        )

    def read(self, sequences: Sequences) -> Tensor:
        """log π₀ of the masked tokens.

        Args:
            sequences: on the CPU.

        Returns:
            [rows, time] float32 on the CPU, 0 off the mask, in nats.

        Raises:
            UserError: a row is not there.
        """
        tokens, masks = sequences.tokens.numpy(), sequences.mask.numpy()
        values = [
            self._values(key_of(tokens[i, :length], masks[i, :length]), length)
            for i, length in enumerate(sequences.lengths.tolist())
        ]
        read = torch.zeros(sequences.mask.shape, dtype=torch.float32)
        read[sequences.mask] = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *values]))
        return read

    def _values(self, key: Key, length: int) -> Any:
        values = self._index.find(key)
        if values is None:
            self._index.refresh()  # another process may have computed it meanwhile
            values = self._index.find(key)
        if values is None:
            raise UserError(
                f"{self.folder}: no reference log-probs for a row of {length} tokens, {key.tokens} of them counted; "
                "let a run compute them first"
            )
        return values

    def build(
        self,
        rows: Sequence[Row],
        compute: Callable[[Sequences], Tensor],
        budget: int,
        rank: int = 0,
        world: int = 1,
        barrier: Callable[[], None] = lambda: None,
    ) -> int:
        """Compute what is missing of the rows, and keep it.

        Args:
            rows: every rank names all of them.
            compute: sequences on the CPU → [rows, time] log π₀, 0 off the mask.
            budget: padded tokens that are computed at once.
            rank: of this process. Each computes the share that falls to it by the rows' keys, so that ranks need not
                agree on what is missing.
            world: number of ranks.
            barrier: returns when all ranks have called it; each does so twice.

        Returns:
            The number of rows that this process computed.

        Raises:
            UserError: a log-prob that is not finite, or a folder that cannot be written to. What was computed until
                then is kept.
        """
        keys = [key_of(*row) for row in rows]
        self._index.refresh()
        alone: Any = nullcontext()
        if rank == 0 and self._index.absent(keys):
            self._prepare()
            alone = self._alone(keys, PATIENCE_OF_RANKS if world > 1 else float("inf"))
        with alone:
            barrier()
            self._index.refresh()
            absent = self._index.absent(keys)
            mine = [i for i in absent if int.from_bytes(keys[i].digest[:8], "little") % world == rank]
            if mine:
                self._compute(rows, keys, mine, compute, budget, shown=rank == 0)
            barrier()
        self._settle(keys)
        if rank == 0:
            self._mark_used()
            done = f"{len(mine)} rows computed" if mine else "every row found, none computed"
            say(f"reference log-probs: {done}; {len(self)} rows, {decimal(self.size)} in {self.folder}")
        return len(mine)

    def _compute(
        self,
        rows: Sequence[Row],
        keys: Sequence[Key],
        chosen: list[int],
        compute: Callable[[Sequences], Tensor],
        budget: int,
        shown: bool,
    ) -> None:
        if shown:
            say(f"reference log-probs: {len(chosen)} rows to compute under {self.identity.words}")
        lengths = torch.tensor([len(rows[i][0]) for i in chosen])
        pending = Pending(self.folder, self.identity.digest)
        with progress.bar("reference log-probs", len(chosen)) if shown else nullcontext(lambda _: None) as advance:
            try:
                for group in cut_by_tokens(lengths, budget):
                    numbers = [chosen[i] for i in group.tolist()]
                    sequences = Sequences.pad([rows[i][0] for i in numbers], [rows[i][1] for i in numbers])
                    logprobs = compute(sequences).detach().to("cpu", torch.float32)
                    for i, row, mask in zip(numbers, logprobs, sequences.mask, strict=True):
                        self._require_finite(values := row[mask], i, len(rows[i][0]))
                        pending.add(keys[i].digest, values.numpy())
                    advance(len(numbers))
                    pending.write_if_due()
            finally:
                pending.write()

    def _require_finite(self, values: Tensor, number: int, length: int) -> None:
        if not (finite := values.isfinite()).all():
            raise UserError(
                f"reference log-probs: row {number} ({length} tokens) has one that is {float(values[~finite][0])} "
                f"under {self.identity.words}; look at the weights, or load the reference in float32"
            )

    def _settle(self, keys: Sequence[Key]) -> None:
        """Map what the ranks have written, as soon as it shows."""
        deadline = time.monotonic() + SETTLING
        self._index.refresh()
        while absent := self._index.absent(keys):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.folder}: the reference log-probs of {len(absent)} rows were computed and are not there; "
                    "was the folder cleared meanwhile, or do the ranks not share it?"
                )
            time.sleep(POLL)
            self._index.refresh()

    def _prepare(self) -> None:
        """The folder with its description, and without files that nobody will finish or use."""
        text = json.dumps(self.identity.description, indent=2) + "\n"
        dead = [file for file in self._index.distrusted() if segments.NAME.fullmatch(file.name)]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not catalogue.description(self.folder):
                with atomic(self.folder / catalogue.DESCRIPTION, shared=True) as partial:
                    partial.write_text(text, encoding="utf-8")
            for file in (*dead, *catalogue.abandoned(self.folder)):
                file.unlink(missing_ok=True)
        except OSError as error:
            raise unwritable(self.folder, error) from None

    @contextmanager
    def _alone(self, keys: Sequence[Key], patience: float) -> Iterator[None]:
        """Under the folder's lock, unless another process computes all the rows meanwhile, or takes too long."""
        lock = FileLock(self.folder / catalogue.LOCK)
        started, told = time.monotonic(), False
        while self._index.absent(keys) and time.monotonic() - started < patience:
            try:
                lock.acquire(timeout=POLL)
                break
            except Timeout:
                if not told:
                    say(f"reference log-probs: waiting for another process that builds in {self.folder}")
                    told = True
                self._index.refresh()
            except OSError:  # a file system without locks: two may compute the same, and write the same
                break
        try:
            yield
        finally:
            lock.release()

    def _mark_used(self) -> None:
        with suppress(OSError):  # somebody else's, or read-only
            os.utime(self.folder / catalogue.DESCRIPTION)
