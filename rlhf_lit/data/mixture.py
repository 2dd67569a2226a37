"""In what order rows are learned from: a function of (seed, epoch), of one data set or of a weighted mixture."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_lit.randomness import permutation

Order = Callable[[int], Tensor]
"""From an epoch to the places of its rows, [rows] int64, in the order they are learned from."""


def shuffled(size: int) -> Order:
    """Every row once in each epoch."""
    return lambda epoch: permutation(size, "shuffle", epoch)


def shares(sizes: Sequence[int], weights: Sequence[float]) -> list[int]:
    """Rows that each data set gives to an epoch, which has as many as all sets together; by largest remainder."""
    total, weight = sum(sizes), sum(weights)
    exact = [total * w / weight for w in weights]
    counts = [int(rows) for rows in exact]
    by_remainder = sorted(range(len(exact)), key=lambda k: (counts[k] - exact[k], k))
    for k in by_remainder[: total - sum(counts)]:
        counts[k] += 1
    return counts


def mixed_order(sizes: Sequence[int], weights: Sequence[float]) -> Order:
    """Data sets that stand one after the other, mixed in the ratio of their weights.

    Each gives its share to every epoch, exactly. Its own rows are a stream of passes, each in an order of its own,
    which goes on where the epoch before left off: no row comes up a second time before all others of its set did.

    Args:
        sizes: rows of each data set.
        weights: of each, greater than 0.
    """
    counts = shares(sizes, weights)
    starts = [sum(sizes[:k]) for k in range(len(sizes))]

    def own_pass(k: int, number: int) -> Tensor:
        return starts[k] + permutation(sizes[k], "shuffle", number, k)

    def stream(k: int, epoch: int) -> Tensor:
        """The data set's rows of an epoch."""
        first, end = epoch * counts[k], (epoch + 1) * counts[k]
        passes = range(first // sizes[k], -(-end // sizes[k]))
        rows = torch.cat([own_pass(k, number) for number in passes] or [torch.empty(0, dtype=torch.int64)])
        return rows[first - passes.start * sizes[k] :][: counts[k]]

    def order(epoch: int) -> Tensor:
        rows = torch.cat([stream(k, epoch) for k in range(len(sizes))])
        return rows[permutation(len(rows), "shuffle", epoch)]

    return order


def in_shares(names: Sequence[str], sizes: Sequence[int], weights: Sequence[float]) -> str:
    """What each data set gives to an epoch, in words."""
    counts = shares(sizes, weights)
    parts = [
        f"{name} {count / sum(counts):.1%} ({count} of {size} rows, {count / size:.2f} passes)"
        for name, size, count in zip(names, sizes, counts, strict=True)
    ]
    return f"an epoch is {sum(counts)} rows: {', '.join(parts)}"
