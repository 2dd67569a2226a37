"""The estimator of best-of-n against every subset there is."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from rlhf_lit.errors import UserError
from rlhf_lit.evaluation.best_of_n import best_of_n_curve, best_of_n_kl, best_of_n_means, check_sizes

PROXY = np.array([[0.3, -1.0, 2.0, 0.7, 1.1], [1.0, 1.0, 0.0, 1.0, 0.0], [4.0, 4.0, 4.0, 4.0, 4.0]])
GOLD = np.array([[1.0, 5.0, -2.0, 0.5, 3.0], [2.0, -1.0, 7.0, 0.0, 1.0], [1.0, 2.0, 3.0, 4.0, 10.0]])


def by_enumeration(proxy: np.ndarray, values: np.ndarray, n: int) -> float:
    """Over all subsets of n: the mean value of those that the proxy likes best in it."""
    chosen = []
    for subset in combinations(range(len(proxy)), n):
        best = max(proxy[i] for i in subset)
        chosen.append(np.mean([values[i] for i in subset if proxy[i] == best]))
    return float(np.mean(chosen))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("values", [PROXY, GOLD], ids=["proxy", "gold"])
def test_it_is_the_mean_over_all_subsets(n: int, values: np.ndarray) -> None:
    """Ties within a prompt (rows 2 and 3) included."""
    expected = [by_enumeration(p, v, n) for p, v in zip(PROXY, values, strict=True)]
    assert best_of_n_means(PROXY, values, n) == pytest.approx(expected, abs=1e-12)


def test_the_best_of_two_of_three_by_hand() -> None:
    """Scores 1, 2, 3: of the three pairs one has 2 as its best and two have 3: 8/3."""
    scores = np.array([[2.0, 3.0, 1.0]])
    assert best_of_n_means(scores, scores, 2) == pytest.approx([8 / 3])


def test_many_samples_do_not_overflow() -> None:
    """The best of n uniform ranks 1 … N is n(N+1)/(n+1) on average; C(3000, 1500) is beyond every float."""
    scores = np.arange(1.0, 3001.0)[None]
    assert best_of_n_means(scores, scores, 1500) == pytest.approx([1500 * 3001 / 1501])


def test_the_curve() -> None:
    points = best_of_n_curve(PROXY, GOLD, [1, 4])
    assert [point.n for point in points] == [1, 4]
    assert points[0].proxy.mean == pytest.approx(PROXY.mean())
    assert points[0].gold is not None
    assert points[0].gold.mean == pytest.approx(GOLD.mean())
    assert points[1].proxy.mean == pytest.approx(np.mean([by_enumeration(p, p, 4) for p in PROXY]))
    assert best_of_n_curve(PROXY, None, [2])[0].gold is None


def test_the_known_kl() -> None:
    assert [best_of_n_kl(n) for n in (1, 4, 16)] == pytest.approx([0.0, 0.636294, 1.835089], abs=1e-6)
    assert best_of_n_kl(2) == pytest.approx(math.log(2) - 0.5)


@pytest.mark.parametrize(
    ("sizes", "complaint"),
    [
        ([1, 8], "best_of: 8 is more than the 4 samples to each prompt; set samples to 8 or more"),
        ([0], "best_of: n must be at least 1, not 0"),
        ([2, 2], r"best_of: \[2, 2\] names an n twice"),
    ],
)
def test_an_n_that_cannot_be_had(sizes: list[int], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        check_sizes(sizes, 4)
    check_sizes([1, 2, 4], 4)
