"""Proximal policy optimisation against a reward, with a KL penalty to the reference.

Ziegler et al. 2019 (arXiv 1909.08593), Stiennon et al. 2020 (2009.01325), Ouyang et al. 2022 (2203.02155); details as
in Huang et al. 2024, "The N+ Implementation Details of RLHF with PPO".

Read from ``rollout`` (sample, score, penalise, estimate advantages) to ``shares`` (the update). The data module asks
for a rollout whenever its buffer is spent and hands it back in minibatches, one optimizer step each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from rlhf_lit.algorithms.base import Optimizer, Schedule, Share, require_no_dropout
from rlhf_lit.algorithms.writing import WritingAlgorithm
from rlhf_lit.batches import ExperienceBatch, PromptBatch, Sequences, cut_by_tokens
from rlhf_lit.errors import UserError
from rlhf_lit.losses.advantages import generalised_advantages
from rlhf_lit.losses.kl import KLController, estimate_kl, fixed_point
from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss, ClippedValueLoss
from rlhf_lit.losses.reductions import masked_sum, moments, row_sums, whiten
from rlhf_lit.models.comparison import Comparison, compare_with_reference, exact_kl_to_reference
from rlhf_lit.models.heads import token_values
from rlhf_lit.models.loading import Base
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.roles import Critic, Roles
from rlhf_lit.rollout.engine import Samples, Sampling
from rlhf_lit.rollout.rewards import MissingEOS, RewardSource

# Scoring keeps no activations, so more padded tokens fit than in a training micro-batch.
SCORING_BUDGET = 4


class PPO(WritingAlgorithm):
    """A policy trained on its own samples.

    Args:
        base: the model to start from, usually an SFT run; as it was loaded, it is also the reference.
        reward: where scores come from.
        kl: the KL penalty: β and how it moves (FixedKL or AdaptiveKL), its estimator and its placement. The default,
            k1 inside the reward, has the fixed point π* ∝ π₀·exp(r/β); not every combination has.
        sampling: how responses are drawn.
        critic: the value function.
        gamma: γ, discount per token.
        lam: λ of generalised advantage estimation.
        whiten_advantages: bring the advantages of a rollout to mean 0 and variance 1 over its tokens.
        missing_eos: what becomes of the score of a response without EOS; null leaves it.
        policy_loss, value_loss: clip ranges and the value coefficient.
        learning_rate: peak learning rate, of the policy and the critic.
        optimizer: which optimizer.
        schedule: learning rate over the run.
    """

    progress_metrics = ("scores", "kl")

    def __init__(
        self,
        base: Base,
        reward: RewardSource,
        kl: KLController,
        sampling: Sampling = Sampling(),
        critic: Critic = Critic(),
        gamma: float = 1.0,
        lam: float = 0.95,
        whiten_advantages: bool = True,
        missing_eos: MissingEOS | None = None,
        policy_loss: ClippedPolicyLoss = ClippedPolicyLoss(),
        value_loss: ClippedValueLoss = ClippedValueLoss(),
        learning_rate: float = 1e-5,
        optimizer: Optimizer = Optimizer(eps=1e-5),
        schedule: Schedule = Schedule(),
    ) -> None:
        super().__init__(base, learning_rate, optimizer, schedule, sampling)
        require_no_dropout(base, "PPO")
        if critic.init == "reward" and reward.critic_base() is None:
            raise UserError("critic.init: the reward is a function, no model to start a critic from; set it to policy")
        self.reward = reward
        self.kl = kl
        self.critic = critic
        self.gamma = gamma
        self.lam = lam
        self.whiten_advantages = whiten_advantages
        self.missing_eos = missing_eos
        self.policy_loss = policy_loss
        self.value_loss = value_loss
        # The adaptive controller's state, relative to β₀, so that a resumed run keeps the β₀ its config names.
        self.kl_multiplier = 1.0
        self._rollout_metrics: dict[str, Tensor | float] = {}

    def build(self) -> None:
        self.roles = Roles(self.base, reference=True)
        self.reward.prepare(self.tokenizer)
        init = self.reward.critic_base() if self.critic.init == "reward" else None
        self.roles.add_critic(self.base, init, self.critic.trunk)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if (instead := fixed_point(self.kl.estimator, self.kl.placement)) and self.global_rank == 0:
            print(
                f"note: model.kl: {self.kl.estimator} in the {self.kl.placement} converges to {instead} "
                "(on a one-token bandit; see experiments/kl_fixed_points)",
                file=sys.stderr,
            )

    def modes(self) -> None:
        self.roles.without_dropout()
        self.reward.eval()

    @property
    def kl_coefficient(self) -> float:
        """β as it stands."""
        return self.kl.beta * self.kl_multiplier

    # Experience

    @torch.no_grad()
    def rollout(self, prompts: PromptBatch, number: int) -> ExperienceBatch:
        """Answer prompts with the present policy, and work out what it is to learn from that.

        Args:
            prompts: this rank's share of the rollout's prompts, on this device.
            number: which rollout of the run this is; keys the sampling noise.

        Returns:
            Experience in the order of the prompts.
        """
        started = time.perf_counter()
        samples = self.respond(prompts, number)
        sequences, mask = samples.sequences, samples.sequences.mask
        sampled = time.perf_counter()

        comparison, values = self._score_pass(sequences, prompts.micro_batch_tokens)
        scores = self._scores(prompts, samples)
        penalty = self._penalty(comparison)
        rewards = self._token_rewards(scores, penalty, mask)
        advantages, returns = generalised_advantages(rewards, values, mask, self.gamma, self.lam)
        explained = self._explained_variance(values, returns, mask)
        if self.whiten_advantages:
            advantages = whiten(advantages, mask, *map(self.sum_over_ranks, moments(advantages, mask)))

        metrics = self._summarise(samples, comparison, scores, penalty, started, sampled)
        self._rollout_metrics = {**metrics, "value/explained_variance": explained}
        episodes = int(self.sum_over_ranks(torch.tensor(float(len(prompts)), device=self.device)))
        beta = self.kl_coefficient
        after = self.kl.next_beta(beta, float(metrics["objective/kl"]), episodes)
        self.kl_multiplier = after / self.kl.beta if self.kl.beta else 1.0
        return ExperienceBatch(
            sequences,
            comparison.policy,
            comparison.reference,
            values,
            advantages,
            returns,
            beta,
            prompts.micro_batch_tokens,
        )

    def _score_pass(self, sequences: Sequences, budget: int) -> tuple[Comparison, Tensor]:
        """Policy, reference and critic on the sampled responses, in micro-batches. [rows, time] each."""
        comparison = Comparison.empty(sequences)
        values = torch.zeros_like(comparison.policy)
        for rows in cut_by_tokens(sequences.lengths.cpu(), SCORING_BUDGET * budget):
            rows = rows.to(values.device)
            part = sequences.select(rows)
            width = part.tokens.shape[1]
            comparison.put(rows, compare_with_reference(self.roles, part, self.sampling.temperature))
            with self.roles.acting("value") as model:
                values[rows, :width] = token_values(model, self.roles.heads["value"], part).to(values.dtype)
        return comparison, values

    def _scores(self, prompts: PromptBatch, samples: Samples) -> Tensor:
        """[rows] scores of the responses, the missing-EOS rule applied."""
        scores = self.reward(
            samples.sequences,
            list(prompts.texts),
            self.response_texts(samples),
            list(prompts.rows),
            SCORING_BUDGET * prompts.micro_batch_tokens,
        )
        return self.missing_eos(scores, samples.ended) if self.missing_eos else scores

    def _penalty(self, comparison: Comparison) -> Tensor:
        """β·kl_t, what each token's reward loses; 0 where the penalty stands in the loss. [rows, time]."""
        if self.kl.placement == "loss":
            return torch.zeros_like(comparison.policy)
        full = self.kl.estimator == "full"
        return self.kl_coefficient * (
            comparison.exact_kl if full else estimate_kl(comparison.logratio, self.kl.estimator)
        )

    def _token_rewards(self, scores: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
        """r_t = −β·kl_t + 1[t = last action]·score. The score sits on the last real action, not one past it."""
        rewards = -penalty
        time_index = torch.arange(mask.shape[1], device=mask.device)
        last = torch.where(mask, time_index, -1).max(-1).values
        rewards[torch.arange(len(rewards), device=mask.device), last] += scores
        return torch.where(mask, rewards, torch.zeros_like(rewards))

    def _explained_variance(self, values: Tensor, returns: Tensor, mask: Tensor) -> float:
        """1 − Var(R − V)/Var(R) over the rollout's tokens on all ranks."""

        def variance(x: Tensor) -> float:
            count, total, squares = (float(self.sum_over_ranks(m)) for m in moments(x, mask))
            return squares / count - (total / count) ** 2

        spread = variance(returns)
        return 1 - variance(returns - values) / spread if spread > 0 else 0.0

    def _summarise(
        self,
        samples: Samples,
        comparison: Comparison,
        scores: Tensor,
        penalty: Tensor,
        started: float,
        sampled: float,
    ) -> dict[str, Tensor | float]:
        """The rollout's numbers: means over episodes on all ranks, unless docs/metrics.md says otherwise."""
        mask = samples.sequences.mask
        non_score = -row_sums(penalty, mask)
        per_row = {
            "objective/kl": row_sums(comparison.logratio, mask),
            "objective/kl_exact": row_sums(comparison.exact_kl, mask),
            "objective/scores": scores,
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": scores + non_score,
            "rollout/length": mask.sum(-1).float(),
            "rollout/eos_rate": samples.ended.float(),
        }
        rows = self.sum_over_ranks(torch.tensor(float(len(scores)), device=scores.device))
        tokens = self.sum_over_ranks(mask.sum().float())
        gap = (samples.sampled_logprobs - comparison.policy).abs()
        means = {name: self.sum_over_ranks(values.sum()) / rows for name, values in per_row.items()}
        return {
            **means,
            "objective/entropy": self.sum_over_ranks(masked_sum(comparison.entropy, mask)) / tokens,
            "objective/kl_coef": self.kl_coefficient,
            "rollout/sampler_gap": gap.max(),
            "rollout/tokens_per_s": float(mask.sum()) / (sampled - started),
            "time/sampling": sampled - started,
            "time/scoring": time.perf_counter() - sampled,
        }

    # The update

    def units(self, batch: ExperienceBatch) -> dict[str, Tensor]:
        return {"tokens": batch.sequences.mask.sum().float()}

    @property
    def weight_of(self) -> str:
        return "episodes"

    def shares(self, batch: ExperienceBatch, units: dict[str, Tensor]) -> Iterator[Share]:
        mask, tokens = batch.sequences.mask, units["tokens"]
        with self.roles.acting("policy") as model:
            logprobs = token_logprobs(model, batch.sequences, self.sampling.temperature)
            losses, ratio, clipped = self.policy_loss(logprobs, batch.old_logprobs, batch.advantages)
            with torch.no_grad():
                metrics = {
                    "policy/loss": losses,
                    "policy/approxkl": (logprobs - batch.old_logprobs).square() / 2,
                    "policy/clipfrac": clipped.float(),
                    "policy/ratio_mean": ratio,
                    "policy/ratio_square": ratio.square(),
                }
                shares = {name: masked_sum(per_token, mask) / tokens for name, per_token in metrics.items()}
            loss = masked_sum(losses, mask) / tokens
            if self.kl.placement == "loss" and self.kl.estimator != "full":
                estimate = estimate_kl(logprobs - batch.reference_logprobs, self.kl.estimator)
                kl_loss = masked_sum(estimate, mask) / tokens
                loss, shares["policy/kl_loss"] = loss + batch.kl_coefficient * kl_loss, kl_loss.detach()
            # The backward pass of this share runs before the role is given up.
            yield Share(loss, shares)
        if self.kl.placement == "loss" and self.kl.estimator == "full":
            with self.roles.acting("policy"):
                exact = exact_kl_to_reference(self.roles, batch.sequences, self.sampling.temperature)
                kl_loss = masked_sum(exact, mask) / tokens
                yield Share(batch.kl_coefficient * kl_loss, {"policy/kl_loss": kl_loss.detach()})
        with self.roles.acting("value") as model:
            values = token_values(model, self.roles.heads["value"], batch.sequences)
            losses, clipped = self.value_loss(values, batch.values, batch.returns)
            loss = masked_sum(losses, mask) / tokens
            clipfrac = masked_sum(clipped.float(), mask) / tokens
            yield Share(self.value_loss.coefficient * loss, {"value/loss": loss.detach(), "value/clipfrac": clipfrac})

    def log_step(self, totals: dict[str, Tensor], grad_norm: Tensor) -> None:
        square = totals.pop("policy/ratio_square")
        totals["policy/ratio_var"] = (square - totals["policy/ratio_mean"].square()).clamp(min=0)
        self.log("train/loss", totals.pop("loss"), prog_bar=True)
        for name, total in totals.items():
            self.log(name, total)
        self.log("policy/grad_norm", grad_norm)
        # Beside each step that is made on the rollout, since Lightning repeats a value until the next one comes.
        for name, value in self._rollout_metrics.items():
            shown = name in ("objective/kl", "objective/scores")
            self.log(name, float(value), prog_bar=shown)

    # Evaluation

    def evaluate(self, batch: PromptBatch, stage: str) -> None:
        """Score one response to each held-out prompt, and how far the policy has moved."""
        samples = self.respond(batch)
        comparison, _ = self._score_pass(samples.sequences, batch.micro_batch_tokens)
        mask = samples.sequences.mask
        means = {
            "scores": self._scores(batch, samples).mean(),
            "kl": row_sums(comparison.logratio, mask).mean(),
            "kl_exact": row_sums(comparison.exact_kl, mask).mean(),
            "length": mask.sum(-1).float().mean(),
            "eos_rate": samples.ended.float().mean(),
        }
        self.log_averages(stage, means, torch.tensor(float(len(batch)), device=self.device), len(batch))

    def completions(self, prompts: PromptBatch) -> list[dict[str, Any]]:
        samples = self.respond(prompts)
        scores = self._scores(prompts, samples).tolist()
        records = self.records_of(prompts, samples)
        return [{**record, "score": score} for record, score in zip(records, scores, strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_multiplier"] = self.kl_multiplier
        checkpoint["rollout_metrics"] = {name: float(value) for name, value in self._rollout_metrics.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.kl_multiplier = checkpoint["kl_multiplier"]
        self._rollout_metrics = dict(checkpoint["rollout_metrics"])
