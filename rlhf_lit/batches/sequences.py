"""Token sequences, and what every batch record can do.

Two conventions hold everywhere:

* **Aligned to the token.** A per-token tensor (mask, log-prob, value, advantage) has the shape ``[rows, time]`` of the
  tokens, and its entry ``t`` speaks about token ``t``: the log-prob of token ``t`` given the tokens before it, the
  value of the state in which token ``t`` was chosen.
* **Lengths, never pad ids.** Sequences are padded on the right with an arbitrary valid id; what is real is told by
  ``lengths`` and ``mask``, made when a sequence is built. Nothing asks ``token == pad_id`` (with pad == eos that drops
  the EOS action).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from rlhf_lit.batches.micro_batches import Layout, cut_groups, cut_units


class Record:
    """A dataclass of tensors that knows how to move and to be cut by rows."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """The same record on another device (what Lightning's batch transfer calls)."""
        moved = {
            f.name: value.to(device, non_blocking=non_blocking)
            for f in fields(self)  # type: ignore[arg-type]
            if isinstance(value := getattr(self, f.name), Tensor | Record)
        }
        return replace(self, **moved)  # type: ignore[type-var]

    def select(self, rows: Tensor) -> Self:
        """The given rows, in the given order."""
        chosen: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Record):
                chosen[f.name] = value.select(rows)
            elif isinstance(value, Tensor):
                chosen[f.name] = value[rows.to(value.device)]
            elif isinstance(value, tuple):
                chosen[f.name] = tuple(value[i] for i in rows.tolist())
        return replace(self, **chosen)  # type: ignore[type-var]


def _widen(x: Tensor, width: int) -> Tensor:
    """[rows, time] padded with zeros on the right to ``width`` columns."""
    return torch.nn.functional.pad(x, (0, width - x.shape[1]))


def _narrow(x: Tensor | None, sequences: Sequences) -> Tensor | None:
    """[rows, time] cut to the width of the sequences it belongs to."""
    return None if x is None else x[:, : sequences.tokens.shape[1]]


@dataclass(frozen=True)
class Sequences(Record):
    """Right-padded token sequences.

    Attributes:
        tokens: [rows, time] int64.
        lengths: [rows] int64, real tokens of each row.
        mask: [rows, time] bool, True on the tokens whose log-prob counts (supervised labels, response tokens). The
            first token of a row is never one: nothing predicts it.
    """

    tokens: Tensor
    lengths: Tensor
    mask: Tensor

    @classmethod
    def pad(cls, tokens: Sequence[Sequence[int]], masks: Sequence[Sequence[bool]]) -> Sequences:
        """Right-pad ragged rows; ``masks`` has the shape of ``tokens``."""
        lengths = torch.tensor([len(row) for row in tokens], dtype=torch.int64)
        width = int(lengths.max()) if len(tokens) else 0
        padded = torch.zeros(len(tokens), width, dtype=torch.int64)
        mask = torch.zeros(len(tokens), width, dtype=torch.bool)
        for i, (row, row_mask) in enumerate(zip(tokens, masks, strict=True)):
            padded[i, : len(row)] = torch.tensor(row, dtype=torch.int64)
            mask[i, : len(row)] = torch.tensor(row_mask, dtype=torch.bool)
        return cls(padded, lengths, mask)

    @classmethod
    def dummy(cls, device: torch.device, rows: int = 1) -> Sequences:
        """Dummy rows of two tokens, so that all ranks run the same number of passes through a sharded model."""
        mask = torch.tensor([[False, True]] * rows, device=device)
        return cls(torch.zeros_like(mask, dtype=torch.int64), torch.full((rows,), 2, device=device), mask)

    def part(self, rows: Tensor) -> Sequences:
        """The given rows; a dummy row where none is given."""
        return self.select(rows) if len(rows) else self.dummy(self.tokens.device)

    def select(self, rows: Tensor) -> Sequences:
        """The given rows, trimmed to the longest of them."""
        lengths = self.lengths[rows.to(self.lengths.device)]
        width = int(lengths.max()) if len(rows) else 0
        rows = rows.to(self.tokens.device)
        return Sequences(self.tokens[rows, :width], lengths, self.mask[rows, :width])

    def join(self, other: Sequences) -> Sequences:
        """These rows, then the other's, padded to the wider of the two."""
        width = max(self.tokens.shape[1], other.tokens.shape[1])
        return Sequences(
            torch.cat([_widen(self.tokens, width), _widen(other.tokens, width)]),
            torch.cat([self.lengths, other.lengths]),
            torch.cat([_widen(self.mask, width), _widen(other.mask, width)]),
        )

    def cut_responses(self, budget: int, layout: Layout = "padded") -> list[Tensor]:
        """Groups of rows of at most ``budget`` tokens each, on the CPU; a longer row is a group of its own."""
        return self.cut_units(torch.arange(len(self)), budget, layout)

    def cut_units(self, unit: Tensor, budget: int, layout: Layout = "padded") -> list[Tensor]:
        """The same for units of several rows that stay together: pairs, or all answers to a prompt.

        Args:
            unit: [rows] int64 on the CPU, the unit of each row; every one of 0, 1, … has a row at least.
            budget: tokens per group.
            layout: how a group is laid out.

        Returns:
            Index tensors that partition the units.
        """
        lengths = self.lengths.cpu()
        if layout == "shared":
            return cut_units(lengths, unit, *same_prompts(self), budget)
        sizes = torch.bincount(unit)
        longest = torch.zeros_like(sizes).scatter_reduce(0, unit, lengths, "amax")
        tokens = torch.zeros_like(sizes).index_add(0, unit, lengths)
        return cut_groups(longest, sizes, budget, tokens if layout == "packed" else None)

    def __len__(self) -> int:
        return len(self.lengths)


def same_prompts(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Rows that begin with the same prompt: equal tokens before the first one whose log-prob counts.

    Returns:
        On the CPU, [rows] int64 each: the first row with the same prompt, and the prompt's tokens. A row without a
        prompt, or whose prompt is a lone token (BOS, where whole texts are learned), has its own number, and 0.
    """
    if not sequences.mask.numel():
        alone = torch.arange(len(sequences))
        return alone, torch.zeros_like(alone)
    lengths = sequences.mask.int().argmax(-1).cpu()
    lengths = torch.where(lengths > 1, lengths, 0)
    tokens, prompts = sequences.tokens.cpu().numpy(), lengths.tolist()
    seen: dict[bytes, int] = {}
    leader = [seen.setdefault(tokens[i, :n].tobytes(), i) if n else i for i, n in enumerate(prompts)]
    return torch.tensor(leader), lengths
