"""The loss of ranked lists: a mean over the pairs of each prompt, then over prompts (Ouyang et al. 2022, Eq. 1)."""

import math

import pytest
import tiny
import torch

from rlhf_lit.algorithms import RewardModel
from rlhf_lit.batches import PreferenceBatch, RankedBatch, Sequences
from rlhf_lit.batches.micro_batches import cut_groups
from rlhf_lit.losses.bradley_terry import BradleyTerryLoss
from rlhf_lit.models.base import Base

PREFERENCES = tiny.preferences()


def as_lists(batch: PreferenceBatch) -> RankedBatch:
    """The same pairs as lists of two."""
    pairs = batch.chosen.join(batch.rejected)
    order = torch.arange(2 * len(batch)).view(2, -1).T.reshape(-1)
    rating = torch.stack([batch.margin, torch.zeros_like(batch.margin)], 1).reshape(-1)
    count = torch.full((len(batch),), 2)
    return RankedBatch(pairs.select(order), count, torch.tensor([0, 1]).repeat(len(batch)), rating, tiny.EVERYTHING)


def known_scores(batch: RankedBatch, scores: list[float], loss: BradleyTerryLoss = BradleyTerryLoss()) -> RewardModel:
    """A reward model that gives just these scores."""
    module = RewardModel(Base(name="unused"), loss)
    module.scores = lambda *_: torch.tensor(scores, dtype=torch.float64)  # type: ignore[method-assign]
    return module


def ranked(counts: list[int], rank: list[int], rating: list[float] | None = None) -> RankedBatch:
    sequences = Sequences.pad([[1, 2, 3]] * sum(counts), [[False, True, True]] * sum(counts))
    ratings = torch.tensor(rating or [0.0] * len(rank))
    return RankedBatch(sequences, torch.tensor(counts), torch.tensor(rank), ratings, 100)


def nll(difference: float) -> float:
    return math.log1p(math.exp(-difference))


def test_three_and_four_answers_with_ties_by_hand() -> None:
    """K = 3 without ties has C(3, 2) pairs; K = 4 with two ties has 4 of its 6, and counts as much as the other."""
    batch = ranked([3, 4], [2, 0, 1, 0, 1, 1, 0])
    scores = [0.1, 0.7, -0.4, 1.5, 0.2, 0.3, -1.0]
    first = [nll(0.7 + 0.4), nll(0.7 - 0.1), nll(-0.4 - 0.1)]
    second = [nll(1.5 - 0.2), nll(1.5 - 0.3), nll(-1.0 - 0.2), nll(-1.0 - 0.3)]
    module = known_scores(batch, scores)
    denominators = module.denominators(batch)
    (share,) = module.losses(batch, denominators)
    assert {name: int(value) for name, value in denominators.items()} == {"prompts": 2, "pairs": 7, "answers": 7}
    assert float(share.loss) == pytest.approx((sum(first) / 3 + sum(second) / 4) / 2, abs=1e-12)
    metrics = {name: float(value) for name, value in share.metrics.items()}
    differences = [1.1, 0.6, -0.5, 1.3, 1.2, -1.2, -1.3]
    expected = {
        "accuracy": 4 / 7,  # of pairs, each alike
        "margin": sum(differences) / 7,
        "score_chosen": (2 * 0.7 - 0.4 + 2 * 1.5 - 2 * 1.0) / 7,
        "score_rejected": (2 * 0.1 - 0.4 + 2 * 0.2 + 2 * 0.3) / 7,
        "score_mean": sum(scores) / 7,  # of answers, each once
        "score_square": sum(score**2 for score in scores) / 7,
    }
    assert metrics == pytest.approx(expected, abs=1e-6)


def test_margins_are_differences_of_ratings() -> None:
    batch = ranked([3], [1, 0, 2], [3.0, 4.5, 1.0])
    module = known_scores(batch, [0.0, 1.0, 2.0], BradleyTerryLoss(use_margin=True))
    (share,) = module.losses(batch, module.denominators(batch))
    expected = (nll(1.0 - 1.5) + nll(-1.0 - 3.5) + nll(-2.0 - 2.0)) / 3
    assert float(share.loss) == pytest.approx(expected, abs=1e-12)


def test_lists_of_two_are_pairs(llama: str) -> None:
    loss = BradleyTerryLoss(centring=0.01, use_margin=True)
    module = tiny.build(RewardModel(Base(name=llama), loss)).double()
    pairs = tiny.Step(module, PREFERENCES, cut=False)
    pairs.assert_equals(tiny.Step(module, as_lists(PREFERENCES), cut=False), 1e-12)
    assert module.denominators(PREFERENCES) == module.denominators(as_lists(PREFERENCES))
    # The same micro-batches too: a budget means the same to both.
    for budget in (1, 30, 60, 110):
        cut = [len(part) for part in tiny.preferences(budget).micro_batches()]
        lists = RankedBatch(**{**vars(as_lists(PREFERENCES)), "micro_batch_tokens": budget})
        assert [len(part) for part in lists.micro_batches()] == cut


def test_a_prompt_stays_whole_within_the_budget() -> None:
    """The padded size of a group is all of its answers at the longest one's length."""
    lengths, counts = torch.tensor([4, 10, 5, 3]), torch.tensor([9, 2, 3, 2])
    groups = [group.tolist() for group in cut_groups(lengths, counts, 43)]
    assert groups == [[1], [2], [0], [3]]
    # 20 + 15 and a second group, 3.1, are less than 50 together; 36 + 6 and one are more than 44.
    assert [group.tolist() for group in cut_groups(lengths, counts, 50)] == [[1], [2], [0, 3]]
    for group in cut_groups(lengths, counts, 50):
        assert int(counts[group].sum() * lengths[group].max()) <= 50
    with pytest.raises(ValueError, match="micro_batch_tokens must be at least 1"):
        cut_groups(lengths, counts, 0)


def test_selecting_prompts_takes_their_answers_along() -> None:
    batch = tiny.rankings()
    parts = batch.select(torch.tensor([2, 0]))
    assert parts.counts.tolist() == [2, 3]
    assert parts.rank.tolist() == [*batch.rank[7:9], *batch.rank[:3]]
    assert parts.sequences.lengths.tolist() == [*batch.sequences.lengths[7:9], *batch.sequences.lengths[:3]]
    empty = batch.select(torch.tensor([], dtype=torch.int64))
    assert len(empty) == len(empty.comparisons().better) == len(list(empty.micro_batches())) == 0


def test_each_answer_is_forwarded_once(llama: str) -> None:
    module = tiny.build(RewardModel(Base(name=llama)))
    rows: list[int] = []
    module.scorer.register_forward_pre_hook(lambda model, inputs, keywords: rows.append(1), with_kwargs=True)
    seen: list[int] = []
    scores = module.scores
    module.scores = lambda rows: seen.append(len(rows)) or scores(rows)  # type: ignore
    batch = tiny.rankings()
    tiny.Step(module, batch)
    assert sum(seen) == len(batch.sequences) == 13
    assert len(batch.comparisons().better) > 13
