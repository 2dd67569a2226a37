"""The losses of PPO and its relatives (Schulman et al. 2017, arXiv 1707.06347), per token."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlhf_lit.losses.reductions import Aggregation, row_sums

# exp(20) ≈ 5e8: far outside any clip range, and safe in fp32.
LOG_RATIO_LIMIT = 20.0


class TokenLosses(NamedTuple):
    """What a member of the family makes of each token, [rows, time] each.

    Attributes:
        losses: per-token loss, nothing weighted.
        ratio: ρ, or what stands in its place.
        clipped: whether a clip, not ρ itself, set the loss.
    """

    losses: Tensor
    ratio: Tensor
    clipped: Tensor


class PolicyTerms(NamedTuple):
    """The policy's loss of a batch, [rows, time] each.

    Attributes:
        losses: per-token loss, importance weight included.
        ratio, clipped: as of ``TokenLosses``.
        importance: weight of the token, 1 where nothing is corrected.
    """

    losses: Tensor
    ratio: Tensor
    clipped: Tensor
    importance: Tensor

    def metrics(self, logprobs: Tensor, old_logprobs: Tensor) -> dict[str, Tensor]:
        """How far the policy has moved from the one that sampled, by name (docs/metrics.md). [rows, time] each."""
        return {
            "policy/approxkl": (logprobs - old_logprobs).square() / 2,
            "policy/update_kl": old_logprobs - logprobs,
            "policy/clipfrac": self.clipped.float(),
            "policy/ratio_mean": self.ratio,
            "policy/ratio_square": self.ratio.square(),
        }


def token_ratio(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """ρ_t = π/π_old of each token, its logarithm within ±20. [rows, time] each."""
    return (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


def sequence_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """exp(mean_t log ρ_t) of a response, for all of its tokens, its logarithm within ±20. [rows, time] each.

    Source: GSPO, Zheng et al. 2025, arXiv 2507.18071, Eq. 7.
    """
    log_ratio = logprobs - old_logprobs
    mean = row_sums(log_ratio, mask) / mask.sum(-1).clamp(min=1)
    return mean[:, None].expand_as(log_ratio).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).exp()


@dataclass(frozen=True, kw_only=True)
class PolicyLoss:
    """A family: losses of sampled tokens, which differ in the token's own term (``token_losses``).

    Sampler correction, aggregation and entropy bonus are the same for all members, and fields of each. A member is a
    frozen dataclass, in any file, named by its class path; it provides ``token_losses`` and may add fields.

    Args:
        importance_cap: c of truncated importance sampling, for a sampler that differs from the training forward
            (another dtype, another engine): each token's loss is weighted by min(π_old/π_sampler, c) (Yao et al. 2025,
            "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training"; c = 2). null leaves it out.
        aggregation: how per-token losses become one number; the KL in the loss and the entropy bonus follow it.
        entropy_coefficient: weight of the entropy bonus, in units of loss per nat and token.
    """

    importance_cap: float | None = None
    aggregation: Aggregation = "token_mean"
    entropy_coefficient: float = 0.0

    def __post_init__(self) -> None:
        if self.importance_cap is not None and not self.importance_cap > 0:
            raise ValueError(f"policy_loss.importance_cap must be greater than 0 or null, not {self.importance_cap}")
        if not self.entropy_coefficient >= 0:
            raise ValueError(f"policy_loss.entropy_coefficient must be at least 0, not {self.entropy_coefficient}")

    def token_losses(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLosses:
        """The loss of each token, to be minimised; every argument is [rows, time].

        Args:
            logprobs: of the actions, under the policy that is trained; the gradient flows through them.
            old_logprobs: under the policy at the time of the rollout, from the training forward.
            advantages: A.
            mask: True on actions.
        """
        raise NotImplementedError

    def __call__(
        self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, sampled_logprobs: Tensor
    ) -> PolicyTerms:
        """Per-token terms; arguments as of ``token_losses``.

        Args:
            sampled_logprobs: what the sampler itself drew the actions with; read where ``importance_cap`` is set.
        """
        losses, ratio, clipped = self.token_losses(logprobs, old_logprobs, advantages, mask)
        importance = torch.ones_like(old_logprobs)
        if self.importance_cap is not None:
            importance = (old_logprobs - sampled_logprobs).exp().clamp(max=self.importance_cap)
        return PolicyTerms(importance * losses, ratio, clipped, importance)


@dataclass(frozen=True, kw_only=True)
class ClippedPolicyLoss(PolicyLoss):
    """max(−Aρ, −A·clip(ρ, 1 − ε_low, 1 + ε_high)), ρ = π/π_old (Schulman et al. 2017, arXiv 1707.06347, Eq. 7).

    Args:
        clip_low: ε_low, in (0, 1).
        clip_high: ε_high; null: as low. Above it: likely tokens may become likelier still ("clip-higher": DAPO, Yu et
            al. 2025, arXiv 2503.14476, Eq. 10, 0.28 beside 0.2).
        dual_clip: c > 1; where A < 0 the loss is at most −cA, so that one token that became likely cannot outweigh the
            batch (Ye et al. 2020, arXiv 1912.09729, Eq. 5, c = 3). null leaves it out.
        ratio: `token`: ρ_t of each token; `sequence`: the geometric mean of a response's ρ_t for all of its tokens
            (GSPO, Zheng et al. 2025, arXiv 2507.18071, Eq. 7). Made for advantages that a response's tokens share, as
            in RLOO and GRPO: in PPO each token's gradient then carries the mean of the response's advantages.
    """

    clip_low: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    ratio: Literal["token", "sequence"] = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.clip_low < 1:
            raise ValueError(f"policy_loss.clip_low must lie in (0, 1), not {self.clip_low}")
        if self.clip_high is not None and not 0 < self.clip_high < math.inf:
            raise ValueError(f"policy_loss.clip_high must be a number greater than 0 or null, not {self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise ValueError(f"policy_loss.dual_clip must be greater than 1 or null, not {self.dual_clip}")

    def token_losses(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor) -> TokenLosses:
        ratio = token_ratio(logprobs, old_logprobs)
        if self.ratio == "sequence":
            ratio = sequence_ratio(logprobs, old_logprobs, mask)
        high = self.clip_low if self.clip_high is None else self.clip_high
        free = -advantages * ratio
        losses = torch.maximum(free, -advantages * ratio.clamp(1 - self.clip_low, 1 + high))
        if self.dual_clip is not None:
            losses = torch.where(advantages < 0, torch.minimum(losses, -self.dual_clip * advantages), losses)
        return TokenLosses(losses, ratio, losses != free)


@dataclass(frozen=True)
class ClippedValueLoss:
    """½·max((V − R)², (clip(V, V_old ± ε) − R)²) (Huang et al. 2024, "N+ implementation details").

    Args:
        clip: ε around the value at sampling time; None for a plain ½(V − R)².
        coefficient: weight of this loss beside the policy's.
    """

    clip: float | None = 0.2
    coefficient: float = 0.1

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise ValueError(f"value_loss.clip must be greater than 0 or null, not {self.clip}")
        if not self.coefficient >= 0:
            raise ValueError(f"value_loss.coefficient must be at least 0, not {self.coefficient}")

    def __call__(self, values: Tensor, old_values: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, time] each → per-token loss (without the coefficient), and whether the clipped branch was taken."""
        free = (values - returns).square()
        if self.clip is None:
            return free / 2, torch.zeros_like(free, dtype=torch.bool)
        near = old_values + (values - old_values).clamp(-self.clip, self.clip)
        clipped = (near - returns).square()
        return torch.maximum(free, clipped) / 2, clipped > free
