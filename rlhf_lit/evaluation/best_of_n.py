"""Best-of-n: what the best of n samples by a proxy is worth, and how far it is from the policy that drew them.

From N ≥ n samples to a prompt, every subset of n could have been drawn; the estimator is the mean over all of them,
computed from the order of the samples alone (Nakano et al. 2021, arXiv 2112.09332, appendix I; Gao et al. 2022, arXiv
2210.10760, appendix). It is unbiased, where the best of the first n would be too but wastes the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf_lit.errors import UserError
from rlhf_lit.evaluation.estimates import Array, Estimate


@dataclass(frozen=True)
class Point:
    """Best-of-n for one n.

    Attributes:
        n: how many samples the proxy chooses from.
        kl: log n − (n−1)/n, in nats per response: KL(best-of-n ‖ policy) where no two responses score the same, an
            upper bound of it with ties (Beirami et al. 2024, arXiv 2401.01879, theorem 1).
        proxy: score of the choice by the proxy that made it.
        gold: score of the choice by the gold judge; None where there is none.
    """

    n: int
    kl: float
    proxy: Estimate
    gold: Estimate | None


def best_of_n_kl(n: int) -> float:
    """log n − (n−1)/n: exact for continuous scores, an upper bound with ties. In nats."""
    return math.log(n) - (n - 1) / n


def best_of_n_means(proxy: Array, values: Array, n: int) -> Array:
    """Mean over all subsets of n samples of the value of the one the proxy likes best. → [prompts].

    A sample of which the proxy likes i others less or equally well, itself counted, is the best of C(i−1, n−1) of the
    C(N, n) subsets. Samples of equal proxy are chosen with equal probability, so that they share the subsets in which
    one of them is the best.

    Args:
        proxy: [prompts, N] what the choice is made by.
        values: [prompts, N] what it is worth: the proxy itself, or a gold score.
        n: 1 … N.
    """
    size = proxy.shape[1]
    assert 1 <= n <= size
    # C(i, n)/C(N, n): the probability that a subset lies among the i lowest. As a product, which cannot overflow.
    among = np.ones(size + 1)
    for taken in range(n):
        among *= np.maximum(np.arange(size + 1) - taken, 0) / (size - taken)
    order = np.sort(proxy, -1)
    below = np.stack([np.searchsorted(known, own) for known, own in zip(order, proxy, strict=True)])
    through = np.stack([np.searchsorted(known, own, "right") for known, own in zip(order, proxy, strict=True)])
    weights = (among[through] - among[below]) / (through - below)
    return (weights * values).sum(-1)


def best_of_n_curve(proxy: Array, gold: Array | None, sizes: Sequence[int]) -> list[Point]:
    """A point for each n, with intervals over prompts.

    Args:
        proxy, gold: [prompts, N] scores of the same samples.
        sizes: the n's.
    """
    points = []
    for n in sizes:
        chosen = Estimate.bootstrap(best_of_n_means(proxy, proxy, n))
        worth = None if gold is None else Estimate.bootstrap(best_of_n_means(proxy, gold, n))
        points.append(Point(n, best_of_n_kl(n), chosen, worth))
    return points


def check_sizes(sizes: Sequence[int], samples: int) -> None:
    """Refuse an n that cannot be had from so many samples to a prompt. Raises UserError."""
    for n in sizes:
        if n < 1:
            raise UserError(f"best_of: n must be at least 1, not {n}")
        if n > samples:
            raise UserError(
                f"best_of: {n} is more than the {samples} samples to each prompt; set samples to {n} or more"
            )
    if len(set(sizes)) < len(sizes):
        raise UserError(f"best_of: {list(sizes)} names an n twice")
