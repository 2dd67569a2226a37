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

from rlhf_lit.batches.micro_batches import cut_by_tokens, cut_responses


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

    def cut_responses(self, budget: int, packed: bool = False) -> list[Tensor]:
        """Groups of rows of at most ``budget`` tokens: ``micro_batches.cut_responses`` where ``packed``, else
        ``micro_batches.cut_by_tokens``."""
        lengths = self.lengths.cpu()
        return cut_responses(lengths, *same_prompts(self), budget) if packed else cut_by_tokens(lengths, budget)

    def __len__(self) -> int:
        return len(self.lengths)


def same_prompts(sequences: Sequences) -> tuple[Tensor, Tensor]:
    """Rows that begin with the same prompt, which is all before the first token whose log-prob counts.

    Returns:
        On the CPU, [rows] int64 each: the first row that has a row's prompt, and the prompt's tokens. A row without a
        prompt has its own number, and 0.
    """
    tokens, mask = sequences.tokens.cpu(), sequences.mask.cpu()
    rows, width = tokens.shape
    alone = torch.arange(rows)
    if not rows * width:
        return alone, torch.zeros_like(alone)
    prompt = mask.int().argmax(-1)
    inside = torch.arange(width)[None] < prompt[:, None]
    _, group = torch.unique(torch.where(inside, tokens, -1), dim=0, return_inverse=True)
    first = torch.full_like(group, rows).scatter_reduce(0, group, alone, "amin")
    return torch.where(prompt == 0, alone, first[group]), prompt


def common_prefix(chosen: Sequences, rejected: Sequences) -> Tensor:
    """[pairs] how many tokens both sides begin with."""
    width = min(chosen.tokens.shape[1], rejected.tokens.shape[1])
    equal = chosen.tokens[:, :width] == rejected.tokens[:, :width]
    length = torch.minimum(chosen.lengths, rejected.lengths)
    real = torch.arange(width, device=equal.device)[None] < length[:, None]
    return (equal & real).long().cumprod(-1).sum(-1)
