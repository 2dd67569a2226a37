"""From the scores of a reward source to the scores a policy learns from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlhf_lit.rollout.rewards import MissingEOS


@dataclass
class ScoreMoments:
    """Mean and variance of all scores of a run so far, merged rollout by rollout (Chan et al. 1979).

    Attributes:
        count: scores seen, on all ranks.
        mean: their mean.
        squares: Σ(score − mean)².
    """

    count: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    def update(self, scores: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
        """Take in a rollout's [rows] scores; ranks add theirs up."""
        real = scores.double()
        count = float(sum_over_ranks(torch.tensor(float(len(scores)), dtype=torch.float64, device=scores.device)))
        mean = float(sum_over_ranks(real.sum())) / count
        squares = float(sum_over_ranks((real - mean).square().sum()))
        total, gap = self.count + count, mean - self.mean
        self.squares += squares + gap**2 * self.count * count / total
        self.mean += gap * count / total
        self.count = total

    @property
    def deviation(self) -> float:
        """Population standard deviation; 1 where all scores are equal, which leaves them as they are."""
        spread = math.sqrt(self.squares / self.count) if self.count else 0.0
        return spread if spread > 0 else 1.0


@dataclass(frozen=True)
class Shaping:
    """What is done to the scores before the KL penalty joins them, in this order: normalise, clip, missing EOS.

    Args:
        normalise: by the running moments of all scores of the run, this rollout's included: `standardise` is
            (s − mean)/std, `scale` is s/std.
        clip: bring what is left into ±clip; null leaves it out.
        missing_eos: what becomes of the score of a response that was cut at the length limit; null leaves it.
    """

    normalise: Literal["none", "scale", "standardise"] = "none"
    clip: float | None = None
    missing_eos: MissingEOS | None = None

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"shaping.clip must be greater than 0 or null, not {self.clip}")

    def __call__(self, scores: Tensor, ended: Tensor, seen: ScoreMoments) -> Tensor:
        """[rows] scores → [rows] scores.

        Args:
            scores: as the reward source returned them.
            ended: [rows] bool, whether a response ends in a stop token.
            seen: the moments to normalise by.
        """
        if self.normalise != "none":
            scores = (scores - seen.mean if self.normalise == "standardise" else scores) / seen.deviation
        if self.clip is not None:
            scores = scores.clamp(-self.clip, self.clip)
        return self.missing_eos(scores, ended) if self.missing_eos else scores
