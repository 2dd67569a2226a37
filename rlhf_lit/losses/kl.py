"""Estimators of KL(π‖π₀) from samples of π, and the controllers of its coefficient β.

With l = log π(y_t) − log π₀(y_t) (Schulman 2020, "Approximating KL Divergence", http://joschu.net/blog/kl-approx.html):

* k1 = l: unbiased, may be negative;
* abs = |l|;
* k2 = ½l² (TRL's "mse");
* k3 = e^(−l) − 1 + l: unbiased, never negative;
* full = Σ_v π(v)·(log π(v) − log π₀(v)): no estimate, from the whole vocabulary.

Where the penalty stands matters as much as how it is estimated: inside the reward its gradient is the policy
gradient's, in the loss its own (arXiv 2506.09477, 2510.01555). ``fixed_point`` says what each combination converges to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

Estimator = Literal["k1", "abs", "k2", "k3", "full"]
Placement = Literal["reward", "loss"]

_ARGMAX = "the responses of highest reward, whatever β"
_TRUNCATED = "a policy that drops responses of π₀, down to a single one"
_BIASED = "a policy other than π* ∝ π₀·exp(r/β)"
# Of a one-token bandit under exact gradients: experiments/kl_fixed_points. What is not here converges to π*.
_FIXED_POINTS: dict[tuple[Estimator, Placement], str] = {
    ("abs", "reward"): _TRUNCATED,
    ("k2", "reward"): _TRUNCATED,
    ("k3", "reward"): "nothing: the policy diverges",
    ("full", "reward"): _ARGMAX,
    ("k1", "loss"): _ARGMAX,
    ("abs", "loss"): _BIASED,
    ("k3", "loss"): _BIASED,
}


def fixed_point(estimator: Estimator, placement: Placement) -> str | None:
    """What a combination converges to on a one-token bandit, in words; None where that is π* ∝ π₀·exp(r/β)."""
    return _FIXED_POINTS.get((estimator, placement))


def estimate_kl(logratio: Tensor, estimator: Estimator) -> Tensor:
    """Per-token KL estimates in nats from per-token log-ratios l; any shape. `full` has none: see ``exact_kl``."""
    match estimator:
        case "k1":
            return logratio
        case "abs":
            return logratio.abs()
        case "k2":
            return logratio.square() / 2
        case "k3":
            return torch.expm1(-logratio) + logratio
        case "full":
            raise ValueError("the full KL is not a function of the sampled log-ratio: use exact_kl")


def exact_kl(policy_logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Σ_v π(v)(log π(v) − log π₀(v)), in nats. [..., vocabulary] normalised log-probs → [...]."""
    return (policy_logprobs.exp() * (policy_logprobs - reference_logprobs)).sum(-1)


class Compared(Protocol):
    """Policy and reference on the same tokens, [rows, time] each (``models.score_pass.Comparison``)."""

    @property
    def logratio(self) -> Tensor:
        """log π − log π₀ of the tokens."""

    @property
    def exact_kl(self) -> Tensor:
        """KL(π‖π₀) of the distributions they were drawn from."""


@dataclass(frozen=True)
class KLController:
    """The KL penalty: how it is estimated, where it stands, and how its coefficient moves (the subclass).

    Args:
        beta: β, the weight of the penalty at the start, in units of reward per nat. Required.
        estimator: of the per-token KL; `full` is exact, from the whole vocabulary.
        placement: inside each token's reward, or added to the loss as a plain mean over the sampled tokens.
    """

    beta: float
    estimator: Estimator = "k1"
    placement: Placement = "reward"

    def next_beta(self, beta: float, kl: float, episodes: int) -> float:
        """The coefficient after a rollout.

        Args:
            beta: the coefficient the rollout was penalised with.
            kl: mean over its episodes, on all ranks, of Σ_t k1, in nats.
            episodes: n, how many there were on all ranks.
        """
        raise NotImplementedError

    def in_reward(self, comparison: Compared) -> Tensor:
        """kl_t, what each token's reward loses in units of β; 0 where the penalty stands in the loss. [rows, time]."""
        if self.placement == "loss":
            return torch.zeros_like(comparison.logratio)
        return comparison.exact_kl if self.estimator == "full" else estimate_kl(comparison.logratio, self.estimator)

    def in_loss(self, logratio: Tensor) -> Tensor | None:
        """kl_t of sampled tokens, with the gradient of their log-ratio; None where no estimate stands in the loss.

        Args:
            logratio: [rows, time] log π − log π₀, with the policy's gradient.
        """
        estimated = self.placement == "loss" and self.estimator != "full"
        return estimate_kl(logratio, self.estimator) if estimated else None

    @property
    def exact_in_loss(self) -> bool:
        """Whether the exact KL stands in the loss: it takes a pass of its own (``models.score_pass``)."""
        return self.placement == "loss" and self.estimator == "full"

    def note(self, advantages_rescaled: bool) -> str | None:
        """What the combination of estimator, placement and advantages converges to, where that is not π*; else None.

        Args:
            advantages_rescaled: whether they are divided by their standard deviation.
        """
        if instead := fixed_point(self.estimator, self.placement):
            return (
                f"{self.estimator} in the {self.placement} converges to {instead} "
                "(on a one-token bandit; see experiments/kl_fixed_points)"
            )
        if self.placement == "loss" and advantages_rescaled:
            return (
                "the advantages are divided by their standard deviation and the KL in the loss is not, so its β is in "
                "those units, and the fixed point is not π* ∝ π₀·exp(r/β)"
            )
        return None


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
