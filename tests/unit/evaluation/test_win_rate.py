"""Win, tie and loss by hand, and how length comes into it."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf_lit.evaluation.win_rate import head_to_head, wins

SCORES = np.array([[1.0, 0.0], [2.0, 2.0], [0.5, 3.0]])
BASELINE = np.array([[0.0, 0.0], [3.0, 2.0], [0.5, 0.5]])
LENGTHS = np.array([[10.0, 10.0], [20.0, 5.0], [7.0, 30.0]])
BASELINE_LENGTHS = np.array([[10.0, 11.0], [20.0, 22.0], [14.0, 10.0]])


def test_every_sample_meets_every_sample() -> None:
    """Prompt 1: win, win, tie, tie. Prompt 2: loss, tie, loss, tie. Prompt 3: tie, tie, win, win."""
    won, tied = wins(SCORES, BASELINE)
    assert won.sum((1, 2)).tolist() == [2, 0, 2]
    assert tied.sum((1, 2)).tolist() == [2, 2, 2]
    found = head_to_head(SCORES, BASELINE, LENGTHS, BASELINE_LENGTHS)
    assert found.win_rate.mean == pytest.approx((3 + 1 + 3) / 12)
    assert found.win.mean == pytest.approx(4 / 12)
    assert found.tie.mean == pytest.approx(6 / 12)
    assert found.loss.mean == pytest.approx(2 / 12)
    assert found.difference.mean == pytest.approx((0.5 - 0.5 + 1.25) / 3)


def test_similar_lengths_are_those_within_a_tenth_of_the_longer() -> None:
    """Prompt 1: all four (10 and 11 differ by 1 ≤ 1.1). Prompt 2: 20 with 20 and with 22. Prompt 3: none."""
    found = head_to_head(SCORES, BASELINE, LENGTHS, BASELINE_LENGTHS)
    assert found.similar.mean == pytest.approx((4 + 2 + 0) / 12)
    assert found.similar_win_rate.mean == pytest.approx((3 + 0.5) / 6), "win win tie tie; loss tie"
    assert found.length_difference.mean == pytest.approx((-0.5 - 8.5 + 6.5) / 3)
    expected = np.corrcoef([0.5, -0.5, 1.25], [-0.5, -8.5, 6.5])[0, 1]
    assert found.length_correlation.mean == pytest.approx(expected)


def test_the_unit_is_the_prompt() -> None:
    """One prompt that is won ten times over and one that is lost: the interval is that of two values, not of twenty."""
    ours, theirs = np.array([[1.0] * 10, [0.0] * 10]), np.full((2, 1), 0.5)
    found = head_to_head(ours, theirs, np.ones((2, 10)), np.ones((2, 1)))
    assert (found.win_rate.low, found.win_rate.mean, found.win_rate.high) == (0.0, 0.5, 1.0)


def test_another_number_of_samples_than_the_baselines() -> None:
    found = head_to_head(np.array([[1.0], [0.0]]), np.array([[0.0, 2.0, 1.0], [0.0, 0.0, 1.0]]), *[np.ones((2, 1))] * 2)
    assert found.win_rate.mean == pytest.approx((1.5 / 3 + 1 / 3) / 2)
