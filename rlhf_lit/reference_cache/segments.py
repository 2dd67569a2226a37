"""Segments: immutable Arrow files of rows and their log-probs, written whole or not at all.

A segment's name is the checksum of its bytes, so that a torn, truncated or changed one is known by reading it once;
that it belongs to its reference stands inside. It is mapped into memory, and its values are never copied.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa  # type: ignore[import-untyped]
import xxhash

from rlhf_lit.files import atomic

NAME = re.compile(r"[0-9a-f]{32}\.arrow")
KEY_BYTES = 16
FORMAT = b"reference log-probs 1"
COLUMNS = pa.schema(
    [
        pa.field("key", pa.binary(KEY_BYTES), nullable=False),
        pa.field("logprobs", pa.list_(pa.field("item", pa.float32(), nullable=False)), nullable=False),
    ]
)


class NoSegment(Exception):
    """A file that is not to be trusted; says why in a few words."""


@dataclass(frozen=True)
class Segment:
    """One file, mapped.

    Attributes:
        file: where it is.
        keys: [rows] 16 bytes each.
        starts: [rows + 1] where each row's values start.
        values: [tokens] float32, log π₀ of the masked tokens, row after row.
    """

    file: Path
    keys: list[bytes]
    starts: Any
    values: Any

    def row(self, row: int) -> Any:
        """[tokens] a row's values, in the file's own memory."""
        return self.values[self.starts[row] : self.starts[row + 1]]


def write(folder: Path, reference: str, keys: Sequence[bytes], logprobs: Sequence[Any]) -> Path:
    """A new segment, under a name of its own until it is whole.

    Args:
        folder: where.
        reference: digest of the reference.
        keys: [rows] 16 bytes each.
        logprobs: [rows] float32 arrays.
    """
    starts = np.cumsum([0, *map(len, logprobs)], dtype=np.int32)
    values = np.concatenate([np.zeros(0, np.float32), *logprobs])
    schema = COLUMNS.with_metadata({b"format": FORMAT, b"reference": reference.encode()})
    columns = [pa.array(keys, pa.binary(KEY_BYTES)), pa.ListArray.from_arrays(starts, values, COLUMNS.field(1).type)]
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.record_batch(columns, schema=schema))
    content = sink.getvalue()
    file = folder / f"{xxhash.xxh3_128_hexdigest(content)}.arrow"
    with atomic(file, shared=True) as partial, partial.open("wb") as stream:
        stream.write(content)
    return file


def read(file: Path, reference: str) -> Segment:
    """A segment of a reference, checked byte by byte.

    Raises:
        NoSegment: it is none of ours, of another reference, torn, or changed.
    """
    try:
        # Closing the file leaves the mapping to those who hold it, and a descriptor less open.
        with pa.memory_map(str(file)) as source:
            content = source.read_buffer()
        if xxhash.xxh3_128_hexdigest(content) != file.stem:
            raise NoSegment("torn, changed or not ours: its name is not the checksum of its content")
        batch = _only_batch(content, reference)
    except (OSError, pa.ArrowException) as error:
        raise NoSegment(str(error).splitlines()[0]) from None
    key, logprobs = batch.columns
    flat = key.buffers()[1].to_pybytes() if len(key) else b""
    keys = [flat[at : at + KEY_BYTES] for at in range(0, len(flat), KEY_BYTES)][: len(key)]
    return Segment(file, keys, logprobs.offsets.to_numpy(), logprobs.values.to_numpy())


def _only_batch(content: Any, reference: str) -> Any:
    stream = pa.ipc.open_file(content)
    metadata = stream.schema.metadata or {}
    if metadata.get(b"format") != FORMAT or not stream.schema.equals(COLUMNS) or stream.num_record_batches != 1:
        raise NoSegment("of another format")
    if metadata.get(b"reference") != reference.encode():
        raise NoSegment("of another reference")
    return stream.get_batch(0)


def count_rows(file: Path) -> int:
    """Rows of a segment by its own account, unchecked; 0 where it has none to give."""
    try:
        with pa.memory_map(str(file)) as source:
            return pa.ipc.open_file(source).get_batch(0).num_rows
    except (OSError, ValueError, pa.ArrowException):
        return 0
