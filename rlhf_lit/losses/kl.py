"""Estimators of KL(π‖π₀) from samples of π, and the controllers of its coefficient β.

With l = log π(y_t) − log π₀(y_t) (Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html):

* k1 = l: unbiased, may be negative;
* abs = |l|;
* k2 = ½l² (TRL's "mse");
* k3 = e^(−l) − 1 + l: unbiased, never negative.

As a penalty inside the reward, only k1 has the fixed point π* ∝ π₀·exp(r/β).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Estimator = Literal["k1", "abs", "k2", "k3"]


def estimate_kl(logratio: Tensor, estimator: Estimator) -> Tensor:
    """Per-token KL estimates in nats from per-token log-ratios l; any shape."""
    match estimator:
        case "k1":
            return logratio
        case "abs":
            return logratio.abs()
        case "k2":
            return logratio.square() / 2
        case "k3":
            return torch.expm1(-logratio) + logratio


def exact_kl(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Σ_v π(v)(log π(v) − log π₀(v)), in nats. [..., vocabulary] normalised log-probs → [...]."""
    return (policy_logprobs.exp() * (policy_logprobs - reference_logprobs)).sum(-1)


@dataclass(frozen=True)
class KLController:
    """How the coefficient of the KL penalty moves.

    Args:
        beta: β, the weight of the KL penalty in the reward, at the start. Required.
    """

    beta: float

    def next_beta(self, beta: float, kl: float, episodes: int) -> float:
        """The coefficient after a rollout.

        Args:
            beta: the coefficient the rollout was penalised with.
            kl: mean over its episodes, on all ranks, of Σ_t k1, in nats.
            episodes: n, how many there were on all ranks.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class FixedKL(KLController):
    """β stays where it is set; 0 leaves the penalty out."""

    def __post_init__(self) -> None:
        if self.beta < 0:
            raise ValueError(f"kl.beta must be at least 0, not {self.beta}")

    def next_beta(self, beta: float, kl: float, episodes: int) -> float:
        return beta


@dataclass(frozen=True)
class AdaptiveKL(KLController):
    """β ← β·(1 + e·n/horizon), e = clip(KL/target − 1, −0.2, 0.2) (Ziegler et al. 2019, arXiv 1909.08593, §2.2).

    Args:
        beta: β₀ (0.2 in the original TRL, 0.15 in lm-human-preferences).
        target: KL aimed at, in nats per response.
        horizon: episodes over which an error of 1 would double β.
    """

    target: float = 6.0
    horizon: float = 10_000.0

    def __post_init__(self) -> None:
        for name in ("beta", "target", "horizon"):
            if not getattr(self, name) > 0:
                raise ValueError(f"kl.{name} must be greater than 0, not {getattr(self, name)}")

    def next_beta(self, beta: float, kl: float, episodes: int) -> float:
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        return beta * (1 + error * episodes / self.horizon)
