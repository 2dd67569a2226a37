"""Batch records: padding, moving, prompts in common."""

import dataclasses
import itertools

import pytest
import tiny
import torch

from rlhf_lit.batches import ExperienceBatch, Layout, PreferenceBatch, RankedBatch, Sequences, same_prompts
from rlhf_lit.batches.micro_batches import cut_by_tokens


def test_pad_keeps_lengths_and_masks_not_pad_ids() -> None:
    s = Sequences.pad([[5, 0, 2], [2]], [[False, True, True], [False]])
    assert s.tokens.tolist() == [[5, 0, 2], [2, 0, 0]]
    assert s.lengths.tolist() == [3, 1]
    assert s.mask.tolist() == [[False, True, True], [False, False, False]]


def test_select_trims_to_the_longest_row_kept() -> None:
    s = tiny.sequences([(1, 2), (1, 8), (1, 1)]).select(torch.tensor([2, 0]))
    assert s.lengths.tolist() == [6, 7]
    assert s.tokens.shape == s.mask.shape == (2, 7)
    assert s.mask.sum(-1).tolist() == [2, 3]


def test_join_keeps_every_row_whole() -> None:
    a, b = tiny.sequences([(1, 2)]), tiny.sequences([(5, 5), (2, 2)], seed=1)
    joined = a.join(b)
    assert joined.lengths.tolist() == [*a.lengths.tolist(), *b.lengths.tolist()]
    assert joined.tokens[0, :7].tolist() == a.tokens[0].tolist()
    assert joined.tokens[1].tolist() == b.tokens[0].tolist()
    assert joined.mask.sum().item() == a.mask.sum().item() + b.mask.sum().item()


def test_micro_batches_hold_every_row_once_and_pairs_stay_together() -> None:
    batch = tiny.preferences(budget=40)
    pieces = list(batch.micro_batches())
    assert len(pieces) > 2
    assert sum(len(piece) for piece in pieces) == len(batch)
    for piece in pieces:
        width = max(piece.chosen.tokens.shape[1], piece.rejected.tokens.shape[1])
        assert len(piece) == 1 or 2 * len(piece) * width <= 40
        for row in range(len(piece)):  # the two sides share their prompt
            start = int(piece.chosen.mask[row].int().argmax())
            assert piece.chosen.tokens[row, :start].equal(piece.rejected.tokens[row, :start])
    margins = torch.cat([piece.margin for piece in pieces])
    assert sorted(margins.tolist()) == sorted(batch.margin.tolist())


def test_experience_is_cut_with_all_its_columns() -> None:
    s = tiny.sequences([(1, 2), (1, 8)])
    columns = [s.mask * (10.0 * i) for i in range(1, 7)]
    whole = ExperienceBatch(s, *columns, kl_coefficient=0.2, micro_batch_tokens=1)
    piece = whole.select(torch.tensor([0]))
    assert piece.sequences.tokens.shape == (1, 7)
    names = ("sampled_logprobs", "old_logprobs", "reference_logprobs", "values", "advantages", "returns")
    for i, name in enumerate(names, start=1):
        assert getattr(piece, name).equal(piece.sequences.mask * (10.0 * i))
    assert tuple(piece.columns()) == names
    # Joined again, narrow row and wide one, nothing is lost but the order.
    joined = piece.join(whole.select(torch.tensor([1, 0]))).select(torch.tensor([0, 1]))
    assert joined.sequences.tokens.equal(s.tokens)
    assert all(column.equal(whole.columns()[name]) for name, column in joined.columns().items())


def test_to_moves_every_tensor_and_keeps_the_rest() -> None:
    moved = tiny.prompts(3).to("meta")
    assert moved.prompts.tokens.is_meta
    assert moved.index.is_meta
    assert moved.texts == tiny.prompts(3).texts
    assert all(getattr(moved.prompts, f.name).is_meta for f in dataclasses.fields(moved.prompts))


def test_select_of_prompts_keeps_texts_with_their_rows() -> None:
    chosen = tiny.prompts(5).select(torch.tensor([4, 1]))
    assert chosen.texts == ("prompt 4", "prompt 1")
    assert chosen.index.tolist() == [4, 1]


def responses(*sizes: tuple[int, int, int]) -> Sequences:
    """Rows of (which prompt, its length, the response's length)."""
    rows = [([10 + which] * prompt + [3] * response, [False] * prompt + [True] * response)
            for which, prompt, response in sizes]  # fmt: skip
    return Sequences.pad([tokens for tokens, _ in rows], [mask for _, mask in rows])


def test_rows_know_the_first_row_with_their_prompt() -> None:
    rows = responses((0, 3, 2), (1, 3, 4), (0, 3, 5), (0, 2, 1), (1, 3, 1))
    leader, prompt = same_prompts(rows)
    assert leader.tolist() == [0, 1, 0, 3, 1]
    assert prompt.tolist() == [3, 3, 3, 2, 3]
    nothing = dataclasses.replace(rows, mask=torch.zeros_like(rows.mask))
    assert same_prompts(nothing)[0].tolist() == [0, 1, 2, 3, 4], "no prompt, nothing in common"
    assert len(same_prompts(rows.select(torch.zeros(0, dtype=torch.int64)))[0]) == 0


def test_packed_responses_are_cut_into_the_fewest_groups_and_alike() -> None:
    """A prompt counts once in a group; against every cut of the rows in the order of their prompts."""
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for budget in (12, 30, 60, 200):
        for _ in range(10):
            lengths = torch.randint(1, 20, (8,), generator=generator).tolist()
            rows = responses(*((i % 3, 4 + 3 * (i % 3), length) for i, length in enumerate(lengths)))

            def tokens(group: list[int], lengths: list[int] = lengths) -> int:
                return sum(4 + 3 * which for which in {i % 3 for i in group}) + sum(lengths[i] for i in group)

            groups = [group.tolist() for group in rows.cut_responses(budget, "shared")]
            ordered = sorted(range(8), key=lambda i: i % 3)
            assert list(itertools.chain(*groups)) == ordered
            assert all(len(group) == 1 or tokens(group) <= budget for group in groups)
            every = []
            for bars in itertools.product((False, True), repeat=7):
                starts = [0, *(i + 1 for i, bar in enumerate(bars) if bar), 8]
                every.append([ordered[a:b] for a, b in itertools.pairwise(starts)])
            fitting = [cut for cut in every if all(len(group) == 1 or tokens(group) <= budget for group in cut)]
            fewest = min(map(len, fitting))
            assert len(groups) == fewest
            largest = min(max(map(tokens, cut)) for cut in fitting if len(cut) == fewest)
            assert max(map(tokens, groups)) == largest or largest > budget
            seen.add(len(groups))
    assert len(seen) > 3


def test_responses_without_a_prompt_in_common_are_cut_as_any_rows() -> None:
    rows = responses((0, 3, 2), (1, 3, 9), (2, 3, 5))
    layouts: tuple[Layout, ...] = ("padded", "packed", "shared")
    for layout in layouts:
        found = [group.tolist() for group in rows.cut_responses(16, layout)]
        assert found == [group.tolist() for group in cut_by_tokens(rows.lengths, 16, layout)]


def test_pairs_and_ranked_lists_count_their_prompt_once() -> None:
    """Also where several pairs have the same; a pair and a prompt's answers stay together."""
    chosen, rejected = responses((0, 6, 2), (1, 6, 3), (0, 6, 1)), responses((0, 6, 1), (1, 6, 1), (0, 6, 2))
    pairs = PreferenceBatch(chosen, rejected, torch.zeros(3), 19)

    def cut(batch: PreferenceBatch | RankedBatch, layout: Layout) -> list[list[list[int]]]:
        return [[part.lengths.tolist() for part in piece.answers()] for piece in batch.micro_batches(layout)]

    assert cut(pairs, "padded") == [[[9], [7]], [[8], [7]], [[7], [8]]]
    assert cut(pairs, "packed") == [[[9], [7]], [[8], [7]], [[7], [8]]]
    # 6 + 3 + 3 of the first and the third together, 6 + 4 of the second.
    assert cut(pairs, "shared") == [[[8, 7], [7, 8]], [[9], [7]]]
    lists = RankedBatch(pairs.sides().select(torch.tensor([0, 3, 2, 5, 1, 4])), torch.tensor([4, 2]),
                        torch.zeros(6, dtype=torch.int64), torch.zeros(6), 22)  # fmt: skip
    assert cut(lists, "packed") == [[[8, 7, 7, 8]], [[9, 7]]]
    assert cut(lists, "shared") == [[[8, 7, 7, 8, 9, 7]]]


def test_a_budget_below_one_is_refused_where_prompts_are_shared() -> None:
    with pytest.raises(ValueError, match="micro_batch_tokens"):
        responses((0, 3, 2), (0, 3, 4)).cut_responses(0, "shared")
