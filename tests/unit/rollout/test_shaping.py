"""Scores on their way to the policy: normalised, clipped, the missing-EOS rule applied, in this order."""

import math

import pytest
import torch

from rlhf_lit.rollout.rewards import MissingEOS
from rlhf_lit.rollout.shaping import ScoreMoments, Shaping

SCORES = torch.tensor([1.0, 3.0, 8.0, -2.0])  # mean 2.5, population variance 13.25
ENDED = torch.tensor([True, True, True, False])


def alone(x: torch.Tensor) -> torch.Tensor:
    """Σ over a single rank."""
    return x


def seen(*rollouts: torch.Tensor) -> ScoreMoments:
    moments = ScoreMoments()
    for scores in rollouts:
        moments.update(scores, alone)
    return moments


def test_moments_of_rollouts_are_those_of_all_scores() -> None:
    parts = [torch.randn(size, generator=torch.Generator().manual_seed(size)) * 3 + 100 for size in (2, 7, 31)]
    together, whole = seen(*parts), torch.cat(parts).double()
    assert together.count == 40
    assert together.mean == pytest.approx(float(whole.mean()), abs=1e-12)
    assert together.deviation == pytest.approx(float(whole.std(correction=0)), abs=1e-12)


def test_moments_of_ranks_are_those_of_their_scores() -> None:
    """Two ranks of unequal size; the first's view of the sums, which both get."""
    halves = (SCORES[:1].double(), SCORES[1:].double())
    mean = float(SCORES.mean())
    sums = iter([torch.tensor(4.0), SCORES.double().sum(), sum((half - mean).square().sum() for half in halves)])
    moments = ScoreMoments()
    moments.update(halves[0], lambda _: torch.as_tensor(next(sums)))
    assert moments.deviation == pytest.approx(math.sqrt(13.25), abs=1e-12)
    assert moments.mean == pytest.approx(2.5)


def test_equal_scores_are_not_divided_by_nothing() -> None:
    same = torch.full((3,), 4.0)
    assert Shaping(normalise="scale")(same, ENDED[:3], seen(same)).tolist() == [4.0, 4.0, 4.0]
    assert Shaping(normalise="standardise")(same, ENDED[:3], seen(same)).tolist() == [0.0, 0.0, 0.0]


def test_nothing_is_done_by_default() -> None:
    assert Shaping()(SCORES, ENDED, ScoreMoments()).equal(SCORES)


def test_normalising_by_hand() -> None:
    scaled = Shaping(normalise="scale")(SCORES, ENDED, seen(SCORES))
    torch.testing.assert_close(scaled, SCORES / math.sqrt(13.25))
    standard = Shaping(normalise="standardise")(SCORES, ENDED, seen(SCORES))
    torch.testing.assert_close(standard, (SCORES - 2.5) / math.sqrt(13.25))


def test_the_order_is_normalise_clip_missing_eos() -> None:
    """Standardised: −.41, .14, 1.51, −1.24; clipped at 1: −.41, .14, 1, −1; no EOS: the last loses 3 more, to −4."""
    shaping = Shaping("standardise", 1.0, MissingEOS("subtract", 3.0))
    deviation = math.sqrt(13.25)
    expected = [-1.5 / deviation, 0.5 / deviation, 1.0, -4.0]
    assert shaping(SCORES, ENDED, seen(SCORES)).tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.nan])
def test_a_clip_is_positive(bad: float) -> None:
    with pytest.raises(ValueError, match=r"shaping\.clip"):
        Shaping(clip=bad)
