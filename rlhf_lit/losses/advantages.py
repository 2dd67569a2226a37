"""Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438)."""

from __future__ import annotations

import torch
from torch import Tensor


def generalised_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """δ_t = r_t + γV_{t+1} − V_t; A_t = δ_t + γλA_{t+1}; R_t = A_t + V_t, over each row's actions (Eq. 16).

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
