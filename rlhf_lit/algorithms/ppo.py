"""Proximal policy optimisation with a learned value function.

Ziegler et al. 2019 (arXiv 1909.08593), Stiennon et al. 2020 (2009.01325), Ouyang et al. 2022 (2203.02155); details as
in Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO".

The rollout (sample, score, shape, penalise) and the policy's loss are those of every on-policy algorithm
(``on_policy.py``). Here is what makes it PPO: a critic, advantages by generalised advantage estimation, and the value
loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.algorithms.algorithm import Optimizer, Schedule, StepLoss
from rlhf_lit.algorithms.on_policy import SCORING_BUDGET, Estimate, OnPolicy
from rlhf_lit.batches import ExperienceBatch, PromptBatch, Sequences
from rlhf_lit.batches.micro_batches import no_rows
from rlhf_lit.errors import UserError
from rlhf_lit.losses.advantages import generalised_advantages
from rlhf_lit.losses.kl import KLController
from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss, ClippedValueLoss
from rlhf_lit.losses.reductions import masked_sum, moments, whiten
from rlhf_lit.models.flops import Pass
from rlhf_lit.models.heads import token_values
from rlhf_lit.models.loading import Base
from rlhf_lit.models.packing import response_states
from rlhf_lit.models.roles import Critic
from rlhf_lit.models.score_pass import Comparison
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import RewardSource
from rlhf_lit.rollout.shaping import Shaping
from rlhf_lit.rollout.vllm_engine import VLLM


class PPO(OnPolicy):
    """A policy trained on its own samples, its advantages told by a critic.

    Args:
        base: the model to start from, usually an SFT run; as it was loaded, it is also the reference.
        reward: where scores come from.
        kl: the KL penalty: β and how it moves (FixedKL or AdaptiveKL), its estimator and its placement. The default,
            k1 inside the reward, has the fixed point π* ∝ π₀·exp(r/β); not every combination has.
        sampling: how responses are drawn.
        shaping: what is done to the scores before the penalty joins them.
        critic: the value function.
        gamma: γ, discount per token.
        lam: λ of generalised advantage estimation.
        whiten_advantages: bring the advantages of a rollout to mean 0 and variance 1 over its tokens.
        policy_loss: the clipped objective, its aggregation and its entropy bonus.
        value_loss: clip range and coefficient of the critic's loss.
        max_update_kl: stop learning from a rollout once a minibatch's mean log(π_old/π) exceeds this, in nats a token:
            the next step is then made on a new rollout. The number of steps of the run stays, its episodes grow.
        learning_rate: peak learning rate, of the critic too unless it has its own.
        optimizer: which optimizer.
        schedule: learning rate over the run.
        vllm: draw with vLLM, on the GPU that trains; null draws with transformers.
    """

    def __init__(
        self,
        base: Base,
        reward: RewardSource,
        kl: KLController,
        sampling: Sampling = Sampling(),
        shaping: Shaping = Shaping(),
        critic: Critic = Critic(),
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten_advantages: bool = True,
        policy_loss: ClippedPolicyLoss = ClippedPolicyLoss(),
        value_loss: ClippedValueLoss = ClippedValueLoss(),
        max_update_kl: float | None = None,
        learning_rate: float = 1e-5,
        optimizer: Optimizer = Optimizer(eps=1e-5),
        schedule: Schedule = Schedule(),
        vllm: VLLM | None = None,
    ) -> None:
        super().__init__(
            base, reward, kl, sampling, shaping, policy_loss, max_update_kl, learning_rate, optimizer, schedule, vllm
        )
        if critic.init == "reward" and reward.critic_base() is None:
            raise UserError("critic.init: the reward is a function, no model to start a critic from; set it to policy")
        for name, value in (("gamma", gamma), ("lam", lam)):
            if not 0 <= value <= 1:
                raise UserError(f"{name} must lie in [0, 1], not {value}")
        self.critic = critic
        self.gamma = gamma
        self.lam = lam
        self.whiten_advantages = whiten_advantages
        self.value_loss = value_loss

    def build(self) -> None:
        super().build()
        init = self.reward.critic_base() if self.critic.init == "reward" else None
        self.roles.add_critic(self.base, init, self.critic.trunk)

    @property
    def rescales_advantages(self) -> bool:
        return self.whiten_advantages

    # Experience

    def move_beta(self, kl: float, rows: int) -> None:
        """As ever, but not while the critic warms up: a policy that stands still has no KL to steer by."""
        if not self.warming_up:
            super().move_beta(kl, rows)

    def estimate(self, prompts: PromptBatch, sequences: Sequences, rewards: Tensor, comparison: Comparison) -> Estimate:
        """Generalised advantages over the critic's values."""
        mask, values = sequences.mask, comparison.values
        if values is None:
            values = self._values(sequences, SCORING_BUDGET * prompts.micro_batch_tokens).to(rewards.dtype)
        advantages, returns = generalised_advantages(rewards, values, mask, self.gamma, self.lam)
        explained = self._explained_variance(values, returns, mask)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask, *map(self.sum_over_ranks, moments(advantages, mask)))
        return Estimate(values, advantages, returns, {"value/explained_variance": explained})

    def _values(self, sequences: Sequences, budget: int) -> Tensor:
        """[rows, time] of a critic with a pass of its own, in micro-batches of ``budget`` tokens."""
        values = torch.zeros(sequences.tokens.shape, device=sequences.tokens.device)
        groups = sequences.cut_responses(budget, self.packed)
        for rows, counts in sharding_of(self.roles).passes(groups, no_rows):
            rows = rows.to(values.device)
            part = sequences.part(rows)
            with self.roles.acting("value") as model:
                found = token_values(model, self.roles.heads["value"], part, response_states(model, part))
            if counts:
                values[rows, : part.tokens.shape[1]] = found.to(values.dtype)
        return values

    def _explained_variance(self, values: Tensor, returns: Tensor, mask: Tensor) -> float:
        """1 − Var(R − V)/Var(R) over the rollout's tokens on all ranks."""

        def variance(x: Tensor) -> float:
            count, total, squares = (float(self.sum_over_ranks(m)) for m in moments(x, mask))
            return squares / count - (total / count) ** 2

        spread = variance(returns)
        return 1 - variance(returns - values) / spread if spread > 0 else 0.0

    # The update

    @property
    def warming_up(self) -> bool:
        """Whether the critic still trains alone."""
        return self.global_step < self.critic.warmup

    def losses(self, batch: ExperienceBatch, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        if self.critic.trunk and not self.warming_up:
            # Both losses stand on the same hidden states: one pass forwards and one backwards do for the two.
            with self.roles.acting("policy") as model:
                states = response_states(model, batch.sequences)
                policy = self.policy_share(model, batch, denominators, states)
                value = self.value_share(model, batch, denominators, states)
                yield StepLoss(policy.loss + value.loss, policy.metrics | value.metrics)
            yield from self.kl_shares(batch, denominators)
            return
        if not self.warming_up:
            yield from super().losses(batch, denominators)
        with self.roles.acting("value") as model:
            yield self.value_share(model, batch, denominators)

    def model_passes(self, batch: ExperienceBatch) -> list[Pass]:
        """While the critic warms up it is alone; later a critic on the policy's trunk shares the policy's pass."""
        policy = [] if self.warming_up else super().model_passes(batch)
        if policy and self.critic.trunk:
            return policy
        return [*policy, self.roles.pass_of("value", batch.sequences, head=False)]

    def value_share(
        self, model: nn.Module, batch: ExperienceBatch, denominators: dict[str, Tensor], states: Tensor | None = None
    ) -> StepLoss:
        """The critic's loss on a micro-batch; arguments as of ``policy_share``, of the critic."""
        mask, tokens = batch.sequences.mask, denominators["tokens"]
        states = response_states(model, batch.sequences) if states is None else states
        values = token_values(model, self.roles.heads["value"], batch.sequences, states)
        losses, clipped = self.value_loss(values, batch.values, batch.returns)
        loss = masked_sum(losses, mask) / tokens
        clipfrac = masked_sum(clipped.float(), mask) / tokens
        return StepLoss(self.value_loss.coefficient * loss, {"value/loss": loss.detach(), "value/clipfrac": clipfrac})

    def log_step(self, totals: dict[str, Tensor], grad_norm: Tensor) -> None:
        super().log_step(totals, grad_norm)
        if self.critic.learning_rate is not None:
            optimizer: Any = self.optimizers()
            self.log("train/critic_learning_rate", optimizer.param_groups[1]["lr"])

    def moving_parameters(self) -> list[nn.Parameter]:
        return self.roles.critic_parameters() if self.warming_up else self.trainable_parameters()

    def parameter_groups(self) -> list[dict[str, Any]]:
        if self.critic.learning_rate is None:
            return super().parameter_groups()
        critic = self.roles.critic_parameters()
        theirs = set(critic)
        policy = [parameter for parameter in self.trainable_parameters() if parameter not in theirs]
        return [
            {"params": policy, "lr": self.learning_rate},
            {"params": critic, "lr": self.critic.learning_rate},
        ]
