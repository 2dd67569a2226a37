"""Win rates: one model's responses against a baseline's to the same prompts, by a judge's scores."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rlhf_lit.evaluation.estimates import Array, Estimate, bootstrap, correlation

SIMILAR = 0.1


@dataclass(frozen=True)
class HeadToHead:
    """Every sample of the model is compared with every sample of the baseline to the same prompt.

    Attributes:
        win_rate: wins + ½ ties.
        win, tie, loss: shares of the comparisons: the model's score is higher, equal, lower.
        difference: score − baseline's score; by a judge of pairs wins − losses.
        length_difference: tokens − baseline's tokens.
        similar: share of the comparisons between responses whose lengths are within 10 % of the longer of the two.
        similar_win_rate: wins + ½ ties among those alone.
        length_correlation: Pearson's, over prompts, between the mean score difference and the mean length difference.
    """

    win_rate: Estimate
    win: Estimate
    tie: Estimate
    loss: Estimate
    difference: Estimate
    length_difference: Estimate
    similar: Estimate
    similar_win_rate: Estimate
    length_correlation: Estimate


def wins(scores: Array, baseline: Array) -> tuple[Array, Array]:
    """[prompts, S] and [prompts, S'] scores → [prompts, S, S'] whether it wins, and whether it ties; 0 or 1."""
    ours, theirs = scores[:, :, None], baseline[:, None, :]
    return (ours > theirs).astype(float), (ours == theirs).astype(float)


def head_to_head(scores: Array, baseline: Array, lengths: Array, baseline_lengths: Array) -> HeadToHead:
    """Compare scores of responses.

    Args:
        scores, lengths: [prompts, S] the model's, lengths in tokens.
        baseline, baseline_lengths: [prompts, S'] the baseline's.
    """
    return head_to_head_of(*wins(scores, baseline), scores.mean(1) - baseline.mean(1), lengths, baseline_lengths)


def head_to_head_of(won: Array, tied: Array, difference: Array, lengths: Array, baseline_lengths: Array) -> HeadToHead:
    """The same of outcomes.

    Args:
        won, tied: [prompts, S, S'] whether, or how often, the model's sample wins, and ties.
        difference: [prompts] how much better the model is.
        lengths: [prompts, S] the model's, in tokens.
        baseline_lengths: [prompts, S'] the baseline's.
    """
    points = won + tied / 2
    longer = np.maximum(lengths[:, :, None], baseline_lengths[:, None, :])
    apart = lengths[:, :, None] - baseline_lengths[:, None, :]
    similar = (np.abs(apart) <= SIMILAR * longer).astype(float)
    near = similar.mean((1, 2))
    among = np.divide((points * similar).mean((1, 2)), near, out=np.zeros_like(near), where=near > 0)
    length_difference = lengths.mean(1) - baseline_lengths.mean(1)
    return HeadToHead(
        win_rate=Estimate.bootstrap(points.mean((1, 2))),
        win=Estimate.bootstrap(won.mean((1, 2))),
        tie=Estimate.bootstrap(tied.mean((1, 2))),
        loss=Estimate.bootstrap((1 - won - tied).mean((1, 2))),
        difference=Estimate.bootstrap(difference),
        length_difference=Estimate.bootstrap(length_difference),
        similar=Estimate.bootstrap(near),
        similar_win_rate=Estimate.ratio(among, near),
        length_correlation=bootstrap(correlation, difference, length_difference),
    )
