"""Cutting rows into groups that go through the device at once."""

import itertools
import math

import pytest
import torch

from rlhf_lit.batches.micro_batches import cut_by_tokens


def test_groups_partition_the_rows_within_the_budget() -> None:
    lengths = torch.tensor([3, 9, 1, 4, 9, 2, 7])
    for budget in (1, 5, 9, 18, 20, 1000):
        groups = cut_by_tokens(lengths, budget)
        assert sorted(torch.cat(groups).tolist()) == list(range(7))
        for group in groups:
            assert len(group) == 1 or len(group) * int(lengths[group].max()) <= budget


def test_groups_are_longest_first() -> None:
    groups = cut_by_tokens(torch.tensor([2, 8, 4, 4]), 8)
    assert [group.tolist() for group in groups] == [[1], [2, 3], [0]]


def test_of_all_cuts_it_is_the_one_with_the_least_padding_and_fewest_groups() -> None:
    """Against every cut of the sorted rows, a group counted as a sixteenth of the budget."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for budget in (16, 40, 100, 400, 1200, 5000):
        for _ in range(20):
            lengths = torch.randint(1, 7, (8,), generator=generator) ** 2
            ordered = lengths.sort(descending=True).values.tolist()

            def cost(groups: list[list[int]], budget: int = budget) -> float:
                fits = all(len(group) == 1 or len(group) * group[0] <= budget for group in groups)
                return sum(len(group) * group[0] + budget / 16 for group in groups) if fits else math.inf

            every = []
            for bars in itertools.product((False, True), repeat=7):
                starts = [0, *(i + 1 for i, bar in enumerate(bars) if bar), 8]
                every.append([ordered[a:b] for a, b in itertools.pairwise(starts)])
            found = [lengths[group].tolist() for group in cut_by_tokens(lengths, budget)]
            assert cost(found) == pytest.approx(min(map(cost, every)))
            seen.add(len(found))
    assert len(seen) > 4


def test_a_budget_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        cut_by_tokens(torch.tensor([1]), 0)
