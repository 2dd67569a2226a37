"""RewardBench's sections and what they weigh (Lambert et al. 2024, arXiv 2403.13787, §4 and table 1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_lit.evaluation.estimates import Array, Estimate, bootstrap

SECTIONS: dict[str, tuple[str, ...]] = {
    "Chat": ("alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"),
    "Chat Hard": (
        "mt-bench-hard",
        "llmbar-natural",
        "llmbar-adver-neighbor",
        "llmbar-adver-GPTInst",
        "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ),
    "Safety": (
        "refusals-dangerous",
        "refusals-offensive",
        "xstest-should-refuse",
        "xstest-should-respond",
        "donotanswer",
    ),
    "Reasoning": ("math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"),
}
"""Section → its subsets. Rows of a section weigh the same, but in Reasoning mathematics and code are a half each."""

MATHEMATICS = "math-prm"
TIES = "Ties"  # of RewardBench 2


def sections(subsets: Sequence[str | None], right: Any) -> dict[str, Estimate]:
    """Means of the sections whose subsets are all there, with bootstrap intervals over rows.

    Args:
        subsets: of each row.
        right: [rows] bool.
    """
    there = set(subsets)
    return {
        name: Estimate.ratio(right, _weights(subsets, name)) for name, parts in SECTIONS.items() if there >= set(parts)
    }


def score(subsets: Sequence[str | None], right: Any) -> Estimate:
    """The mean of the four sections (without the paper's prior sets), with a bootstrap interval over rows.

    Args:
        subsets: of each row; every section must be there.
        right: [rows] bool.
    """
    weights = np.stack([_weights(subsets, name) for name in SECTIONS])

    def statistic(hits: Array, *columns: Array, axis: int) -> Any:
        return np.mean([(column * hits).sum(axis) / column.sum(axis) for column in columns], axis=0)

    return bootstrap(statistic, np.asarray(right, dtype=float), *weights)


def _weights(subsets: Sequence[str | None], section: str) -> Array:
    """[rows] what a row weighs in a section, 0 outside of it."""
    parts = SECTIONS[section]
    weights = np.array([float(name in parts) for name in subsets])
    mathematics = np.array([name == MATHEMATICS for name in subsets])
    if section == "Reasoning":
        code = weights.sum() - mathematics.sum()
        weights[mathematics] = code / mathematics.sum()
    return weights
