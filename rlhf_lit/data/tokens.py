"""From a file to its store: rows are read, tokenised in as many processes as there are cores, and written as they come.

A chunk of rows is what goes to a process and comes back as a part of the store, so that no more than a few chunks are
ever in memory. A store is found again by the content of its file and all that decides its tokens.
"""

from __future__ import annotations

import inspect
import json
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash
from filelock import FileLock

from rlhf_lit.data import store
from rlhf_lit.data.chat import Conversation, Encoded
from rlhf_lit.data.processes import cores, in_order
from rlhf_lit.data.progress import Advance, loading
from rlhf_lit.data.records import OnBadRow, RowReader, RowReport, stopped
from rlhf_lit.data.rows import BadRow, Tie
from rlhf_lit.data.shapes import FIRST_ROWS
from rlhf_lit.data.sources import CHUNK, Chunk, RowFile, Source
from rlhf_lit.data.store import StoredRows
from rlhf_lit.errors import UserError, say
from rlhf_lit.files import atomic

if TYPE_CHECKING:
    import pyarrow as pa  # type: ignore[import-untyped]

# Part of a store's key: raise it when the same file would give other rows.
TOKENISATION_VERSION = 4


@dataclass(frozen=True)
class Skipped:
    """A row, or a record made of one, that is not used.

    Attributes:
        row: its number in the file.
        records: of the chunk that were found before it.
        reason: in a few words.
        is_tie: nothing is wrong with it.
    """

    row: int
    records: int
    reason: str
    is_tie: bool = False


@dataclass(frozen=True)
class Part:
    """What became of a chunk.

    Attributes:
        batch: its usable rows.
        looked_at: of each record found in the chunk, rows looked at when it was.
        places: of each row of the batch, which record it is.
        skipped: what is not used, in the file's order.
        moved: of each row of the batch, whether its prompt's tokens are no prefix of its own.
        unsupervised: of each row of the batch, answers that should have been supervised and are not.
        unused: columns that hold text and took no part.
        rows: looked at.
        done: fraction of the file that is read.
    """

    batch: pa.RecordBatch
    looked_at: list[int]
    places: list[int]
    skipped: list[Skipped]
    moved: list[bool]
    unsupervised: list[int]
    unused: set[str]
    rows: int
    done: float

    def first(self, count: int) -> Part:
        """The part up to its ``count``-th record, whose row is the last that was looked at."""
        if len(self.looked_at) < count:
            return self
        kept = sum(place < count for place in self.places)
        return replace(
            self,
            batch=self.batch.slice(0, kept),
            looked_at=self.looked_at[:count],
            places=self.places[:kept],
            skipped=[skipped for skipped in self.skipped if skipped.records < count],
            moved=self.moved[:kept],
            unsupervised=self.unsupervised[:kept],
            rows=self.looked_at[count - 1],
        )


@dataclass(frozen=True)
class Work:
    """Makes a part of a chunk; what a process is started with.

    Args:
        reader: makes records of rows.
        encode: tokenises conversations, or says why one cannot be.
        conversations: what is tokenised of a record.
        row: the row that a record's tokens make, or in a few words why there is none.
        schema: of the store.
    """

    reader: RowReader[Any]
    encode: Callable[[Sequence[Conversation]], list[Encoded | str]]
    conversations: Callable[[Any], Sequence[Conversation]]
    row: Callable[[Any, Sequence[Encoded]], dict[str, Any] | str]
    schema: pa.Schema

    def __call__(self, chunk: Chunk) -> Part:
        records: list[Any] = []
        looked_at: list[int] = []
        skipped: list[Skipped] = []
        unused: set[str] = set()
        rows_seen = 0
        for number, raw in enumerate(chunk.rows(), chunk.first):
            unused |= self.reader.unused(raw)
            for part in self.reader.parts(raw):
                rows_seen += self.reader.per_row
                try:
                    found = self.reader.read(part, number)
                except BadRow as reason:
                    skipped.append(Skipped(number, len(records), str(reason), isinstance(reason, Tie)))
                else:
                    records += found
                    looked_at += [rows_seen] * len(found)
        asked = [list(self.conversations(record)) for record in records]
        encoded = iter(self.encode([conversation for some in asked for conversation in some]))
        rows, places, moved, unsupervised = [], [], [], []
        for place, (record, some) in enumerate(zip(records, asked, strict=True)):
            tokens = [next(encoded) for _ in some]
            made = self._row(record, tokens)
            if isinstance(made, str):
                skipped.append(Skipped(record.row, place, made))
                continue
            rows.append({**made, "row": record.row, "source": record.source})
            places.append(place)
            moved.append(any(one.boundary_moved for one in tokens if isinstance(one, Encoded)))
            unused |= {f"{name} of messages" for one in tokens if isinstance(one, Encoded) for name in one.left_out}
            unsupervised.append(sum(one.unsupervised for one in tokens if isinstance(one, Encoded)))
        skipped.sort(key=lambda one: one.row)
        batch = store.record_batch(rows, self.schema)
        return Part(batch, looked_at, places, skipped, moved, unsupervised, unused, rows_seen, chunk.done)

    def _row(self, record: Any, tokens: Sequence[Encoded | str]) -> dict[str, Any] | str:
        refused = next((reason for reason in tokens if isinstance(reason, str)), None)
        return refused or self.row(record, [one for one in tokens if isinstance(one, Encoded)])


@dataclass
class Loading:
    """The making of a store.

    Args:
        name: of the split.
        source: what is read.
        file: the same, opened.
        work_of: the work on it, once its first rows are known.
        on_bad_row: `skip` counts bad rows, `error` stops at the first.
        workers: processes; None is as many as there are cores.

    Attributes:
        report: what became of the rows that were read since ``parts`` was last called.
    """

    name: str
    source: Source
    file: RowFile
    work_of: Callable[[list[Any]], Work]
    on_bad_row: OnBadRow
    workers: int | None
    report: RowReport = field(init=False)

    def write(self, path: Path) -> None:
        """Read everything and write the store.

        Raises:
            UserError: no known shape, a bad row where ``on_bad_row`` is ``error``, or no usable row.
            OSError: it cannot be written there.
        """
        with loading(self.name) as advance:
            schema, parts = self.parts(advance)
            store.write(path, schema, (part.batch for part in parts), self.report.as_json)
        if not self.report.used:
            raise UserError(f"no usable row in {self.source.path}: {self.report.summary()}")

    def parts(self, advance: Advance, skip: int = 0) -> tuple[pa.Schema, Iterator[Part]]:
        """The schema of the parts, and the parts one after the other, counted in the report.

        Args:
            advance: is told how far it is.
            skip: chunks that are passed over.

        Raises:
            UserError: no known shape, or (while they come) a bad row where ``on_bad_row`` is ``error``.
        """
        chunks = iter(self.file.chunks(CHUNK))
        first, rows = [], []
        for chunk in chunks:
            first.append(chunk)
            rows += chunk.rows()
            if len(rows) >= FIRST_ROWS:
                break
        work = self.work_of(rows)
        self.report = work.reader.report(self.source)
        # No process is started for a small file.
        processes = 1 if len(rows) < FIRST_ROWS else self.workers or cores()
        wanted = islice(chain(first, chunks), skip, None)
        return work.schema, self._counted(work, _parts(work, wanted, processes), advance)

    def _counted(self, work: Work, parts: Iterable[Part], advance: Advance) -> Iterator[Part]:
        """The parts as far as the limit reaches, their rows counted."""
        report, found = self.report, 0
        limit = None if self.source.limit is None else self.source.limit * work.reader.per_row
        for whole in parts:
            part = whole if limit is None else whole.first(limit - found)
            for skipped in part.skipped:
                if self.on_bad_row == "error" and not skipped.is_tie:
                    raise UserError(stopped(self.source, skipped.row, skipped.reason))
                report.skip(skipped.reason, skipped.row)
                if not skipped.is_tie:
                    report.first_bad = report.first_bad or (skipped.row, skipped.reason)
            report.total += part.rows
            report.used += part.batch.num_rows
            report.unused |= part.unused
            report.moved += sum(part.moved)
            report.unsupervised += sum(part.unsupervised)
            found += len(part.looked_at)
            advance(report.total, part.done)
            yield part
            if limit is not None and found >= limit:
                return


def _parts(work: Work, chunks: Iterator[Chunk], processes: int) -> Iterator[Part]:
    """The parts in order; the first is made here, so that the processes begin with what is known of the chat template
    by then, and do not say it again."""
    yield from map(work, islice(chunks, 1))
    yield from in_order(work, chunks, processes)


def code_of(kind: type) -> list[str]:
    """The name of a data module, and the source text of the files outside the package that it is made of: code under
    change gives a store of its own. What is typed into an interpreter has no file."""
    own = [
        base for base in kind.__mro__ if base.__module__.partition(".")[0] not in ("rlhf_lit", "lightning", "builtins")
    ]
    texts = []
    for base in own:
        with suppress(OSError, TypeError):
            texts.append(inspect.getsource(inspect.getmodule(base) or base))
    return [kind.__name__, *texts]


def key_of(file: RowFile, source: Source, settings: Sequence[object]) -> str:
    """Under which name a store is kept: 32 hexadecimal digits of all that decides its rows.

    Args:
        file: the content.
        source: how it is read.
        settings: what else the tokens depend on, as JSON has it.
    """
    parts = [file.fingerprint, source.columns, source.limit, *settings, TOKENISATION_VERSION]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, default=str).encode())


def tokenised(load: Loading, key: str, cache: str | None) -> StoredRows:
    """The store of a file: found in the cache, or made.

    One process makes it, and others wait for it; without a cache, or where that cannot be written, each makes its own,
    which goes with the process.

    Args:
        load: makes it.
        key: its name in the cache.
        cache: the folder; None keeps nothing.

    Raises:
        UserError: as ``Loading.write`` says, or there is no room for it anywhere.
    """
    if cache is not None:
        place = Path(cache).expanduser() / f"{key}.arrow"
        try:
            return _cached(load, place)
        except OSError as error:
            say(f"note: data.cache: {place.parent} cannot be used ({error.strerror or error}); going on without it")
    folder = Path(tempfile.mkdtemp(prefix="rlhf_lit-"))
    try:
        load.write(folder / f"{key}.arrow")
        rows = StoredRows(folder / f"{key}.arrow")
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise UserError(
            f"data.{load.name}: no room for its tokens in {folder.parent} ({error.strerror}); set TMPDIR or data.cache"
        ) from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    weakref.finalize(rows, shutil.rmtree, folder, ignore_errors=True)
    return rows


def _cached(load: Loading, place: Path) -> StoredRows:
    place.parent.mkdir(parents=True, exist_ok=True)
    if (found := store.opened(place)) is not None:
        return found
    lock = place.with_suffix(".lock")
    with FileLock(lock):
        if (found := store.opened(place)) is None:
            if place.exists():
                say(f"note: data.cache: {place} is damaged; it is made anew")
            with atomic(place, shared=True) as partial:
                load.write(partial)
            found = StoredRows(place)
    lock.unlink(missing_ok=True)
    return found
