"""What the algorithms that learn from their own samples share: the rollout and the policy's loss.

Read from ``rollout`` (sample, score, shape, penalise) to ``shares`` (the update). In between stands
``estimate``, where an algorithm turns rewards into advantages: PPO by a critic, RLOO and GRPO by comparing responses to
one prompt. The data module asks for a rollout whenever its buffer is spent and hands it back in minibatches, one
optimizer step each.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.algorithms.algorithm import Algorithm, Optimizer, Schedule, StepLoss, require_no_dropout
from rlhf_lit.algorithms.policy import SCORING_BUDGET, Writer
from rlhf_lit.batches import ExperienceBatch, PromptBatch, Sequences
from rlhf_lit.batches.micro_batches import no_rows
from rlhf_lit.errors import UserError
from rlhf_lit.losses.kl import KLController, estimate_kl, fixed_point
from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss
from rlhf_lit.losses.reductions import masked_sum, row_sums, token_weights
from rlhf_lit.models.flops import Pass
from rlhf_lit.models.loading import Base
from rlhf_lit.models.logprobs import token_logprobs, token_logprobs_and_entropy
from rlhf_lit.models.packing import response_states
from rlhf_lit.models.roles import Roles
from rlhf_lit.models.score_pass import Comparison, compare_with_reference, exact_kl_to_reference
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.randomness import reseed
from rlhf_lit.rollout.engine import Samples, Sampling
from rlhf_lit.rollout.record import RolloutRecord, Scores
from rlhf_lit.rollout.rewards import RewardSource, shown
from rlhf_lit.rollout.shaping import ScoreMoments, Shaping
from rlhf_lit.rollout.vllm_engine import VLLM, VLLMEngine, require_vllm


@dataclass(frozen=True)
class Estimate:
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


class OnPolicy(Writer, Algorithm):
    """A policy trained on its own samples, against a reward and with a KL penalty to the reference.

    Args:
        base: the model to start from, usually an SFT run; as it was loaded, it is also the reference.
        reward: where scores come from.
        kl: the KL penalty: β and how it moves (FixedKL or AdaptiveKL), its estimator and its placement.
        sampling: how responses are drawn.
        shaping: what is done to the scores before the penalty joins them.
        policy_loss: the clipped objective.
        max_update_kl: stop learning from a rollout once a minibatch's mean log(π_old/π) exceeds this, in nats a token:
            the next step is then made on a new rollout. The number of steps of the run stays, its episodes grow.
        learning_rate: peak learning rate.
        optimizer: which optimizer.
        schedule: learning rate over the run.
        vllm: draw with vLLM; null draws with transformers.
    """

    learns_from = (ExperienceBatch,)
    averaged_over = "episodes"
    progress_metrics = ("scores", "kl")
    # Whether ``estimate`` needs several responses to each prompt.
    compares_responses = False

    @property
    def rescales_advantages(self) -> bool:
        """Whether ``estimate`` divides the advantages by a standard deviation."""
        return False

    def __init__(
        self,
        base: Base,
        reward: RewardSource,
        kl: KLController,
        sampling: Sampling,
        shaping: Shaping,
        policy_loss: ClippedPolicyLoss,
        max_update_kl: float | None,
        learning_rate: float,
        optimizer: Optimizer,
        schedule: Schedule,
        vllm: VLLM | None = None,
    ) -> None:
        super().__init__(base, learning_rate, optimizer, schedule)
        self.sampling = sampling
        require_no_dropout(base, type(self).__name__)
        if sampling.top_k is not None or sampling.top_p is not None:
            raise UserError(
                "sampling.top_k, sampling.top_p: the log-probs of an update are those of the whole distribution, so a "
                f"filtered sampler would teach {type(self).__name__} something else; leave them null"
            )
        if max_update_kl is not None and not max_update_kl > 0:
            raise UserError(f"max_update_kl must be greater than 0 or null, not {max_update_kl}")
        if vllm is not None:
            if base.trust_remote_code:
                raise UserError(
                    "model.vllm: a model with code of its own (base.trust_remote_code) is not handed to vLLM"
                )
            self.engine = VLLMEngine(vllm)
        self.vllm = vllm
        self.reward = reward
        self.kl = kl
        self.shaping = shaping
        self.policy_loss = policy_loss
        self.max_update_kl = max_update_kl
        # The adaptive controller's state, relative to β₀, so that a resumed run keeps the β₀ its config names.
        self.kl_multiplier = 1.0
        self.score_moments = ScoreMoments()
        self.rollout_spent = False  # what the data module asks before it hands out the next minibatch
        self.rollout_seconds = 0.0  # of sampling and scoring, so far
        self.on_rollout: Callable[[int, RolloutRecord], None] | None = None
        """Called after each rollout with its number and all that it was made of."""
        self._rollout_metrics: dict[str, float] = {}

    def setup(self, stage: str) -> None:
        if self.vllm is not None:
            require_vllm(self.trainer.strategy.root_device, self.trainer.world_size)

    def build(self) -> None:
        self.roles = Roles(self.base, reference=True)
        self.reward.share(self.roles)
        self.reward.prepare(self.tokenizer)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.compares_responses and self.trainer.datamodule.samples_per_prompt < 2:  # type: ignore[attr-defined]
            raise UserError(
                f"data.samples_per_prompt: {type(self).__name__} compares responses to one prompt; set it to 2 or more"
            )
        if self.global_rank:
            return
        if self.vllm is not None and self.policy_loss.importance_cap is None:
            print(
                "note: model.vllm: its log-probs differ from the training forward's, and nothing corrects for that "
                "while model.policy_loss.importance_cap is null (2 in the paper)",
                file=sys.stderr,
            )
        if instead := fixed_point(self.kl.estimator, self.kl.placement):
            print(
                f"note: model.kl: {self.kl.estimator} in the {self.kl.placement} converges to {instead} "
                "(on a one-token bandit; see experiments/kl_fixed_points)",
                file=sys.stderr,
            )
        elif self.kl.placement == "loss" and self.rescales_advantages:
            print(
                "note: model.kl: the advantages are divided by their standard deviation and the KL in the loss is not, "
                "so its β is in those units, and the fixed point is not π* ∝ π₀·exp(r/β)",
                file=sys.stderr,
            )

    def set_train_mode(self) -> None:
        self.roles.without_dropout()
        self.reward.eval()

    @property
    def kl_coefficient(self) -> float:
        """β as it stands."""
        return self.kl.beta * self.kl_multiplier

    # Experience

    def estimate(self, prompts: PromptBatch, sequences: Sequences, rewards: Tensor, comparison: Comparison) -> Estimate:
        """Advantages of a rollout's actions.

        Args:
            prompts: what was answered; equal ``index`` means the same prompt.
            sequences: prompt + response.
            rewards: [rows, time] r_t of each action, 0 off the mask.
            comparison: of policy and reference on the sequences.
        """
        raise NotImplementedError

    def spread(self, mask: Tensor, total: Tensor, advantages: Tensor, baseline: Tensor) -> Estimate:
        """The estimate where a whole response is one action: [rows] numbers, given to each of its tokens."""
        values, spread, returns = (torch.where(mask, x[:, None], 0.0) for x in (baseline, advantages, total))
        flat = self.sum_over_ranks((advantages == 0).float().sum())
        rows = self.sum_over_ranks(torch.tensor(float(len(total)), device=total.device))
        return Estimate(values, spread, returns, {"rollout/zero_advantages": float(flat / rows)})

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
        # Sampling draws by keys of its own; a reward function may ask the global generators.
        reseed("rollout", number, self.global_rank)
        samples = self.respond(prompts, number)
        texts = self.response_texts(samples)
        sequences, mask = samples.sequences, samples.sequences.mask
        sampled = time.perf_counter()

        comparison = self._score_pass(sequences, prompts.micro_batch_tokens)
        scores = self._scores(prompts, samples, texts)
        penalty = self._penalty(comparison)
        rewards = self._token_rewards(scores.shaped, penalty, mask)
        estimate = self.estimate(prompts, sequences, rewards, comparison)
        experience = ExperienceBatch(
            sequences,
            samples.sampled_logprobs,
            comparison.policy,
            comparison.reference,
            estimate.values,
            estimate.advantages,
            estimate.returns,
            self.kl_coefficient,
            prompts.micro_batch_tokens,
        )
        record = RolloutRecord(prompts, samples, comparison, scores, penalty, rewards, experience, texts)
        seconds = sampled - started, time.perf_counter() - sampled
        self.rollout_seconds += sum(seconds)
        self._rollout_metrics = {**self._sum_up(record, *seconds), **estimate.metrics}
        if self.on_rollout:
            self.on_rollout(number, record)
        self.move_beta(float(self._rollout_metrics["objective/kl"]), len(prompts))
        self.rollout_spent = False
        return experience

    def _score_pass(self, sequences: Sequences, budget: int) -> Comparison:
        """Policy and reference on the sampled responses, in micro-batches. [rows, time] each."""
        comparison = Comparison.empty(sequences, self.roles.value_on_trunk)
        groups = sequences.cut_responses(SCORING_BUDGET * budget, self.packed)
        for rows, counts in sharding_of(self.roles).passes(groups, no_rows):
            rows = rows.to(sequences.tokens.device)
            part = compare_with_reference(self.roles, sequences.part(rows), self.sampling.temperature)
            if counts:
                comparison.put(rows, part)
        return comparison

    def raw_scores(self, prompts: PromptBatch, samples: Samples, texts: list[str]) -> Tensor:
        """[rows] scores of the responses and their texts, as the reward source returns them."""
        budget = SCORING_BUDGET * prompts.micro_batch_tokens
        return self.reward(samples.sequences, list(prompts.texts), texts, list(prompts.rows), budget)

    def _scores(self, prompts: PromptBatch, samples: Samples, texts: list[str]) -> Scores:
        """Scores of a rollout, which the running moments take in first.

        Raises:
            UserError: one is NaN or infinite, which would stay in the moments and the weights for good.
        """
        raw = self.raw_scores(prompts, samples, texts)
        if not bool(raw.isfinite().all()):
            row = int((~raw.isfinite()).nonzero()[0])
            raise UserError(
                f"reward: row {row}, the response {shown(texts[row])}, has the score {float(raw[row])}; the reward "
                "model is broken, or too wide for its dtype"
            )
        self.score_moments.update(raw, self.sum_over_ranks)
        return Scores(raw, self.shaping(raw, samples.ended, self.score_moments), dict(self.reward.parts))

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

    def move_beta(self, kl: float, rows: int) -> None:
        """The controller's step, once per rollout and after it."""
        episodes = int(self.sum_over_ranks(torch.tensor(float(rows), device=self.device)))
        after = self.kl.next_beta(self.kl_coefficient, kl, episodes)
        self.kl_multiplier = after / self.kl.beta if self.kl.beta else 1.0

    def _sum_up(self, record: RolloutRecord, sampling: float, scoring: float) -> dict[str, float]:
        """The rollout's numbers, and how long it took."""
        means = {name: float(x) for name, x in record.means(self.sum_over_ranks, self.max_over_ranks).items()}
        tokens = self.sum_over_ranks(record.samples.sequences.mask.sum().float())
        slowest = self.max_over_ranks(torch.tensor(sampling, device=self.device))
        return {
            **means,
            "objective/kl_coef": self.kl_coefficient,
            "rollout/tokens_per_s": float(tokens / slowest),
            "time/sampling": sampling,
            "time/scoring": scoring,
        }

    # The update

    def denominators(self, batch: ExperienceBatch) -> dict[str, Tensor]:
        tokens = batch.sequences.mask.sum().float()
        return {"tokens": tokens, "episodes": torch.full_like(tokens, len(batch))}

    def losses(self, batch: ExperienceBatch, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        with self.roles.acting("policy") as model:
            yield self.policy_share(model, batch, denominators)
        yield from self.kl_shares(batch, denominators)

    def policy_share(
        self, model: nn.Module, batch: ExperienceBatch, denominators: dict[str, Tensor], states: Tensor | None = None
    ) -> StepLoss:
        """The policy's loss on a micro-batch: clipped objective, entropy bonus, and the KL where it stands there.

        Args:
            model: the policy, whose role is in force until the share has been followed backwards.
            batch: a micro-batch.
            units: denominators of the whole batch.
            states: [rows, time, width] the policy's hidden states, where they are at hand.
        """
        mask, bonus = batch.sequences.mask, self.policy_loss.entropy_coefficient
        temperature = self.sampling.temperature
        states = response_states(model, batch.sequences) if states is None else states
        if bonus:
            logprobs, entropy = token_logprobs_and_entropy(model, batch.sequences, temperature, states)
        else:
            logprobs, entropy = token_logprobs(model, batch.sequences, temperature, states), None
        terms = self.policy_loss(logprobs, batch.old_logprobs, batch.advantages, mask, batch.sampled_logprobs)
        weights = self._weights(batch, denominators, logprobs.dtype)
        loss = masked_sum(weights * terms.losses, mask)
        metrics = {
            "policy/approxkl": (logprobs - batch.old_logprobs).square() / 2,
            "policy/update_kl": batch.old_logprobs - logprobs,
            "policy/clipfrac": terms.clipped.float(),
            "policy/ratio_mean": terms.ratio,
            "policy/ratio_square": terms.ratio.square(),
        }
        if self.policy_loss.importance_cap is not None:
            metrics["policy/importance"] = terms.importance
        shares = {"policy/loss": loss.detach()}
        if entropy is not None:
            loss = loss - bonus * masked_sum(weights * entropy, mask)
            metrics["policy/entropy"] = entropy
        if self.kl.placement == "loss" and self.kl.estimator != "full":
            estimate = estimate_kl(logprobs - batch.reference_logprobs, self.kl.estimator)
            kl_loss = masked_sum(weights * estimate, mask)
            loss, shares["policy/kl_loss"] = loss + batch.kl_coefficient * kl_loss, kl_loss.detach()
        shares |= {name: masked_sum(x.detach(), mask) / denominators["tokens"] for name, x in metrics.items()}
        return StepLoss(loss, shares)

    def kl_shares(self, batch: ExperienceBatch, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        """The exact KL, where that is the penalty and stands in the loss."""
        if self.kl.placement == "loss" and self.kl.estimator == "full":
            with self.roles.acting("policy"):
                exact = exact_kl_to_reference(self.roles, batch.sequences, self.sampling.temperature)
                kl_loss = masked_sum(self._weights(batch, denominators, exact.dtype) * exact, batch.sequences.mask)
                yield StepLoss(batch.kl_coefficient * kl_loss, {"policy/kl_loss": kl_loss.detach()})

    def model_passes(self, batch: ExperienceBatch) -> list[Pass]:
        """Of the update alone; sampling and scoring have times of their own."""
        found = [self.roles.pass_of("policy", batch.sequences)]
        if self.kl.placement == "loss" and self.kl.estimator == "full":  # ``kl_shares``
            found += [found[0], self.roles.pass_of("reference", batch.sequences, backward=False)]
        return found

    def _weights(self, batch: ExperienceBatch, denominators: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
        """[rows, time] what each token counts in the policy's loss."""
        return token_weights(
            batch.sequences.mask.to(dtype),
            self.policy_loss.aggregation,
            denominators["tokens"],
            denominators["episodes"],
            self.sampling.max_new_tokens,
        )

    def log_step(self, totals: dict[str, Tensor], grad_norm: Tensor) -> None:
        if "policy/ratio_square" in totals:  # absent while a critic warms up
            square = totals.pop("policy/ratio_square")
            totals["policy/ratio_var"] = (square - totals["policy/ratio_mean"].square()).clamp(min=0)
            limit = self.max_update_kl
            self.rollout_spent = limit is not None and float(totals["policy/update_kl"]) > limit
        self.log("train/loss", totals.pop("loss"), prog_bar=True)
        for name, total in totals.items():
            self.log(name, total)
        self.log("policy/grad_norm", grad_norm)
        # Beside each step that is made on the rollout, since Lightning repeats a value until the next one comes.
        for name, value in self._rollout_metrics.items():
            shown = name in ("objective/kl", "objective/scores")
            self.log(name, value, prog_bar=shown)

    # Evaluation

    def evaluate(self, batch: PromptBatch, stage: str) -> None:
        """Score one response to each held-out prompt, and how far the policy has moved."""
        samples = self.respond(batch)
        comparison = self._score_pass(samples.sequences, batch.micro_batch_tokens)
        mask = samples.sequences.mask
        scores = self.raw_scores(batch, samples, self.response_texts(samples))
        if not len(batch):  # this rank ran the passes of the others alone
            return
        means = {
            "scores": scores.mean(),
            "kl": row_sums(comparison.logratio, mask).mean(),
            "kl_exact": row_sums(comparison.exact_kl, mask).mean(),
            "length": mask.sum(-1).float().mean(),
            "eos_rate": samples.ended.float().mean(),
        }
        self.log_averages(stage, means, torch.tensor(float(len(batch)), device=self.device), len(batch))

    def completions(self, prompts: PromptBatch) -> list[dict[str, Any]]:
        samples = self.respond(prompts)
        records = self.records_of(prompts, samples)
        scores = self.raw_scores(prompts, samples, [record["response"] for record in records]).tolist()
        return [{**record, "score": score} for record, score in zip(records, scores, strict=True)]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["kl_multiplier"] = self.kl_multiplier
        checkpoint["score_moments"] = asdict(self.score_moments)
        checkpoint["rollout_spent"] = self.rollout_spent
        checkpoint["rollout_metrics"] = dict(self._rollout_metrics)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.kl_multiplier = checkpoint["kl_multiplier"]
        self.score_moments = ScoreMoments(**checkpoint["score_moments"])
        self.rollout_spent = checkpoint["rollout_spent"]
        self._rollout_metrics = dict(checkpoint["rollout_metrics"])
