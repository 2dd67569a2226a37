"""REINFORCE with a leave-one-out baseline.

Kool et al. 2019; Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human
Feedback in LLMs" (arXiv 2402.14740).

The rollout and the policy's loss are those of every on-policy algorithm (``on_policy.py``); with one pass over each
rollout and one minibatch, ρ = 1 and the clipped objective's gradient is REINFORCE's. Here is what makes it RLOO: a
whole response is one action, judged by the other responses to its prompt.
"""

from __future__ import annotations

from torch import Tensor

from rlhf_lit.algorithms.algorithm import Optimizer, Schedule
from rlhf_lit.algorithms.on_policy import Estimate, OnPolicy
from rlhf_lit.batches import PromptBatch, Sequences
from rlhf_lit.losses.advantages import leave_one_out
from rlhf_lit.losses.kl import KLController
from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss
from rlhf_lit.models.loading import Base
from rlhf_lit.models.score_pass import Comparison
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import RewardSource
from rlhf_lit.rollout.shaping import Shaping
from rlhf_lit.rollout.vllm_engine import VLLM


class RLOO(OnPolicy):
    """A policy trained on its own samples, each compared with the others to its prompt; no critic.

    Needs ``data.samples_per_prompt`` of 2 or more.

    Args:
        base: the model to start from, usually an SFT run; as it was loaded, it is also the reference.
        reward: where scores come from.
        kl: the KL penalty. In the paper k1 stands in the reward: R = score − β·Σ_t k1.
        sampling: how responses are drawn.
        shaping: what is done to the scores before the penalty joins them.
        policy_loss: the clipped objective, its aggregation and its entropy bonus.
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
        policy_loss: ClippedPolicyLoss = ClippedPolicyLoss(),
        max_update_kl: float | None = None,
        learning_rate: float = 1e-6,
        optimizer: Optimizer = Optimizer(),
        schedule: Schedule = Schedule(),
        vllm: VLLM | None = None,
    ) -> None:
        super().__init__(
            base, reward, kl, sampling, shaping, policy_loss, max_update_kl, learning_rate, optimizer, schedule, vllm
        )

    def estimate(self, prompts: PromptBatch, sequences: Sequences, rewards: Tensor, comparison: Comparison) -> Estimate:
        """A_i = R_i − mean_{j≠i} R_j on every token of response i, R = Σ_t r_t."""
        total = rewards.sum(-1)
        advantages, baseline = leave_one_out(total, prompts.index)
        return self.spread(sequences.mask, total, advantages, baseline)
