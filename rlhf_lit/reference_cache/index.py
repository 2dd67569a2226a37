"""Where each row of a reference stands: an index in memory over the segments of its folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from rlhf_lit.errors import say
from rlhf_lit.reference_cache import segments
from rlhf_lit.reference_cache.segments import NoSegment, Segment

# Segments and their rows are numbered in one integer, segment · ROWS + row: a third less memory than two.
ROWS = 2**32


@dataclass(frozen=True)
class Key:
    """What a row is found by.

    Attributes:
        digest: 16 bytes, of its tokens and mask.
        tokens: how many of its tokens count.
    """

    digest: bytes
    tokens: int


# Which file stands under a name: its inode and when it was last written; None where there is none.
_Stamp = tuple[int, int] | None


def _stamp(file: Path) -> _Stamp:
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_mtime_ns


def key_of(tokens: Any, mask: Any) -> Key:
    """The key of a row that is not padded, of lists or of arrays."""
    ids, counted = np.ascontiguousarray(tokens, np.int64), np.ascontiguousarray(mask, np.bool_)
    assert ids.shape == counted.shape
    digest = xxhash.xxh3_128(ids.data)
    digest.update(counted.data)  # 8 bytes and 1 byte a token: where the one ends and the other starts is never in doubt
    return Key(digest.digest(), int(counted.sum()))


class Index:
    """The rows of one folder.

    Args:
        folder: of the reference; it need not exist.
        reference: the reference's digest.
    """

    def __init__(self, folder: Path, reference: str) -> None:
        self.folder = folder
        self.reference = reference
        # Files that are not used, each said once, as they were then: a rebuilt segment may have the name of a torn one.
        self._distrusted: dict[Path, _Stamp] = {}
        self._segments: list[Segment] = []
        self._places: dict[bytes, int] = {}

    def __len__(self) -> int:
        return len(self._places)

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(segment.file.stat().st_size for segment in self._segments if segment.file.exists())

    def refresh(self) -> None:
        """Map the segments that are new, and check them."""
        known = {segment.file for segment in self._segments} | set(self.distrusted())
        for file in sorted(self.folder.glob("*.arrow")):
            if file not in known:
                stamp = _stamp(file)
                try:
                    self._add(segments.read(file, self.reference))
                except NoSegment as reason:
                    if stamp:  # and was not cleared away this moment
                        self._distrust(file, stamp, str(reason))

    def distrusted(self) -> list[Path]:
        """Files that are there and not used."""
        return [file for file, stamp in self._distrusted.items() if _stamp(file) == stamp]

    def find(self, key: Key) -> Any:
        """[tokens] float32 log π₀ of a row's counted tokens, in the file's own memory; None where it is not there.

        A segment that has another number of values than the row has tokens is used no more, for any row.
        """
        while (place := self._places.get(key.digest)) is not None:
            number, row = divmod(place, ROWS)
            segment = self._segments[number]
            values = segment.row(row)
            if len(values) == key.tokens:
                return values
            self._distrust(segment.file, _stamp(segment.file), f"it has {len(values)} values for {key.tokens} tokens")
            kept = [other for other in self._segments if other is not segment]
            self._segments, self._places = [], {}
            for other in kept:
                self._add(other)
        return None

    def absent(self, keys: Sequence[Key]) -> list[int]:
        """Which keys are not there; of equal ones the first."""
        first: dict[bytes, int] = {}
        for i, key in enumerate(keys):
            if key.digest not in first and self.find(key) is None:
                first[key.digest] = i
        return list(first.values())

    def _add(self, segment: Segment) -> None:
        start = len(self._segments) * ROWS
        self._segments.append(segment)
        self._places |= {key: start + row for row, key in enumerate(segment.keys)}

    def _distrust(self, file: Path, stamp: _Stamp, reason: str) -> None:
        self._distrusted[file] = stamp
        say(f"warning: {file} is not used, and its rows are computed anew where they are needed: {reason}")
