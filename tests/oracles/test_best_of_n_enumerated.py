"""Best-of-n where everything can be counted: its distribution, its KL, and the estimator from a few samples."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from world import PROMPTS, SEQUENCES

from rlhf_lit.evaluation.best_of_n import best_of_n_kl, best_of_n_means

Probabilities = np.ndarray


def best_of(probabilities: Probabilities, scores: np.ndarray, n: int) -> Probabilities:
    """The exact distribution of the best of n independent draws, of equal ones any: F(s)ⁿ − F(s−)ⁿ, shared by mass."""
    result = np.zeros_like(probabilities)
    for score in np.unique(scores):
        equal = scores == score
        below, through = probabilities[scores < score].sum(), probabilities[scores <= score].sum()
        result[equal] = (through**n - below**n) * probabilities[equal] / probabilities[equal].sum()
    return result


def kl(p: Probabilities, q: Probabilities) -> float:
    return float(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))


def reference() -> torch.Tensor:
    """[prompts, responses] probabilities of a fixed random policy over the world's 31 responses."""
    logits = torch.randn(SEQUENCES.rewards.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return logits.softmax(-1)


@pytest.mark.parametrize("n", [2, 4, 16])
def test_the_known_kl_bounds_the_exact_one_and_is_reached(n: int) -> None:
    """Below log n − (n−1)/n for every policy of the world, and within 1e-3 of it for 100 000 equally likely responses
    of distinct scores."""
    for p, scores in zip(reference().numpy(), SEQUENCES.rewards.numpy(), strict=True):
        exact = kl(best_of(p, scores, n), p)
        assert 0 < exact < best_of_n_kl(n)
        assert kl(best_of(p, np.round(scores), n), p) < exact, "ties leave less to choose"
    gaps = []
    for outcomes in (100, 1000, 10_000, 100_000):
        uniform = np.full(outcomes, 1 / outcomes)
        cumulated = np.arange(outcomes + 1) / outcomes
        gaps.append(best_of_n_kl(n) - kl(cumulated[1:] ** n - cumulated[:-1] ** n, uniform))
    assert all(gap > 0 for gap in gaps)
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[-1] < 1e-3


@pytest.mark.parametrize("tied", [False, True])
def test_the_estimator_is_unbiased(tied: bool) -> None:
    """Over all 5⁴ draws of four samples from five responses, each by its probability, the estimates of best-of-2 and
    best-of-3 (proxy, and gold of the proxy's choice) average to what the exact distribution says."""
    probabilities = np.array([0.1, 0.25, 0.3, 0.15, 0.2])
    proxy = np.array([0.4, -1.0, 0.4, 2.0, -1.0]) if tied else np.array([0.4, -1.0, 0.7, 2.0, -0.3])
    gold = np.array([3.0, 1.0, -2.0, 0.5, 4.0])
    draws = np.array(list(product(range(5), repeat=4)))
    weights = probabilities[draws].prod(-1)
    assert weights.sum() == pytest.approx(1)
    for n in (2, 3):
        exact = best_of(probabilities, proxy, n)
        for values in (proxy, gold):
            estimates = best_of_n_means(proxy[draws], values[draws], n)
            assert weights @ estimates == pytest.approx(exact @ values, abs=1e-12)


def test_the_worlds_best_of_n_is_found_from_its_samples() -> None:
    """Sixteen samples to each of 3 × 2000 questions: best-of-4 to four standard errors."""
    generator = np.random.default_rng(3)
    for p, scores in zip(reference().numpy(), SEQUENCES.rewards.numpy(), strict=True):
        drawn = scores[generator.choice(len(p), size=(2000, 16), p=p / p.sum())]
        estimates = best_of_n_means(drawn, drawn, 4)
        error = estimates.std() / math.sqrt(len(estimates))
        assert abs(estimates.mean() - best_of(p, scores, 4) @ scores) < 4 * error
        assert estimates.std() < drawn[:, :4].max(-1).std(), "all sixteen say more than the first four"
    assert len(PROMPTS) == 3
