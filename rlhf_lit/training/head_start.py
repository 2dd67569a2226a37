"""How a new scalar head starts: scaled down where its first scores would lie far apart.

Drawn with standard deviation 1/√(d+1), a head gives scores of a standard deviation near 1 on hidden states of size √d
(Ziegler et al. 2019, §2.1; Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO"). Those of many models
are larger: the gain of the last norm is ten and more. So the scores of the first training rows are measured, and the
head is scaled to a standard deviation of 1 where it is above that. It is left as drawn elsewhere, and never started at
0, where the body would have no gradient in the first step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_lit.errors import say
from rlhf_lit.parallel.sharding import sharding_of

HeadStart = Literal["scaled", "seed"]
ROWS = 16  # at most, of the first training rows
TOKENS = 2048  # of theirs together, at most


def first_rows(module: Any) -> Sequence[Any]:
    """The first training rows, ``ROWS`` at most; none where the run has loaders of its own."""
    datamodule = getattr(module.trainer, "datamodule", None)
    rows: Sequence[Any] = getattr(datamodule, "examples", {}).get("train", ())
    return rows[:ROWS]


def measured(lengths: list[int]) -> int:
    """How many of the first rows are measured: those of ``TOKENS`` together, and two in any case."""
    total = 0
    for row, length in enumerate(lengths):
        total += length
        if total > TOKENS and row >= 2:
            return row
    return len(lengths)


@torch.no_grad()
def scale_down(module: Any, head: Mapping[str, nn.Parameter], scores: Tensor, field: str) -> None:
    """Divide a head by the standard deviation of its scores where that is above 1. All ranks must call it.

    Args:
        module: the algorithm, attached to its trainer.
        head: the head's parameters.
        scores: of one number or more, [n]; rank 0's count.
        field: of the config, for the note.
    """
    spread = float(scores.double().std(correction=0)) if len(scores) else 0.0
    spread = module.trainer.strategy.broadcast(spread)
    if not 1 < spread < float("inf"):
        return
    sharding = sharding_of(module)
    for parameter in head.values():
        sharding.assign(parameter, sharding.gathered(parameter) / spread)
    say(f"note: {field}: scores of the first rows have a standard deviation of {spread:.3g}; the head is divided by it")
