"""Group relative policy optimisation.

Shao et al. 2024, "DeepSeekMath" (arXiv 2402.03300). Dr. GRPO (Liu et al. 2025, arXiv 2503.20783) is
``scale_advantages: false`` with ``policy_loss.aggregation: constant``; GSPO (Zheng et al. 2025, arXiv 2507.18071) is
``policy_loss.ratio: sequence`` with ``policy_loss.aggregation: sequence_mean``.

The rollout and the policy's loss are those of every on-policy algorithm (``on_policy.py``). Here is what makes it GRPO:
a response is judged by its standing among the responses to its prompt.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_lit.algorithms.algorithm import Optimizer, Schedule
from rlhf_lit.algorithms.on_policy import Estimate, OnPolicy
from rlhf_lit.batches import PromptBatch, Sequences
from rlhf_lit.losses.advantages import group_relative
from rlhf_lit.losses.kl import KLController
from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss
from rlhf_lit.models.loading import Base
from rlhf_lit.models.score_pass import Comparison
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import RewardSource
from rlhf_lit.rollout.shaping import Shaping
from rlhf_lit.rollout.vllm_engine import VLLM


class GRPO(OnPolicy):
    """A policy trained on its own samples, each ranked among those to its prompt; no critic.

    Needs ``data.samples_per_prompt`` of 2 or more.

    Args:
        base: the model to start from, usually an SFT run; as it was loaded, it is also the reference.
        reward: where scores come from.
        kl: the KL penalty. In the paper k3 stands in the loss (`estimator: k3`, `placement: loss`).
        sampling: how responses are drawn.
        shaping: what is done to the scores before they are compared.
        scale_advantages: divide by the standard deviation of a prompt's rewards; Dr. GRPO does not.
        policy_loss: the clipped objective, its aggregation (in the paper `sequence_mean`) and its entropy bonus.
        max_update_kl: stop learning from a rollout once a minibatch's mean log(π_old/π) exceeds this, in nats a token.
        learning_rate: peak learning rate.
        optimizer: which optimizer.
        schedule: learning rate over the run.
        vllm: draw with vLLM, on the GPU that trains; null draws with transformers.
    """

    compares_responses = True

    def __init__(
        self,
        base: Base,
        reward: RewardSource,
        kl: KLController,
        sampling: Sampling = Sampling(),
        shaping: Shaping = Shaping(),
        scale_advantages: bool = True,
        policy_loss: ClippedPolicyLoss = ClippedPolicyLoss(aggregation="sequence_mean"),
        max_update_kl: float | None = None,
        learning_rate: float = 1e-6,
        optimizer: Optimizer = Optimizer(),
        schedule: Schedule = Schedule(),
        vllm: VLLM | None = None,
    ) -> None:
        super().__init__(
            base, reward, kl, sampling, shaping, policy_loss, max_update_kl, learning_rate, optimizer, schedule, vllm
        )
        self.scale_advantages = scale_advantages

    @property
    def rescales_advantages(self) -> bool:
        return self.scale_advantages

    def estimate(self, prompts: PromptBatch, sequences: Sequences, rewards: Tensor, comparison: Comparison) -> Estimate:
        """A_i = (R_i − μ)/(σ + 1e-4) on every token of response i, R = Σ_t r_t."""
        total = rewards.sum(-1)
        advantages, baseline = group_relative(total, prompts.index, self.scale_advantages)
        return self.spread(sequences.mask, total, advantages, baseline)
