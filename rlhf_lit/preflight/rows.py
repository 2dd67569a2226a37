"""Which rows are looked at, and how many of their tokens go through the models.

A model is asked the same of short rows as of long ones. So a pass takes a few hundred tokens, whatever the rows are
like: the first rows that are short enough, else the shortest; and where a check needs no whole rows (all but those of a
loss), long ones are cut to what surrounds the start of their answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import accumulate
from typing import Any

import torch

from rlhf_lit.batches import Batch, PromptBatch, Sequences

TOKEN_ROWS = 64  # rows whose tokens are read
MODEL_ROWS = 4  # rows (or pairs) that go through the models
SEQUENCES = 8  # of those rows, in one pass
MOVED_ROWS = 2  # of those sequences, that are looked at with a policy that was moved
PROMPTS = 8  # prompts that are answered and scored
ANSWER_TOKENS = 32  # longest answer to one of them
SHORT_ANSWER_TOKENS = 16  # the same, where nothing is learned from them
PASS_TOKENS = 512  # that go through a model in one pass, as far as rows can be chosen or cut so
FEWEST_TOKENS = 256  # the same, where an optimizer step has no more


@dataclass
class Looked:
    """What was looked at.

    Attributes:
        read: rows whose tokens were read.
        rows: rows, pairs or prompts that went through the models.
        tokens: of those, in one pass.
    """

    read: int = 0
    rows: int = 0
    tokens: int = 0

    def __str__(self) -> str:
        models = f"; {_count(self.rows, 'row')} through the models, {self.tokens:,} tokens a pass" if self.rows else ""
        return f"{_count(self.read, 'row')} read{models}"


@dataclass(frozen=True)
class ModelRows:
    """What goes through the models.

    Attributes:
        whole: rows as the run learns from them, for its loss.
        sequences: at most ``SEQUENCES`` of them or of others, cut where they are long.
        first: of the same rows, those of the first side (of pairs, the chosen ones).
        rows: how many rows they come from.
    """

    whole: Batch
    sequences: Sequences
    first: Sequences
    rows: int


def budget_of(step_tokens: float) -> int:
    """Tokens of a pass, for a run whose optimizer steps see so many on a rank: two of those cost more than all checks,
    which make some nine passes at most."""
    return int(min(PASS_TOKENS, max(FEWEST_TOKENS, step_tokens)))


def lengths_of(batch: Batch) -> list[int]:
    """Tokens of each row of a batch, of all its sequences together; 0 where one of them has nothing to learn."""
    lengths, rows = [0] * len(batch), batch.rows_of_answers().tolist()
    empty = set()
    for side in batch.answers():
        for row, length, learned in zip(rows, side.lengths.tolist(), side.mask.any(-1).tolist(), strict=True):
            lengths[row] += length
            empty |= set() if learned else {row}
    return [0 if row in empty else length for row, length in enumerate(lengths)]


def within(lengths: Sequence[int], most: int, budget: int, least: int = 1) -> list[int]:
    """The first rows that are no longer than their share of a budget; where there are too few of those, the shortest
    ones that keep to it together, and ``least`` in any case. Rows of length 0 are never chosen."""
    known = [row for row, length in enumerate(lengths) if length]
    fair = [row for row in known if lengths[row] <= budget // most][:most]
    if len(fair) == min(most, len(known)):
        return fair
    shortest = sorted(known, key=lengths.__getitem__)[:most]
    totals = accumulate(lengths[row] for row in shortest)
    return sorted(row for place, (row, total) in enumerate(zip(shortest, totals, strict=True))
                  if total <= budget or place < least)  # fmt: skip


def model_rows(batch: Batch, budget: int) -> ModelRows | None:
    """What of a batch goes through the models; None where no row has something to learn.

    Args:
        batch: the rows to choose from, on the CPU.
        budget: tokens of a pass.
    """
    lengths = lengths_of(batch)
    whole = within(lengths, MODEL_ROWS, budget)
    if not whole:
        return None
    several = sorted(
        sorted((row for row, length in enumerate(lengths) if length), key=lengths.__getitem__)[:MODEL_ROWS]
    )
    several = whole if len(whole) == len(several) else several
    sides = batch.select(torch.tensor(several)).answers()
    joined = reduce(Sequences.join, sides)
    joined = joined.select(torch.arange(min(SEQUENCES, len(joined))))
    share = max(2, budget // len(joined))
    first = sides[0].select(torch.arange(min(SEQUENCES, len(sides[0]))))
    return ModelRows(
        batch.select(torch.tensor(whole)), around_answers(joined, share), around_answers(first, share), len(several)
    )


def prompts_within(prompts: PromptBatch, answer: int, budget: int) -> PromptBatch:
    """Prompts that keep to twice a pass's tokens with answers of so many; two at least, since scores are compared."""
    lengths = [length + answer for length in prompts.prompts.lengths.tolist()]
    return prompts.select(torch.tensor(within(lengths, PROMPTS, 2 * budget, least=2)))


def around_answers(sequences: Sequences, most: int) -> Sequences:
    """Rows of at most ``most`` tokens: of longer ones, as much before the first masked token as from there on."""
    if int(sequences.lengths.max()) <= most:
        return sequences
    rows: list[list[Any]] = [[], []]
    first = sequences.mask.int().argmax(-1).tolist()
    for tokens, mask, length, answer in zip(
        sequences.tokens.tolist(), sequences.mask.tolist(), sequences.lengths.tolist(), first, strict=True
    ):
        start = max(0, min(answer - most // 2, length - most))
        rows[0].append(tokens[start : min(length, start + most)])
        rows[1].append([False, *mask[start + 1 : min(length, start + most)]])
    return Sequences.pad(*rows)


def _count(number: int, word: str) -> str:
    return f"{number:,} {word}{'' if number == 1 else 's'}"
