"""Where the rows of a batch are cut into groups that go through the device at once: micro-batches, scoring passes."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

# A pass without gradients keeps no activations, so more padded tokens fit than in a training micro-batch.
SCORING_BUDGET = 4
# How a group of rows goes through the device, which decides how many tokens it costs:
# "padded": each sequence in a row of its own, padded to the longest: sequences × longest.
# "packed": all sequences in one row, without padding: the sum of their lengths.
# "shared": packed, and a prompt that several of them begin with is computed once.
Layout = Literal["padded", "packed", "shared"]

# What a group of padded rows costs besides its tokens, as a part of the budget: few tokens use a device badly.
GROUP_COST = 1 / 16


def cut_by_tokens(lengths: Tensor, budget: int, layout: Layout = "padded") -> list[Tensor]:
    """Groups of rows of one sequence each, longest first, each group of at most ``budget`` tokens.

    Args:
        lengths: [rows] tokens of each row.
        budget: tokens per group; a single row longer than that forms a group of its own.
        layout: how a group is laid out; "shared" is as "packed", since lengths do not tell which prompts are the same.

    Returns:
        Index tensors that partition ``range(rows)``. Padded: of all cuts of the sorted rows, the one with the least
        tokens and groups together, a group counted as a sixteenth of the budget. Packed: the one with the fewest
        groups, as alike as can be.
    """
    return cut_groups(lengths, torch.ones_like(lengths), budget, None if layout == "padded" else lengths)


def cut_groups(lengths: Tensor, sizes: Tensor, budget: int, packed: Tensor | None = None) -> list[Tensor]:
    """``cut_by_tokens`` for rows of several sequences each: (all sequences of a group) × (the longest) ≤ ``budget``.

    Args:
        lengths: [rows] the longest sequence of each row.
        sizes: [rows] how many sequences it has.
        budget: tokens per group; a single row that needs more forms a group of its own.
        packed: [rows] all tokens of a row, where a group is packed and costs their sum.

    Returns:
        Index tensors that partition ``range(rows)``.
    """
    _check(budget)
    order = torch.argsort(lengths if packed is None else packed, descending=True, stable=True)
    before = (sizes if packed is None else packed)[order].cpu().cumsum(0).double()  # sequences, or tokens
    before = torch.cat([torch.zeros(1, dtype=torch.float64), before])
    longest = lengths[order].cpu().double() if packed is None else torch.ones(len(order), dtype=torch.float64)
    # All rows in one group cost no more than a second group would, or are the fewest there can be: nothing to compare.
    if len(order) and before[-1] * longest[0] <= budget * (GROUP_COST if packed is None else 1):
        return [order]
    # The least cost of the first so many rows, and where their last group begins.
    least = torch.zeros(len(order) + 1, dtype=torch.float64)
    begins = [0] * (len(order) + 1)
    first = 0  # the earliest row that a group ending here may begin with
    for end in range(1, len(order) + 1):
        while first < end - 1 and (before[end] - before[first]) * longest[first] > budget:
            first += 1
        tokens = (before[end] - before[first:end]) * longest[first:end]
        # Squares of parts of the budget are least where groups are alike, and together less than one group more.
        cost = tokens + GROUP_COST * budget if packed is None else (tokens / budget) ** 2 + len(order)
        costs = least[first:end] + cost
        begins[end] = first + int(costs.argmin())
        least[end] = costs[begins[end] - first]
    cuts = [len(order)]
    while cuts[-1]:
        cuts.append(begins[cuts[-1]])
    return [order[start:end] for start, end in pairwise(reversed(cuts))]


def cut_units(lengths: Tensor, unit: Tensor, leader: Tensor, prompts: Tensor, budget: int) -> list[Tensor]:
    """Groups of units in the layout "shared". A unit is one sequence, a pair, or all answers to a prompt.

    Args:
        lengths: [rows] tokens of each sequence, prompt and answer.
        unit: [rows] int64, the unit of each sequence; every one of 0, 1, … has a sequence at least.
        leader, prompts: [rows] the first row with the same prompt, and that prompt's tokens (``batches.same_prompts``).
        budget: tokens per group; a single unit that needs more forms a group of its own.

    Returns:
        Index tensors that partition the units. Where several begin with one prompt, they stand next to each other, in
        the fewest groups, as alike as can be; where none do, the groups are those of packed rows.
    """
    _check(budget)
    rows, count = torch.arange(len(unit)), int(unit.max()) + 1 if len(unit) else 0
    first = torch.full((count,), len(unit)).scatter_reduce(0, unit, rows, "amin")  # the first row of each unit
    prompt, head = prompts[first], leader[first]
    spared = prompts * ((leader == head[unit]) & (rows != first[unit]))
    tokens = torch.zeros(count, dtype=torch.int64).index_add(0, unit, lengths - spared)
    if len(head.unique()) == count:
        return cut_by_tokens(tokens, budget, "packed")
    order = torch.argsort(head, stable=True)
    return list(order.tensor_split(_cuts(head[order].tolist(), prompt[order].tolist(), tokens[order].tolist(), budget)))


def _cuts(heads: list[int], prompts: list[int], tokens: list[int], budget: int) -> list[int]:
    """Where to cut units in their given order: equal ``heads`` next to each other have a prompt in common."""
    rows = list(zip(heads, prompts, tokens, strict=True))

    def filled(limit: int) -> list[int]:
        """Where the next group begins, if each is filled up to the limit."""
        found, used, present = [], 0, -1
        for place, (head, shared, length) in enumerate(rows):
            cost = length - shared if head == present else length
            if used and used + cost > limit:
                found.append(place)
                used, cost = 0, length
            used, present = used + cost, head
        return found

    fewest = len(filled(budget))
    least = bisect_left(range(1, budget), True, key=lambda limit: len(filled(limit)) <= fewest) + 1
    return filled(least)


def _check(budget: int) -> None:
    if budget < 1:
        raise ValueError(f"micro_batch_tokens must be at least 1, not {budget}")


def no_rows() -> Tensor:
    """A group without any."""
    return torch.zeros(0, dtype=torch.int64)
