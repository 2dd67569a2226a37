"""Advantages: generalised advantage estimation, and comparisons among the responses to one prompt.

The functions are the papers' equations; the classes at the end are what a config names as ``model.advantages``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from rlhf_lit.losses.reductions import moments, whiten


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


@dataclass(frozen=True)
class RolloutRewards:
    """What a rollout gives to estimate advantages from.

    Attributes:
        rewards: [rows, time] r_t of each action, 0 off the mask.
        mask: [rows, time] True on actions.
        prompts: [rows] int64, equal for responses to one prompt, which are all on one rank.
        values: [rows, time] the critic's value of the state in which each action was taken; None without a critic.
        sum_over_ranks: Σ over ranks of a scalar.
    """

    rewards: Tensor
    mask: Tensor
    prompts: Tensor
    values: Tensor | None = None
    sum_over_ranks: Callable[[Tensor], Tensor] = lambda value: value

    @property
    def totals(self) -> Tensor:
        """[rows] R = Σ_t r_t of whole responses."""
        return self.rewards.sum(-1)

    def whitened(self, advantages: Tensor) -> Tensor:
        """[rows, time] brought to mean 0 and variance 1 over all tokens of the rollout on all ranks."""
        whole = map(self.sum_over_ranks, moments(advantages, self.mask))
        return whiten(advantages, self.mask, *whole)


@dataclass(frozen=True)
class Advantages:
    """Advantages, and what they were estimated with.

    Attributes:
        values: [rows, time] what the returns were compared with: a critic's values, or the baseline of a response.
        advantages, returns: [rows, time], 0 off the mask.
        metrics: what there is to say of it, over all ranks.
    """

    values: Tensor
    advantages: Tensor
    returns: Tensor
    metrics: dict[str, float]

    @classmethod
    def of_responses(cls, rollout: RolloutRewards, advantages: Tensor, baseline: Tensor) -> Advantages:
        """Where a whole response is one action: [rows] numbers, given to each of its tokens."""
        rows_to_tokens = (baseline, advantages, rollout.totals)
        values, spread, returns = (torch.where(rollout.mask, x[:, None], 0.0) for x in rows_to_tokens)
        zeros = rollout.sum_over_ranks((advantages == 0).float().sum())
        rows = rollout.sum_over_ranks(torch.tensor(float(len(baseline)), device=baseline.device))
        return cls(values, spread, returns, {"rollout/zero_advantages": float(zeros / rows)})


@dataclass(frozen=True)
class AdvantageEstimator:
    """A family: what is made of a rollout's rewards. A member is a frozen dataclass, in any file, named by its class
    path; it provides ``__call__``, says what it needs of a rollout, and may add fields.

    Attributes:
        needs_critic: whether it reads ``RolloutRewards.values``.
        needs_several: whether it compares several responses to each prompt.
    """

    needs_critic: ClassVar[bool] = False
    needs_several: ClassVar[bool] = False

    @property
    def rescales(self) -> bool:
        """Whether the advantages are divided by a standard deviation, which a KL in the loss is not."""
        return False

    def __call__(self, rollout: RolloutRewards) -> Advantages:
        """The advantages of a rollout's actions."""
        raise NotImplementedError


@dataclass(frozen=True)
class GAE(AdvantageEstimator):
    """Generalised advantage estimation over a critic's values (Schulman et al. 2015, arXiv 1506.02438, Eq. 16).

    Args:
        gamma: γ, discount per token.
        lam: λ.
        whiten: bring the advantages of a rollout to mean 0 and variance 1 over its tokens, on all ranks.
    """

    gamma: float = 1.0
    lam: float = 0.95
    whiten: bool = True

    needs_critic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"advantages.{name} must lie in [0, 1], not {getattr(self, name)}")

    @property
    def rescales(self) -> bool:
        return self.whiten

    def __call__(self, rollout: RolloutRewards) -> Advantages:
        assert rollout.values is not None, "a critic comes first"
        values, mask = rollout.values, rollout.mask
        advantages, returns = generalised_advantages(rollout.rewards, values, mask, self.gamma, self.lam)
        metrics = {"value/explained_variance": explained_variance(values, returns, mask, rollout.sum_over_ranks)}
        return Advantages(values, rollout.whitened(advantages) if self.whiten else advantages, returns, metrics)


@dataclass(frozen=True)
class LeaveOneOut(AdvantageEstimator):
    """A_i = R_i − mean_{j≠i} R_j on every token of response i, R = Σ_t r_t (RLOO, arXiv 2402.14740, §3.3)."""

    needs_several: ClassVar[bool] = True

    def __call__(self, rollout: RolloutRewards) -> Advantages:
        return Advantages.of_responses(rollout, *leave_one_out(rollout.totals, rollout.prompts))


@dataclass(frozen=True)
class GroupRelative(AdvantageEstimator):
    """A_i = (R_i − μ)/(σ + 1e-4) on every token of response i, R = Σ_t r_t (GRPO, arXiv 2402.03300, §4.1.2).

    Args:
        scale: `group`: divide by σ, the standard deviation of a prompt's rewards; `none`: do not (Dr. GRPO, arXiv
            2503.20783).
    """

    scale: Literal["group", "none"] = "group"

    needs_several: ClassVar[bool] = True

    @property
    def rescales(self) -> bool:
        return self.scale != "none"

    def __call__(self, rollout: RolloutRewards) -> Advantages:
        found = group_relative(rollout.totals, rollout.prompts, self.scale == "group")
        return Advantages.of_responses(rollout, *found)


def explained_variance(
    values: Tensor, returns: Tensor, mask: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]
) -> float:
    """1 − Var(R − V)/Var(R) over the rollout's tokens on all ranks; 0 where the returns do not vary."""

    def variance(x: Tensor) -> float:
        count, total, squares = (float(sum_over_ranks(moment)) for moment in moments(x, mask))
        return squares / count - (total / count) ** 2

    spread = variance(returns)
    return 1 - variance(returns - values) / spread if spread > 0 else 0.0
