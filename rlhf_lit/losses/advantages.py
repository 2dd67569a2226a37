"""Advantages: generalised advantage estimation, and comparisons among the responses to one prompt."""

from __future__ import annotations

import torch
from torch import Tensor


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """δ_t = r_t + γV_{t+1} − V_t; A_t = δ_t + γλA_{t+1}; R_t = A_t + V_t, over each row's actions.

    Source: Schulman et al. 2015, arXiv 1506.02438, Eq. 16.

    V past the last action is 0: a response that was cut at the length limit is treated as ended.

    Args:
        rewards, values: [rows, time], aligned to the action's token.
        mask: [rows, time], True on actions; they need not be contiguous (a turn of the user may stand between).
        gamma, lam: γ and λ.

    Returns:
        Advantages (not whitened) and returns, [rows, time], 0 off the mask.
    """
    advantages = torch.zeros_like(values)
    next_value = torch.zeros_like(values[:, 0])
    next_advantage = torch.zeros_like(values[:, 0])
    for t in range(values.shape[1] - 1, -1, -1):
        action = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(action, advantage, 0.0)
        next_value = torch.where(action, values[:, t], next_value)
        next_advantage = torch.where(action, advantage, next_advantage)
    returns = torch.where(mask, advantages + values, torch.zeros_like(values))
    return advantages, returns


def leave_one_out(rewards: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """A_i = R_i − mean_{j≠i} R_j over the responses to one prompt.

    Source: RLOO, Ahmadian et al. 2024, arXiv 2402.14740, §3.3.

    Args:
        rewards: [rows] R of whole responses.
        groups: [rows] int64, equal for responses to the same prompt; at least two of each.

    Returns:
        [rows] advantages and baselines.
    """
    same = groups[:, None] == groups[None]
    # In float64, which autocast leaves alone (it would make the products bf16), and where equal rewards cancel exactly.
    others = (same & ~torch.eye(len(groups), dtype=torch.bool, device=groups.device)).double()
    assert (others.sum(-1) > 0).all(), "a response without another to its prompt"
    baseline = others @ rewards.double() / others.sum(-1)
    return (rewards - baseline).to(rewards.dtype), baseline.to(rewards.dtype)


def group_relative(rewards: Tensor, groups: Tensor, scale: bool) -> tuple[Tensor, Tensor]:
    """A_i = (R_i − μ)/(σ + 1e-4), μ and the unbiased σ over the responses to one prompt.

    Source: GRPO, Shao et al. 2024, arXiv 2402.03300, §4.1.2; without σ, Dr. GRPO, Liu et al. 2025, arXiv 2503.20783.

    Args:
        rewards: [rows] R of whole responses.
        groups: [rows] int64, equal for responses to the same prompt; at least two of each.
        scale: divide by σ.

    Returns:
        [rows] advantages and baselines μ.
    """
    same = (groups[:, None] == groups[None]).double()  # as in leave_one_out
    size = same.sum(-1)
    assert (size > 1).all(), "a response without another to its prompt"
    mean = same @ rewards.double() / size
    deviation = rewards - mean
    if scale:
        deviation = deviation / ((same @ deviation.square() / (size - 1)).sqrt() + 1e-4)
    return deviation.to(rewards.dtype), mean.to(rewards.dtype)
