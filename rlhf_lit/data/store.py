"""Tokenised rows in an Arrow file that is memory-mapped: no row is held in memory, and a second start reads none."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import chain, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np

from rlhf_lit.errors import UserError

if TYPE_CHECKING:  # else where it is used: a wrong key of a configuration is told without it
    import pyarrow as pa  # type: ignore[import-untyped]

ColumnType = Literal["tokens", "mask", "token lists", "masks", "ranks", "numbers", "number", "flag", "text"]
"""Of a column: tokens and mask of one sequence, those of several; integers, floats, one float, one bool; text."""

ColumnTypes = Mapping[str, ColumnType]

DTYPES = {"int32": np.int32, "int64": np.int64, "double": np.float64, "bool": np.bool_}
_SUMMARY = b"summary"
_as_json = json.JSONEncoder(ensure_ascii=False, default=str).encode


def schema_of(columns: ColumnTypes) -> pa.Schema:
    """The Arrow schema of rows with these columns, their number in the data file, and the row as the file has it."""
    import pyarrow as pa

    tokens, mask = pa.list_(pa.int32()), pa.list_(pa.bool_())
    types: dict[ColumnType, pa.DataType] = {
        "tokens": tokens,
        "mask": mask,
        "token lists": pa.list_(tokens),
        "masks": pa.list_(mask),
        "ranks": pa.list_(pa.int32()),
        "numbers": pa.list_(pa.float64()),
        "number": pa.float64(),
        "flag": pa.bool_(),
        "text": pa.string(),
    }
    own = {"row": pa.int64(), "source": pa.string()}
    return pa.schema([*((name, types[kind]) for name, kind in columns.items()), *own.items()])


# Arrays are made of and read from Arrow's buffers: `pyarrow.array` and `to_numpy` import pandas, which takes as long as
# thousands of rows.


def record_batch(rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> pa.RecordBatch:
    """Rows as Arrow has them; a ``source`` becomes JSON, in which a date, say, is text."""
    import pyarrow as pa

    columns = [
        _array([_as_json(row["source"]) if field.name == "source" else row[field.name] for row in rows], field.type)
        for field in schema
    ]
    return pa.RecordBatch.from_arrays(columns, schema=schema)


def _array(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
    """An array of values, none of which is null."""
    import pyarrow as pa

    count = len(values)
    if pa.types.is_list(kind):
        offsets, inner = _offsets(values), _array(list(chain.from_iterable(values)), kind.value_type)
        return pa.Array.from_buffers(kind, count, [None, offsets], children=[inner])
    if pa.types.is_string(kind):
        texts = [value.encode() for value in values]
        return pa.Array.from_buffers(kind, count, [None, _offsets(texts), pa.py_buffer(b"".join(texts))])
    numbers: np.ndarray = np.fromiter(values, DTYPES[str(kind)], count)
    data = np.packbits(numbers, bitorder="little") if pa.types.is_boolean(kind) else numbers
    return pa.Array.from_buffers(kind, count, [None, pa.py_buffer(data)])


def _offsets(values: Sequence[Any]) -> pa.Buffer:
    """Where each value begins in all of them together, and where the last one ends."""
    import pyarrow as pa

    ends = np.zeros(len(values) + 1, np.int64)
    np.cumsum([len(value) for value in values], out=ends[1:])
    return pa.py_buffer(ends.astype(np.int32))


def _values(array: pa.Array, start: int, end: int) -> list[Any]:
    """Entries [start, end) of an array without nulls."""
    import pyarrow as pa

    if start == end:
        return []
    if pa.types.is_string(array.type):
        return [array[place].as_py() for place in range(start, end)]
    data, start, end = array.buffers()[1], array.offset + start, array.offset + end
    if pa.types.is_list(array.type):
        offsets = np.frombuffer(data, np.int32)[start : end + 1].tolist()
        return [_values(array.values, *part) for part in pairwise(offsets)]
    if pa.types.is_boolean(array.type):
        whole = np.frombuffer(data, np.uint8)[start // 8 : -(-end // 8)]
        bits = np.unpackbits(whole, bitorder="little").view(np.bool_)
        return bits[start % 8 :][: end - start].tolist()
    return np.frombuffer(data, DTYPES[str(array.type)])[start:end].tolist()


def write(path: Path, schema: pa.Schema, batches: Iterator[pa.RecordBatch], summary: Callable[[], object]) -> None:
    """Write a store.

    Args:
        path: the file to be.
        schema: of all batches.
        batches: the rows.
        summary: asked once they are all written: what is to be known of them, as JSON has it.

    Raises:
        OSError: it cannot be written there.
    """
    import pyarrow as pa

    with path.open("wb") as file, pa.ipc.new_file(file, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
        # The file's last word, so that it tells of all rows.
        writer.write_batch(record_batch([], schema), {_SUMMARY: json.dumps(summary())})


class StoredRow(Mapping[str, Any]):
    """One row, whose columns are read when they are asked for: tokens as lists of int, masks of bool."""

    __slots__ = ("_batch", "_place")

    def __init__(self, batch: pa.RecordBatch, place: int) -> None:
        self._batch = batch
        self._place = place

    def __getitem__(self, name: str) -> Any:
        index = self._batch.schema.get_field_index(name)
        if index < 0:
            raise KeyError(name)
        (value,) = _values(self._batch.column(index), self._place, self._place + 1)
        return json.loads(value) if name == "source" else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._batch.schema.names)

    def __len__(self) -> int:
        return len(self._batch.schema.names)


class Rows(Sequence[Mapping[str, Any]]):
    """Rows of which some can be chosen without reading them."""

    def select(self, places: np.ndarray) -> Rows:
        """The rows at the given places, in the given order."""
        return ChosenRows(self, np.asarray(places, dtype=np.int64))

    def row(self, place: int) -> Mapping[str, Any]:
        """The row at ``place`` ≥ 0."""
        raise NotImplementedError

    @overload
    def __getitem__(self, place: int) -> Mapping[str, Any]: ...
    @overload
    def __getitem__(self, place: slice) -> Rows: ...
    def __getitem__(self, place: int | slice) -> Mapping[str, Any] | Rows:
        if isinstance(place, slice):
            return self.select(np.arange(len(self))[place])
        if not -len(self) <= place < len(self):
            raise IndexError(place)
        return self.row(place % len(self))


class ArrowRows(Rows):
    """Rows in Arrow's own form.

    Args:
        batches: one after the other.
    """

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self.batches = batches
        self._ends = np.cumsum([batch.num_rows for batch in batches])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def row(self, place: int) -> StoredRow:
        number = int(np.searchsorted(self._ends, place, side="right"))
        batch = self.batches[number]
        return StoredRow(batch, place - int(self._ends[number]) + batch.num_rows)


class StoredRows(ArrowRows):
    """All rows of a store, memory-mapped.

    A copy in another process maps the file again: a pickle holds its path alone.

    Args:
        path: the file.

    Attributes:
        summary: what its writer said of the rows.

    Raises:
        OSError, pa.ArrowInvalid: it is no whole store.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        self.path = path
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        _, notes = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        if notes is None or _SUMMARY not in notes:
            raise pa.ArrowInvalid(f"{path} has no summary")
        self.summary: dict[str, Any] = json.loads(notes[_SUMMARY])
        super().__init__([reader.get_batch(i) for i in range(reader.num_record_batches)])

    def __reduce__(self) -> tuple[Any, ...]:
        return StoredRows, (self.path,)


class ChosenRows(Rows):
    """Rows at some places of others.

    Args:
        rows: those it chooses from.
        places: [chosen] int64, which ones.
    """

    def __init__(self, rows: Rows, places: np.ndarray) -> None:
        self.rows = rows
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def row(self, place: int) -> Mapping[str, Any]:
        return self.rows.row(int(self.places[place]))

    def select(self, places: np.ndarray) -> Rows:
        return ChosenRows(self.rows, self.places[places])


class JoinedRows(Rows):
    """The rows of several, one after the other."""

    def __init__(self, parts: Sequence[Rows]) -> None:
        self.parts = parts
        self._ends = np.cumsum([len(part) for part in parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def row(self, place: int) -> Mapping[str, Any]:
        number = int(np.searchsorted(self._ends, place, side="right"))
        return self.parts[number].row(place - int(self._ends[number]) + len(self.parts[number]))


def opened(path: Path) -> StoredRows | None:
    """The rows of a store; None where there is none, or no whole one."""
    import pyarrow as pa

    with suppress(OSError, ValueError, pa.ArrowException):
        return StoredRows(path)
    return None


def joined(parts: Sequence[Rows]) -> Rows:
    """The rows of all parts."""
    return parts[0] if len(parts) == 1 else JoinedRows(parts)


def held_out(rows: Rows, fraction: float, label: str) -> tuple[Rows, Rows]:
    """The rows that are left, and the fraction that is held out: the same ones whatever the run's seed, so that arms of
    a sweep are compared on the same rows.

    Raises:
        UserError: no row is left of those that messages call ``label``.
    """
    order = np.random.default_rng(0).permutation(len(rows))
    count = max(1, round(fraction * len(rows)))
    if count >= len(rows):
        raise UserError(
            f"data.validation_fraction: {label} has {len(rows)} {'row' if len(rows) == 1 else 'rows'}, of which none "
            "is left to train on; set data.validation"
        )
    return rows.select(np.sort(order[count:])), rows.select(np.sort(order[:count]))
