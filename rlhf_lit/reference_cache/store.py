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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from filelock import FileLock, Timeout
from rich.filesize import decimal
from torch import Tensor

from rlhf_lit.batches import Sequences, cut_by_tokens
from rlhf_lit.errors import UserError
from rlhf_lit.reference_cache import catalogue, progress, segments
from rlhf_lit.reference_cache.identity import ReferenceIdentity, in_words
from rlhf_lit.reference_cache.segments import NoSegment, Segment

# A row before it is padded: its token ids, and which of them count.
Row = tuple[Sequence[int], Sequence[bool]]

# A build that is killed loses what it has computed since its last segment: at most this long, or this many values.
SEGMENT_SECONDS = 60.0
SEGMENT_TOKENS = 2**24
# Seconds between two looks at whether another process has finished.
POLL = 1.0
# Other ranks wait in a collective for the one that waits for the lock, and collectives give up after half an hour.
PATIENCE_OF_RANKS = 1200.0
# Seconds after which a network file system shows what another machine has written.
SETTLING = 120.0
# Age in seconds at which an unfinished file has nobody any more who would finish it.
ABANDONED = 3600.0
# Segments and rows are numbered in one integer: segment · ROWS + row.
ROWS = 2**32


@dataclass(frozen=True)
class _Key:
    """What a row is found by: a digest of its tokens and mask. ``tokens``: how many of them count."""

    digest: bytes
    tokens: int


def _key(tokens: Any, mask: Any) -> _Key:
    """The key of a row of token ids and their mask, as lists or arrays."""
    ids, counted = np.ascontiguousarray(tokens, np.int64), np.ascontiguousarray(mask, np.bool_)
    digest = xxhash.xxh3_128(ids.data)
    digest.update(counted.data)  # 8 bytes and 1 byte a token: where the one ends and the other starts is never in doubt
    return _Key(digest.digest(), int(counted.sum()))


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
        self._segments: list[Segment] = []
        self._places: dict[bytes, int] = {}
        self._distrusted: set[Path] = set()

    # What is there

    @property
    def size(self) -> int:
        """Bytes of its finished files."""
        return sum(segment.file.stat().st_size for segment in self._segments if segment.file.exists())

    def __len__(self) -> int:
        """Rows that can be read."""
        return len(self._places)

    def missing(self, rows: Sequence[Row]) -> list[int]:
        """Which rows are not there; of equal ones the first."""
        self._refresh()
        return self._absent([_key(*row) for row in rows])

    def require(self, rows: Sequence[Row]) -> None:
        """Refuse to go on without all of the rows.

        Raises:
            UserError: how many are not there, and why that may be.
        """
        absent = self.missing(rows)
        if not absent:
            self._mark_used()
            return
        distinct = len({_key(*row).digest for row in rows})
        lack = f"{self.folder}: the reference log-probs of {len(absent)} of {distinct} rows are missing"
        if len(absent) < distinct:
            raise UserError(f"{lack}; compute them first, or let this run compute them")
        if len(self):
            raise UserError(
                f"{lack}, and it holds {len(self)} others of the same reference: those were tokenised otherwise "
                "(another tokenizer, template or data.max_length) or come from other data"
            )
        others = [stored for stored in catalogue.stored_references(self.cache) if stored.rows]
        if others:
            theirs = "; ".join(in_words(stored.description) for stored in others[:3])
            more = f" and {len(others) - 3} more" if len(others) > 3 else ""
            raise UserError(
                f"{lack}: the reference differs. This one is {self.identity.words} ({self.identity.digest[:12]}); "
                f"cached are {theirs}{more}"
            )
        raise UserError(f"{lack}: nothing is cached in {self.cache}")

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
            self._values(_key(tokens[i, :length], masks[i, :length]), length)
            for i, length in enumerate(sequences.lengths.tolist())
        ]
        read = torch.zeros(sequences.mask.shape, dtype=torch.float32)
        read[sequences.mask] = torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *values]))
        return read

    def _values(self, key: _Key, length: int) -> Any:
        if self._place(key) is None:
            self._refresh()  # another process may have computed it
        place = self._place(key)
        if place is None:
            raise UserError(
                f"{self.folder}: no reference log-probs for a row of {length} tokens, {key.tokens} of them counted; "
                "compute them before they are read"
            )
        segment, row = divmod(place, ROWS)
        return self._segments[segment].row(row)

    def _absent(self, keys: Sequence[_Key]) -> list[int]:
        seen: set[bytes] = set()
        absent = []
        for i, key in enumerate(keys):
            if key.digest not in seen and self._place(key) is None:
                absent.append(i)
            seen.add(key.digest)
        return absent

    def _place(self, key: _Key) -> int | None:
        """Where a row stands; a segment that has it with another number of values is trusted no more."""
        while (place := self._places.get(key.digest)) is not None:
            segment, row = divmod(place, ROWS)
            if (found := self._segments[segment].tokens(row)) == key.tokens:
                break
            self._distrust(self._segments[segment].file, f"it has {found} values for {key.tokens} tokens")
            kept = [one for one in self._segments if one.file not in self._distrusted]
            self._segments, self._places = [], {}
            for one in kept:
                self._add(one)
        return place

    def _refresh(self) -> None:
        """Map the segments that are new."""
        known = {segment.file for segment in self._segments} | self._distrusted
        for file in sorted(self.folder.glob("*.arrow")):
            if file not in known:
                try:
                    self._add(segments.read(file, self.identity.digest))
                except NoSegment as reason:
                    if file.exists():  # and was not cleared away this moment
                        self._distrust(file, str(reason))

    def _add(self, segment: Segment) -> None:
        start = len(self._segments) * ROWS
        self._segments.append(segment)
        self._places |= {key: start + row for row, key in enumerate(segment.keys)}

    def _distrust(self, file: Path, reason: str) -> None:
        self._distrusted.add(file)
        progress.say(f"warning: {file} is not used, its rows are computed anew where they are needed: {reason}")

    # Building

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
        keys = [_key(*row) for row in rows]
        self._refresh()
        if rank == 0 and self._absent(keys):
            self._prepare()
            alone: Any = self._alone(keys, PATIENCE_OF_RANKS if world > 1 else float("inf"))
        else:
            alone = nullcontext()
        with alone:
            barrier()
            self._refresh()
            mine = [i for i in self._absent(keys) if int.from_bytes(keys[i].digest[:8], "little") % world == rank]
            if mine:
                self._compute(rows, keys, mine, compute, budget, loud=rank == 0)
            barrier()
        self._settle(keys)
        if rank == 0:
            self._mark_used()
            self._report(len(mine))
        return len(mine)

    def _compute(
        self,
        rows: Sequence[Row],
        keys: Sequence[_Key],
        chosen: list[int],
        compute: Callable[[Sequences], Tensor],
        budget: int,
        loud: bool,
    ) -> None:
        if loud:
            progress.say(f"reference log-probs: {len(chosen)} rows to compute under {self.identity.words}")
        lengths = torch.tensor([len(rows[i][0]) for i in chosen])
        pending = _Pending(self.folder, self.identity.digest)
        with progress.bar("reference log-probs", len(chosen)) if loud else nullcontext(lambda amount: None) as advance:
            try:
                for group in cut_by_tokens(lengths, budget):
                    numbers = [chosen[i] for i in group.tolist()]
                    sequences = Sequences.pad([rows[i][0] for i in numbers], [rows[i][1] for i in numbers])
                    logprobs = compute(sequences).detach().to("cpu", torch.float32)
                    assert logprobs.shape == sequences.mask.shape
                    for i, row, mask in zip(numbers, logprobs, sequences.mask, strict=True):
                        values = row[mask]
                        if not values.isfinite().all():
                            raise UserError(
                                f"reference log-probs: row {i} ({len(rows[i][0])} tokens) has one that is not finite "
                                f"({float(values[~values.isfinite()][0])}) under {self.identity.words}; look at the "
                                "reference's weights, or load it with base.dtype float32"
                            )
                        pending.add(keys[i].digest, values.numpy())
                    advance(len(numbers))
                    pending.write_if_due()
            finally:
                pending.write()

    def _settle(self, keys: Sequence[_Key]) -> None:
        """Map what the other ranks have written, as soon as it shows."""
        deadline = time.monotonic() + SETTLING
        self._refresh()
        while absent := self._absent(keys):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.folder}: the reference log-probs of {len(absent)} rows were computed and are not there; "
                    "was the folder cleared meanwhile, or do the ranks not share it?"
                )
            time.sleep(POLL)
            self._refresh()

    def _prepare(self) -> None:
        """The folder with its description, and without files that nobody will finish or trust."""
        text = json.dumps(self.identity.description, indent=2) + "\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not catalogue.description(self.folder):
                segments.write_whole(self.folder / catalogue.DESCRIPTION, text.encode())
            for file in self.folder.glob("*.partial"):
                with suppress(FileNotFoundError):
                    if time.time() - file.stat().st_mtime > ABANDONED:
                        file.unlink()
        except OSError as error:
            raise _unwritable(self.folder, error) from None
        for file in self._distrusted:
            if segments.NAME.fullmatch(file.name):  # only what we have written ourselves
                with suppress(OSError):
                    file.unlink()

    @contextmanager
    def _alone(self, keys: Sequence[_Key], patience: float) -> Iterator[None]:
        """Under the folder's lock, unless another process computes all the rows meanwhile, or takes too long."""
        lock = FileLock(self.folder / catalogue.LOCK)
        started, told = time.monotonic(), False
        while self._absent(keys) and time.monotonic() - started < patience:
            try:
                lock.acquire(timeout=POLL)
                break
            except Timeout:
                if not told:
                    progress.say(f"reference log-probs: waiting for another process that builds them in {self.folder}")
                    told = True
                self._refresh()
            except OSError:  # a file system without locks: both may compute the same, and write the same
                break
        try:
            yield
        finally:
            lock.release()

    def _mark_used(self) -> None:
        with suppress(OSError):  # of somebody else's, or read-only
            os.utime(self.folder / catalogue.DESCRIPTION)

    def _report(self, computed: int) -> None:
        done = f"{computed} rows computed" if computed else "all rows found, none computed"
        progress.say(f"reference log-probs: {done}; {len(self)} rows, {decimal(self.size)} in {self.folder}")


class _Pending:
    """Rows that are computed and not yet in a segment."""

    def __init__(self, folder: Path, reference: str) -> None:
        self.folder = folder
        self.reference = reference
        self._start()

    def _start(self) -> None:
        self.keys: list[bytes] = []
        self.logprobs: list[Any] = []
        self.tokens, self.since = 0, time.monotonic()

    def add(self, key: bytes, logprobs: Any) -> None:
        """One row."""
        self.keys.append(key)
        self.logprobs.append(logprobs)
        self.tokens += len(logprobs)

    def write_if_due(self) -> None:
        """Write a segment where a kill would lose too much."""
        if self.tokens >= SEGMENT_TOKENS or time.monotonic() - self.since >= SEGMENT_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what there is."""
        keys, logprobs = self.keys, self.logprobs
        self._start()
        if not keys:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # on this machine too
            segments.write(self.folder, self.reference, keys, logprobs)
        except OSError as error:
            raise _unwritable(self.folder, error) from None


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"{folder}: cannot be written to: {error.strerror or error}; set another cache folder")
