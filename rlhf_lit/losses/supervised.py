"""Supervised fine-tuning: the negative log-likelihood of the response tokens."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NLLLoss:
    """−log π(y_t | x, y_<t) of each token, in nats. Reduced as Σ m·nll / Σ m over the whole optimizer batch."""

    def __call__(self, logprobs: Tensor) -> Tensor:
        """[rows, time] log-probs → [rows, time] losses."""
        return -logprobs
