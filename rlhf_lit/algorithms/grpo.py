"""Group relative policy optimisation.

Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300). Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) is
``advantages.scale: none`` with ``policy_loss.aggregation: constant``; GSPO (Zheng et al. 2025, arXiv 2507.18071) is
``policy_loss.ratio: sequence`` with ``policy_loss.aggregation: sequence_mean``.

A response is judged by its standing among the responses to its prompt: ``GroupRelative`` in ``losses/advantages.py``.
The rollout (``rollout/collect.py``) and the update (``on_policy.py``) are those of every on-policy algorithm. In the
paper k3 stands in the loss (``kl.estimator: k3``, ``kl.placement: loss``).

Left out: a critic, and rewards of single steps (the paper's process supervision).
"""

from __future__ import annotations

from typing import Any

from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.losses.advantages import AdvantageEstimator, GroupRelative
from rlhf_lit.losses.kl import KLController
from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss, PolicyLoss
from rlhf_lit.models.base import Base
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import RewardSource


class GRPO(OnPolicy):
    """A policy trained on its own samples, each ranked among those to its prompt; no critic.

    Needs ``data.samples_per_prompt`` of 2 or more.

    Args:
        base, reward, kl, sampling: see ``OnPolicy``.
        advantages: (R − μ)/σ over the responses to a prompt.
        policy_loss: the token's loss and its aggregation, in the paper every response alike (`sequence_mean`).
        settings: the others of ``OnPolicy``.
    """

    def __init__(
        self,
        base: Base,
        reward: RewardSource,
        kl: KLController,
        sampling: Sampling = Sampling(),
        advantages: AdvantageEstimator = GroupRelative(),
        policy_loss: PolicyLoss = ClippedPolicyLoss(aggregation="sequence_mean"),
        **settings: Any,
    ) -> None:
        super().__init__(base, reward, kl, sampling, advantages=advantages, policy_loss=policy_loss, **settings)
