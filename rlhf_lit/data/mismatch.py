"""Responses beside prompts that are not theirs: what KTO's z is estimated from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xxhash

from rlhf_lit.data.store import Rows
from rlhf_lit.errors import UserError


class MismatchedRows(Rows):
    """The rows, each with its prompt and another's response as ``mismatched`` and ``mismatched_mask``.

    The other is the first row after it (around the end where need be) that has another prompt and whose response fits;
    where none fits, the shortest response with another prompt, cut.

    Args:
        rows: with ``tokens`` and ``mask``, as ``UnpairedDataModule.row`` makes them.
        max_length: of prompt and response, in tokens.

    Raises:
        UserError: all rows have one prompt.
    """

    def __init__(self, rows: Rows, max_length: int) -> None:
        self.rows = rows
        self.max_length = max_length
        starts, lengths, prompts = [], [], []
        for row in rows:
            tokens = row["tokens"]
            start = row["mask"].index(True)
            starts.append(start)
            lengths.append(len(tokens) - start)
            prompts.append(xxhash.xxh3_64_intdigest(np.asarray(tokens[:start], dtype=np.int32).tobytes()))
        self.others = _others(starts, lengths, prompts, max_length)

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, place: int) -> Mapping[str, Any]:
        row, other = self.rows.row(place), self.rows.row(int(self.others[place]))
        prompt = row["tokens"][: row["mask"].index(True)]
        answer = other["tokens"][other["mask"].index(True) :][: max(1, self.max_length - len(prompt))]
        mask = [False] * len(prompt) + [True] * len(answer)
        return {**row, "mismatched": prompt + answer, "mismatched_mask": mask}


def _others(starts: list[int], lengths: list[int], prompts: list[int], max_length: int) -> np.ndarray:
    """Of each row, which one lends it its response. Prompts are told apart by their digests."""
    count = len(prompts)
    if len(set(prompts)) < 2:
        raise UserError(
            "data: KTO compares each response with one to another prompt, and all rows have the same prompt"
        )
    shortest = sorted(range(count), key=lambda i: lengths[i])
    others = np.empty(count, dtype=np.int64)
    for i in range(count):
        other = next(j for j in shortest if prompts[j] != prompts[i])
        if starts[i] + lengths[other] <= max_length:  # else none fits, and no row need be looked at
            following = (j % count for j in range(i + 1, i + count))
            other = next(j for j in following if prompts[j] != prompts[i] and starts[i] + lengths[j] <= max_length)
        others[i] = other
    return others
