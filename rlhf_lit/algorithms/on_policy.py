"""What the algorithms that learn from their own samples share: when a rollout is made, and the policy's update.

A rollout is ``rollout/collect.py``; ``rollout/loop.py`` asks for one whenever its buffer is spent, and hands it out in
minibatches, one optimizer step each. How rewards become advantages is ``model.advantages``, a token's loss
``model.policy_loss``, the penalty ``model.kl``.

Left out: filtered sampling (top-k, top-p), whose log-probs are not the update's, and dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from rlhf_lit.algorithms.algorithm import Algorithm, StepLoss
from rlhf_lit.algorithms.policy import EVALUATION, Writer
from rlhf_lit.batches import ExperienceBatch, PromptBatch
from rlhf_lit.errors import UserError, say
from rlhf_lit.losses.advantages import AdvantageEstimator, LeaveOneOut
from rlhf_lit.losses.kl import KLController
from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss, PolicyLoss
from rlhf_lit.losses.reductions import masked_sum, token_weights
from rlhf_lit.models.base import Base, require_no_dropout
from rlhf_lit.models.logprobs import PolicyOutputs, policy_outputs
from rlhf_lit.models.roles import Roles
from rlhf_lit.models.score_pass import exact_kl_to_reference
from rlhf_lit.randomness import reseed
from rlhf_lit.rollout.collect import collect, held_out_means, raw_scores
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.record import RolloutRecord
from rlhf_lit.rollout.rewards import RewardSource
from rlhf_lit.rollout.shaping import ScoreMoments, Shaping
from rlhf_lit.rollout.vllm_engine import UNCORRECTED, VLLM, VLLMEngine, require_vllm
from rlhf_lit.training.optimizer import Optimizer, Schedule

# What a checkpoint holds beside the weights and the moments of the scores.
STATE = ("kl_multiplier", "rollout_spent", "rollout_metrics")


class OnPolicy(Writer, Algorithm):
    """A policy trained on its own samples, against a reward and with a KL penalty to the reference.

    Args:
        base: the model to start from, usually an SFT run; as it was loaded, it is also the reference.
        reward: where scores come from.
        kl: the KL penalty: β and how it moves (FixedKL or AdaptiveKL), its estimator and its placement. The default,
            k1 inside the reward, has the fixed point π* ∝ π₀·exp(r/β); not every combination has.
        sampling: how responses are drawn.
        shaping: what is done to the scores before the penalty joins them.
        advantages: what is made of the rewards: GAE, LeaveOneOut, GroupRelative, or a class of yours.
        policy_loss: the token's loss, its aggregation, sampler correction and entropy bonus.
        max_update_kl: stop learning from a rollout once a minibatch's mean log(π_old/π) exceeds this, in nats a token:
            the next step is then made on a new rollout. The number of steps of the run stays, its episodes grow.
        learning_rate: peak learning rate.
        optimizer: which optimizer.
        schedule: learning rate over the run.
        vllm: draw with vLLM, on the GPU that trains; null draws with transformers.
    """

    learns_from = (ExperienceBatch,)
    averaged_over = "episodes"
    progress_metrics = ("scores", "kl")
    has_critic: ClassVar[bool] = False

    def __init__(
        self,
        base: Base,
        reward: RewardSource,
        kl: KLController,
        sampling: Sampling = Sampling(),
        shaping: Shaping = Shaping(),
        advantages: AdvantageEstimator = LeaveOneOut(),
        policy_loss: PolicyLoss = ClippedPolicyLoss(),
        max_update_kl: float | None = None,
        learning_rate: float = 1e-6,
        optimizer: Optimizer = Optimizer(),
        schedule: Schedule = Schedule(),
        vllm: VLLM | None = None,
    ) -> None:
        super().__init__(base, learning_rate, optimizer, schedule)
        name = type(self).__name__
        require_no_dropout(base, name)
        if sampling.top_k is not None or sampling.top_p is not None:
            raise UserError(
                "sampling.top_k, sampling.top_p: the log-probs of an update are those of the whole distribution, so a "
                f"filtered sampler would teach {name} something else; leave them null"
            )
        if max_update_kl is not None and not max_update_kl > 0:
            raise UserError(f"max_update_kl must be greater than 0 or null, not {max_update_kl}")
        if advantages.needs_critic != self.has_critic:
            reads, instead = ("a critic", "PPO") if advantages.needs_critic else ("no critic", "RLOO")
            raise UserError(f"model.advantages: {type(advantages).__name__} reads {reads}; use {instead}, not {name}")
        if vllm is not None:
            self.engine = VLLMEngine(vllm, base.trust_remote_code)
        self.vllm = vllm
        self.reward = reward
        self.kl = kl
        self.sampling = sampling
        self.shaping = shaping
        self.advantages = advantages
        self.policy_loss = policy_loss
        self.max_update_kl = max_update_kl
        # The adaptive controller's state, relative to β₀, so that a resumed run keeps the β₀ its config names.
        self.kl_multiplier = 1.0
        self.score_moments = ScoreMoments()
        self.rollout_spent = False  # what the last step said of its rollout; the loader asks before the next minibatch
        self.rollout_seconds = 0.0  # of sampling and scoring, so far
        self.rollout_metrics: dict[str, float] = {}
        # Called after each rollout with its number and all that it was made of.
        self.on_rollout: Callable[[int, RolloutRecord], None] | None = None

    # Setup

    def setup(self, stage: str) -> None:
        if self.vllm is not None:
            require_vllm(self.trainer.strategy.root_device, self.trainer.world_size)

    def build(self) -> None:
        self.roles = Roles(self.base, reference=True)
        self.reward.share(self.roles)
        self.reward.prepare(self.tokenizer)

    def set_train_mode(self) -> None:
        self.roles.without_dropout()
        self.reward.eval()

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.advantages.needs_several and self.trainer.datamodule.samples_per_prompt < 2:  # type: ignore[attr-defined]
            name = type(self).__name__
            raise UserError(f"data.samples_per_prompt: {name} compares responses to one prompt; set it to 2 or more")
        if self.vllm is not None and self.policy_loss.importance_cap is None:
            say(UNCORRECTED)
        if note := self.kl.note(self.advantages.rescales):
            say(f"note: model.kl: {note}")

    # The rollout

    @property
    def kl_coefficient(self) -> float:
        """β as it stands."""
        return self.kl.beta * self.kl_multiplier

    def rollout(self, prompts: PromptBatch, number: int) -> ExperienceBatch:
        """A rollout with the present policy (``rollout.collect``), and the controller's step after it."""
        # Sampling draws by keys of its own; a reward function may ask the global generators.
        reseed("rollout", number, self.global_rank)
        collected = collect(self, prompts, number)
        self.rollout_seconds += collected.seconds
        self.rollout_metrics = collected.metrics
        if self.on_rollout:
            self.on_rollout(number, collected.record)
        self.move_beta(self.rollout_metrics["objective/kl"], len(prompts))
        self.rollout_spent = False
        return collected.experience

    def move_beta(self, kl: float, rows: int) -> None:
        """The controller's step, once per rollout and after it."""
        episodes = int(self.sum_over_ranks(torch.tensor(float(rows), device=self.device)))
        after = self.kl.next_beta(self.kl_coefficient, kl, episodes)
        self.kl_multiplier = after / self.kl.beta if self.kl.beta else 1.0

    # The update

    def denominators(self, batch: ExperienceBatch) -> dict[str, Tensor]:
        tokens = batch.sequences.mask.sum().float()
        return {"tokens": tokens, "episodes": torch.full_like(tokens, len(batch))}

    def losses(self, batch: ExperienceBatch, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        with self.roles.acting("policy") as model:
            yield self.policy_term(self.outputs(model, batch), batch, denominators)
        yield from self.exact_kl_terms(batch, denominators)

    def outputs(self, model: nn.Module, batch: ExperienceBatch, value_head: nn.Module | None = None) -> PolicyOutputs:
        """One pass through the policy, whose role must be in force until the backward pass has run."""
        bonus = self.policy_loss.entropy_coefficient > 0
        return policy_outputs(model, batch.sequences, self.sampling.temperature, entropy=bonus, value_head=value_head)

    def policy_term(self, outputs: PolicyOutputs, batch: ExperienceBatch, denominators: dict[str, Tensor]) -> StepLoss:
        """The policy's loss on a micro-batch, with the entropy bonus and an estimated KL where they stand there."""
        mask, logprobs, loss_of = batch.sequences.mask, outputs.logprobs, self.policy_loss
        terms = loss_of(logprobs, batch.old_logprobs, batch.advantages, mask, batch.sampled_logprobs)
        weights = self._weights(batch, denominators, logprobs.dtype)
        loss = masked_sum(weights * terms.losses, mask)
        metrics = {"policy/loss": loss.detach()}
        per_token = terms.metrics(logprobs, batch.old_logprobs)
        if loss_of.importance_cap is not None:
            per_token["policy/importance"] = terms.importance
        if outputs.entropy is not None:
            loss = loss - loss_of.entropy_coefficient * masked_sum(weights * outputs.entropy, mask)
            per_token["policy/entropy"] = outputs.entropy
        if (kl := self.kl.in_loss(logprobs - batch.reference_logprobs)) is not None:
            kl_loss = masked_sum(weights * kl, mask)
            loss, metrics["policy/kl_loss"] = loss + batch.kl_coefficient * kl_loss, kl_loss.detach()
        metrics |= {name: masked_sum(x.detach(), mask) / denominators["tokens"] for name, x in per_token.items()}
        return StepLoss(loss, metrics)

    def exact_kl_terms(self, batch: ExperienceBatch, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        """The exact KL, where that is the penalty and stands in the loss: a pass of its own."""
        if self.kl.exact_in_loss:
            with self.roles.acting("policy"):
                exact = exact_kl_to_reference(self.roles, batch.sequences, self.sampling.temperature)
                kl_loss = masked_sum(self._weights(batch, denominators, exact.dtype) * exact, batch.sequences.mask)
                yield StepLoss(batch.kl_coefficient * kl_loss, {"policy/kl_loss": kl_loss.detach()})

    def _weights(self, batch: ExperienceBatch, denominators: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """[rows, time] what each token counts in the policy's loss."""
        tokens, episodes = denominators["tokens"], denominators["episodes"]
        mask, longest = batch.sequences.mask.to(dtype), self.sampling.limit
        return token_weights(mask, self.policy_loss.aggregation, tokens, episodes, longest)

    def log_step(self, totals: dict[str, Tensor], grad_norm: Tensor) -> None:
        if "policy/ratio_square" in totals:  # absent while a critic warms up
            square = totals.pop("policy/ratio_square")
            totals["policy/ratio_var"] = (square - totals["policy/ratio_mean"].square()).clamp(min=0)
        self.log("train/loss", totals.pop("loss"), prog_bar=True)
        for name, total in totals.items():
            self.log("train/router_loss" if name == "router_loss" else name, total)
        self.log("policy/grad_norm", grad_norm)
        # Beside each step that is made on the rollout, since Lightning repeats a value until the next one comes.
        for name, value in self.rollout_metrics.items():
            self.log(name, value, prog_bar=name in ("objective/kl", "objective/scores"))

    def step(self, batch: ExperienceBatch) -> dict[str, Tensor]:
        totals = super().step(batch)
        moved, limit = totals.get("policy/update_kl"), self.max_update_kl
        self.rollout_spent = moved is not None and limit is not None and float(moved) > limit
        return totals

    # Evaluation

    def evaluate(self, batch: PromptBatch, stage: str) -> None:
        """Score one response to each held-out prompt, and how far the policy has moved."""
        means = held_out_means(self, batch, EVALUATION)
        if len(batch):  # else this rank only made the others' passes
            self.log_averages(stage, means, torch.tensor(float(len(batch)), device=self.device), len(batch))

    def completions(self, prompts: PromptBatch) -> list[dict[str, Any]]:
        samples = self.respond(prompts)
        records = self.records_of(prompts, samples)
        scores = raw_scores(self.reward, prompts, samples, [record["response"] for record in records]).tolist()
        return [{**record, "score": score} for record, score in zip(records, scores, strict=True)]

    # Checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint.update({name: getattr(self, name) for name in STATE}, score_moments=asdict(self.score_moments))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.score_moments = ScoreMoments(**checkpoint["score_moments"])
        for name in STATE:
            setattr(self, name, checkpoint[name])
