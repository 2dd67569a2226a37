"""Where the rows of a batch are cut into groups that go through the device at once: micro-batches, scoring passes."""

from __future__ import annotations

from bisect import bisect_left
from itertools import pairwise

import torch
from torch import Tensor

# A pass without gradients keeps no activations, so more padded tokens fit than in a training micro-batch.
SCORING_BUDGET = 4
# What a group of padded rows costs besides its tokens, as a part of the budget: few tokens use a device badly.
GROUP_COST = 1 / 16


def cut_by_tokens(lengths: Tensor, budget: int, packed: bool = False) -> list[Tensor]:
    """Groups of rows, longest first, each of at most ``budget`` tokens.

    Args:
        lengths: [rows] cost of each row in tokens.
        budget: tokens per group; a single row longer than that forms a group of its own.
        packed: rows stand behind one another, and a group holds the sum of their lengths; else they are padded, and it
            holds rows × longest row.

    Returns:
        Index tensors that partition ``range(rows)``: of all cuts of the sorted rows, where padded that with the least
        tokens and groups together, a group counted as a sixteenth of the budget; where packed that with the fewest
        groups, as alike as can be.
    """
    return cut_groups(lengths, torch.ones_like(lengths), budget, lengths if packed else None)


def cut_groups(lengths: Tensor, sizes: Tensor, budget: int, packed: Tensor | None = None) -> list[Tensor]:
    """``cut_by_tokens`` for rows of several sequences each: (all sequences of a group) × (the longest) ≤ ``budget``.

    Args:
        lengths: [rows] the longest sequence of each row.
        sizes: [rows] how many sequences it has.
        budget: tokens per group; a single row that needs more forms a group of its own.
        packed: [rows] the tokens of a row, where a group holds their sum.

    Returns:
        Index tensors that partition ``range(rows)``.
    """
    _check(budget)
    order = torch.argsort(lengths if packed is None else packed, descending=True, stable=True)
    before = (sizes if packed is None else packed)[order].cpu().cumsum(0).double()  # sequences, or tokens
    before = torch.cat([torch.zeros(1, dtype=torch.float64), before])
    longest = lengths[order].cpu().double() if packed is None else torch.ones(len(order), dtype=torch.float64)
    # The least cost of the first so many rows, and where their last group begins.
    least = torch.zeros(len(order) + 1, dtype=torch.float64)
    begins = [0] * (len(order) + 1)
    first = 0  # the earliest row that a group may begin with to end at the row at hand
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


def cut_responses(lengths: Tensor, leader: Tensor, prompts: Tensor, budget: int) -> list[Tensor]:
    """``cut_by_tokens`` for packed responses, where a prompt that several of a group begin with is there once.

    Args:
        lengths: [rows] tokens of prompt and response.
        leader, prompts: [rows] the first row that has a row's prompt, and the prompt's tokens
            (``batches.same_prompts``).
        budget: tokens per group; a single row longer than that forms a group of its own.

    Returns:
        Index tensors that partition ``range(rows)``; where prompts are shared, those of a prompt behind one another, in
        the fewest groups and these as alike as can be.
    """
    _check(budget)
    if len(leader.unique()) == len(leader):
        return cut_by_tokens(lengths, budget, packed=True)
    order = torch.argsort(leader, stable=True)
    rows = list(zip(*(x[order].tolist() for x in (leader, prompts, lengths)), strict=True))

    def ends(limit: int) -> list[int]:
        """Where groups end that are filled one after the other."""
        found, used, present = [], 0, -1
        for place, (first, shared, length) in enumerate(rows):
            cost = length - shared if first == present else length
            if used and used + cost > limit:
                found.append(place)
                used, cost = 0, length
            used, present = used + cost, first
        return [*found, len(rows)]

    fewest = len(ends(budget))
    least = bisect_left(range(1, budget), True, key=lambda limit: len(ends(limit)) <= fewest) + 1
    return list(order.tensor_split(ends(least)[:-1]))


def _check(budget: int) -> None:
    if budget < 1:
        raise ValueError(f"micro_batch_tokens must be at least 1, not {budget}")


def no_rows() -> Tensor:
    """A group without any."""
    return torch.zeros(0, dtype=torch.int64)
