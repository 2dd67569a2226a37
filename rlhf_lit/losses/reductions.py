"""Named reductions over real tokens. A loss returns per-token or per-pair values; these turn them into numbers.

Sums are divided by denominators of the *whole optimizer batch on all ranks*, handed in by the caller, so that cutting
a batch into micro-batches cannot change the result (transformers #34191).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token_mean", "sequence_mean", "constant"]


def masked_sum(values: Tensor, mask: Tensor) -> Tensor:
    """Σ values over the mask; entries off the mask may be anything, NaN included. Scalar."""
    return torch.where(mask, values, torch.zeros_like(values)).sum()


def row_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Σ over time of each row, over the mask. [rows, time] → [rows]."""
    return torch.where(mask, values, torch.zeros_like(values)).sum(-1)


def token_weights(mask: Tensor, aggregation: Aggregation, tokens: Tensor, episodes: Tensor, longest: int) -> Tensor:
    """What each token's value counts in the loss of the whole optimizer batch: loss = Σ weight·value.

    * `token_mean`: every token of the batch alike (1/tokens), as in PPO.
    * `sequence_mean`: every response alike, its tokens' mean (GRPO, arXiv 2402.03300, Eq. 3): tokens of short responses
      count more.
    * `constant`: every token 1/(episodes·longest), whatever was sampled (Dr. GRPO, arXiv 2503.20783).

    Args:
        mask: [rows, time], 1 on the tokens that count, in the dtype of the values to be weighted.
        aggregation: which of them.
        tokens, episodes: how many the whole batch holds, on all ranks.
        longest: the longest response there may be, in tokens.

    Returns:
        [rows, time], 0 off the mask.
    """
    match aggregation:
        case "token_mean":
            return mask / tokens
        case "sequence_mean":
            return mask / mask.sum(-1, keepdim=True).clamp(min=1) / episodes
        case "constant":
            return mask / (episodes * longest)


def moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, sum and sum of squares over the mask, in float64: what ranks add up before a global mean or variance."""
    real = values[mask].double()
    return torch.tensor(float(real.numel()), dtype=torch.float64, device=values.device), real.sum(), real.square().sum()


def whiten(values: Tensor, mask: Tensor, count: Tensor, total: Tensor, squares: Tensor) -> Tensor:
    """(x − μ)/√(σ² + 1e-8) with the population variance, from (global) moments; 0 off the mask.

    Source: Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO" (TRL's last PPO used the unbiased σ²).
    """
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
    whitened = (values - mean.to(values.dtype)) / torch.sqrt(variance + 1e-8).to(values.dtype)
    return torch.where(mask, whitened, torch.zeros_like(values))
