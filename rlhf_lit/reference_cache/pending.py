"""Rows that are computed and not yet in a segment."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rlhf_lit.errors import UserError
from rlhf_lit.reference_cache import segments

# A build that is killed loses what it has computed since its last segment: at most this long, or this many values.
SEGMENT_SECONDS = 60.0
SEGMENT_TOKENS = 2**24


class Pending:
    """What the next segment will hold.

    Args:
        folder: of the reference.
        reference: the reference's digest.
    """

    def __init__(self, folder: Path, reference: str) -> None:
        self.folder = folder
        self.reference = reference
        self._start()

    def _start(self) -> None:
        self.keys: list[bytes] = []
        self.logprobs: list[Any] = []
        self.tokens, self.since = 0, time.monotonic()

    def add(self, key: bytes, logprobs: Any) -> None:
        """One row: [tokens] float32."""
        self.keys.append(key)
        self.logprobs.append(logprobs)
        self.tokens += len(logprobs)

    def write_if_due(self) -> None:
        """Write a segment where a kill would lose too much."""
        if self.tokens >= SEGMENT_TOKENS or time.monotonic() - self.since >= SEGMENT_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what there is.

        Raises:
            UserError: the folder cannot be written to.
        """
        keys, logprobs = self.keys, self.logprobs
        self._start()
        if not keys:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)  # a rank on another machine may be the first there
            segments.write(self.folder, self.reference, keys, logprobs)
        except OSError as error:
            raise unwritable(self.folder, error) from None


def unwritable(folder: Path, error: OSError) -> UserError:
    """The one line for a folder that nothing can be written to."""
    return UserError(f"{folder}: cannot be written to: {error.strerror or error}; set another cache folder")
