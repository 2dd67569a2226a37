"""Proximal policy optimisation with a learned value function.

Ziegler et al. 2019 (arXiv 1909.08593), Stiennon et al. 2020 (2009.01325), Ouyang et al. 2022 (2203.02155); details as
in Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO".

The rollout (``rollout/collect.py``) and the policy's update (``on_policy.py``) are those of every on-policy algorithm.
Here is what makes it PPO: a critic, whose values ``GAE`` makes advantages of, and its loss.

Left out: reward whitening, which adds a constant to each token's reward and so a bias to the length of responses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlhf_lit.algorithms.algorithm import StepLoss
from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.batches import ExperienceBatch, PromptBatch
from rlhf_lit.errors import UserError
from rlhf_lit.losses.advantages import GAE, AdvantageEstimator
from rlhf_lit.losses.kl import KLController
from rlhf_lit.losses.policy_gradient import ClippedValueLoss
from rlhf_lit.losses.reductions import masked_sum
from rlhf_lit.models.base import Base
from rlhf_lit.models.heads import token_values
from rlhf_lit.models.roles import Critic
from rlhf_lit.models.routing import uncollected
from rlhf_lit.rollout.collect import critic_values
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import RewardSource
from rlhf_lit.training.head_start import first_rows, measured, scale_down
from rlhf_lit.training.optimizer import Optimizer


class PPO(OnPolicy):
    """A policy trained on its own samples, its advantages told by a critic.

    Args:
        base, reward, kl, sampling: see ``OnPolicy``.
        critic: the value function.
        advantages: GAE(γ, λ), or an estimator of yours that reads the critic's values.
        value_loss: clip range and coefficient of the critic's loss.
        learning_rate: peak learning rate, of the critic too unless it has its own.
        optimizer: which optimizer.
        settings: the others of ``OnPolicy``.
    """

    has_critic: ClassVar[bool] = True

    def __init__(
        self,
        base: Base,
        reward: RewardSource,
        kl: KLController,
        sampling: Sampling = Sampling(),
        critic: Critic = Critic(),
        advantages: AdvantageEstimator = GAE(),
        value_loss: ClippedValueLoss = ClippedValueLoss(),
        learning_rate: float = 1e-5,
        optimizer: Optimizer = Optimizer(eps=1e-5),
        **settings: Any,
    ) -> None:
        super().__init__(
            base,
            reward,
            kl,
            sampling,
            advantages=advantages,
            learning_rate=learning_rate,
            optimizer=optimizer,
            **settings,
        )
        if critic.init == "reward" and reward.critic_base() is None:
            raise UserError("critic.init: the reward is a function, no model to start a critic from; set it to policy")
        self.critic = critic
        self.value_loss = value_loss

    def build(self) -> None:
        super().build()
        init = self.reward.critic_base() if self.critic.init == "reward" else None
        self.roles.add_critic(self.base, init, self.critic.trunk)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        new = self.critic.init == "policy"
        if new and self.critic.head == "scaled" and self.trainer.ckpt_path is None:
            scale_down(self, dict(self._value_head.named_parameters()), self._first_values(), "model.critic.head")

    @torch.no_grad()
    def _first_values(self) -> Tensor:
        """[tokens] the critic's values of the first training prompts, the same on all ranks."""
        if not len(rows := first_rows(self)):
            return torch.zeros(0)
        batch: PromptBatch = self.trainer.datamodule.first_seen(rows, range(len(rows)))  # type: ignore[attr-defined]
        prompts = batch.prompts.select(torch.arange(measured(batch.prompts.lengths.tolist()))).to(self.device)
        places = torch.arange(prompts.tokens.shape[1], device=self.device)
        # Not that of the first token, which in many models is unlike all others.
        mask = (places > 1) & (places < prompts.lengths[:, None])
        with self.trainer.precision_plugin.forward_context():
            values = critic_values(self.roles, replace(prompts, mask=mask), batch.micro_batch_tokens)
        return values[mask]

    @property
    def warming_up(self) -> bool:
        """Whether the critic still trains alone."""
        return self.global_step < self.critic.warmup

    def move_beta(self, kl: float, rows: int) -> None:
        """As in ``OnPolicy``, but not while the critic warms up: a policy that stands still has no KL to steer by."""
        if not self.warming_up:
            super().move_beta(kl, rows)

    # The update

    def losses(self, batch: ExperienceBatch, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        if self.critic.trunk and not self.warming_up:
            # Both losses stand on the same hidden states: one pass forwards and one backwards do for the two.
            with self.roles.acting("policy") as model:
                outputs = self.outputs(model, batch, self._value_head)
                assert outputs.values is not None
                policy = self.policy_term(outputs, batch, denominators)
                value = self.value_term(outputs.values, batch, denominators)
                yield StepLoss(policy.loss + value.loss, policy.metrics | value.metrics)
            yield from self.exact_kl_terms(batch, denominators)
            return
        if not self.warming_up:
            yield from super().losses(batch, denominators)
        with self.roles.acting("value") as model, uncollected():
            yield self.value_term(token_values(model, self._value_head, batch.sequences), batch, denominators)

    def value_term(self, values: Tensor, batch: ExperienceBatch, denominators: dict[str, Tensor]) -> StepLoss:
        """The critic's loss on a micro-batch. ``values``: [rows, time], with the critic's gradient."""
        mask, tokens = batch.sequences.mask, denominators["tokens"]
        losses, clipped = self.value_loss(values, batch.values, batch.returns)
        loss = masked_sum(losses, mask) / tokens
        clipfrac = masked_sum(clipped.float(), mask) / tokens
        return StepLoss(self.value_loss.coefficient * loss, {"value/loss": loss.detach(), "value/clipfrac": clipfrac})

    @property
    def _value_head(self) -> nn.Module:
        return self.roles.heads["value"]

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
