"""Rows that are read in chunks, so that no more than a chunk of them is held at a time."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import xxhash

from rlhf_lit.data import json_rows
from rlhf_lit.data.formats import BATCH, BUFFER, Reading, kind_of, read, reason, with_names
from rlhf_lit.data.json_rows import Line
from rlhf_lit.errors import UserError


@dataclass(frozen=True)
class Chunk:
    """Some rows, one after the other in their file. It can be sent to another process, which then parses them.

    Attributes:
        first: number of the first one in the file, from 0.
        content: rows, or lines that are yet to be parsed.
        done: fraction of the file that has been read so far, from 0 to 1; 0 where nobody knows how long it is.
    """

    first: int
    content: list[Any]
    done: float

    def __len__(self) -> int:
        return len(self.content)

    def rows(self) -> list[Any]:
        """The rows: a dict each, unless the file holds something else in a row's place, or ``Unreadable``.

        Raises:
            UserError: a line that is not valid JSON, with its number in the file.
        """
        return [item.parse() if isinstance(item, Line) else item for item in self.content]


@dataclass
class Progress:
    """How much of what is read has been read, from 0 to 1."""

    done: Callable[[], float] = float


@dataclass
class RowFile:
    """Rows of a source, read anew by each pass. It can be sent to another process.

    Attributes:
        label: how complaints name it.
    """

    label: str

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the content and of what decides which rows are read from it, without parsing it (hexadecimal)."""
        raise NotImplementedError

    def items(self, progress: Progress) -> Iterator[Any]:
        """Rows, or lines that are yet to be parsed, in order."""
        raise NotImplementedError

    def chunks(self, rows: int) -> Iterator[Chunk]:
        """The rows, ``rows`` at a time.

        Raises:
            UserError: it cannot be read, or has no row.
        """
        progress = Progress()
        items, first = self.items(progress), 0
        while content := list(islice(items, rows)):
            yield Chunk(first, content, progress.done())
            first += len(content)
        if not first:
            raise UserError(f"{self.label} has no rows")


def digest(*parts: Any) -> str:
    """Of values that JSON has."""
    return xxhash.xxh3_128(json.dumps(parts, default=str).encode()).hexdigest()


@dataclass
class LocalRows(RowFile):
    """Rows of one file, or of several as if they were one.

    Attributes:
        paths: of the files, in order.
        delimiter: between the cells of a line; None is each kind's own.
        rows_at: path of the lists that hold the rows inside of what a file has.
        start, stop: first row and the one after the last; to the end where it is None.
    """

    paths: Sequence[Path]
    delimiter: str | None = None
    rows_at: str | None = None
    start: int = 0
    stop: int | None = None

    @cached_property
    def fingerprint(self) -> str:
        contents = []
        for path in self.paths:
            content = xxhash.xxh3_128()
            try:
                with path.open("rb") as file:
                    while block := file.read(BUFFER):
                        content.update(block)
            except OSError as error:
                raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
            contents.append([kind_of(path.name), path.suffix.lower(), content.hexdigest()])
        return digest(contents, self.delimiter, self.rows_at, self.start, self.stop)

    def items(self, progress: Progress) -> Iterator[Any]:
        return islice(self._all(progress), self.start, self.stop)

    def _all(self, progress: Progress) -> Iterator[Any]:
        sizes = [path.stat().st_size for path in self.paths]
        total, before = max(1, sum(sizes)), 0
        for path, size in zip(self.paths, sizes, strict=True):
            reading = Reading(path, self.delimiter, self.rows_at)
            progress.done = _share(reading, before, size, total)
            yield from read(reading)
            before += size
        progress.done = lambda: 1.0


def _share(reading: Reading, before: int, size: int, total: int) -> Callable[[], float]:
    return lambda: (before + size * reading.done()) / total


@dataclass
class DatasetRows(RowFile):
    """Rows of a data set of `datasets`, which maps it into memory.

    Attributes:
        data: the data set.
        rows_at: path of the lists that hold the rows inside of what the data set has.
    """

    data: Any
    rows_at: str | None = None

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.data._fingerprint, self.rows_at)

    def items(self, progress: Progress) -> Iterator[Any]:
        rows = self._all(progress)
        return rows if self.rows_at is None else json_rows.nested(rows, self.rows_at, self.label)

    def _all(self, progress: Progress) -> Iterator[Any]:
        total, count = max(1, len(self.data)), 0
        progress.done = lambda: count / total
        classes = _classes(self.data)
        for table in self.data.with_format("arrow").iter(BATCH):
            for row in table.to_pylist():
                count += 1
                yield with_names(row, classes)


@dataclass
class StreamedRows(RowFile):
    """Rows of a data set that comes over the network as it is read, and is not kept.

    Attributes:
        data: the data set.
        origin: what names it, since its content is not known beforehand: its address, configuration and split, and the
            commits (of local files the times) of its files.
        rows_at: path of the lists that hold the rows inside of what the data set has.
        size: how many rows it has, as far as that is known.
    """

    data: Any
    origin: tuple[Any, ...] = ()
    rows_at: str | None = None
    size: int | None = None

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.origin, self.rows_at)

    def items(self, progress: Progress) -> Iterator[Any]:
        rows = self._all(progress)
        return rows if self.rows_at is None else json_rows.nested(rows, self.rows_at, self.label)

    def _all(self, progress: Progress) -> Iterator[Any]:
        count = 0
        progress.done = lambda: min(1.0, count / self.size) if self.size else 0.0
        rows, classes = iter(self.data), _classes(self.data)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the hub client, fsspec and datasets raise unrelated kinds
                raise UserError(f"{self.label}: row {count} cannot be read: {reason(error)}") from error
            count += 1
            yield with_names(row, classes)


def _classes(data: Any) -> dict[str, list[str]]:
    """The columns of a data set of `datasets` whose numbers stand for names."""
    from datasets import ClassLabel

    return {name: feature.names for name, feature in (data.features or {}).items() if isinstance(feature, ClassLabel)}


@dataclass
class MemoryRows(RowFile):
    """Rows that are there already, as those of the built-in world."""

    rows: Sequence[Any] = field(default_factory=list)

    @cached_property
    def fingerprint(self) -> str:
        return digest(self.rows)

    def items(self, progress: Progress) -> Iterator[Any]:
        total, count = max(1, len(self.rows)), 0
        progress.done = lambda: count / total
        for row in self.rows:
            count += 1
            yield row
