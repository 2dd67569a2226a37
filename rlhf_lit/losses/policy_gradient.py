"""PPO's two losses (Schulman et al. 2017, arXiv 1707.06347), per token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# exp(20) ≈ 5e8: far outside any clip range, and safe in fp32.
LOG_RATIO_LIMIT = 20.0


@dataclass(frozen=True)
class ClippedPolicyLoss:
    """max(−Aρ, −A·clip(ρ, 1 − ε, 1 + ε)), ρ = exp(log π − log π_old) (Eq. 7).

    Args:
        clip: ε.
    """

    clip: float = 0.2

    def __post_init__(self) -> None:
        if not self.clip > 0:
            raise ValueError(f"policy_loss.clip must be greater than 0, not {self.clip}")

    def __call__(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[rows, time] each → per-token loss, ratio ρ, and whether the clipped branch was taken."""
        log_ratio = (logprobs - old_logprobs).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
        ratio = log_ratio.exp()
        free = -advantages * ratio
        clipped = -advantages * ratio.clamp(1 - self.clip, 1 + self.clip)
        return torch.maximum(free, clipped), ratio, clipped > free


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
        if self.coefficient < 0:
            raise ValueError(f"value_loss.coefficient must be at least 0, not {self.coefficient}")

    def __call__(self, values: Tensor, old_values: Tensor, returns: Tensor) -> tuple[Tensor, Tensor]:
        """[rows, time] each → per-token loss (without the coefficient), and whether the clipped branch was taken."""
        free = (values - returns).square()
        if self.clip is None:
            return free / 2, torch.zeros_like(free, dtype=torch.bool)
        near = old_values + (values - old_values).clamp(-self.clip, self.clip)
        clipped = (near - returns).square()
        return torch.maximum(free, clipped) / 2, clipped > free
