"""One rollout from top to bottom: sample, score, shape, penalise, estimate advantages.

``collect`` is called by an on-policy algorithm (``algorithms/on_policy.py``) whenever the loader's buffer is spent
(``rollout/loop.py``), and its experience is handed out in minibatches, one optimizer step each.

Source: the order of the steps and where the score sits follow Ziegler et al. 2019 (arXiv 1909.08593) and Huang et al.
2024, "The N+ Implementation Details of RLHF with PPO".
"""

from __future__ import annotations

import time
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from rlhf_lit.batches import ExperienceBatch, PromptBatch, Sequences
from rlhf_lit.batches.micro_batches import SCORING_BUDGET, no_rows
from rlhf_lit.errors import UserError
from rlhf_lit.losses.advantages import AdvantageEstimator, RolloutRewards
from rlhf_lit.losses.kl import KLController
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.heads import token_values
from rlhf_lit.models.packing import layout_of
from rlhf_lit.models.roles import Roles
from rlhf_lit.models.score_pass import Comparison, compare_with_reference
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.rollout.engine import Samples, Sampling
from rlhf_lit.rollout.gap import allowed_gap, median_gap, require_own_samples
from rlhf_lit.rollout.record import RolloutRecord, Scores
from rlhf_lit.rollout.rewards import RewardSource, shown
from rlhf_lit.rollout.shaping import ScoreMoments, Shaping
from rlhf_lit.rollout.vllm_engine import VLLM


class Collector(Protocol):
    """What a rollout asks of the algorithm that collects it."""

    roles: Roles
    reward: RewardSource
    kl: KLController
    sampling: Sampling
    shaping: Shaping
    advantages: AdvantageEstimator
    score_moments: ScoreMoments
    vllm: VLLM | None

    @property
    def kl_coefficient(self) -> float:
        """β as it stands."""

    def respond(self, prompts: PromptBatch, stream: int) -> Samples:
        """One response per row."""

    def response_texts(self, samples: Samples) -> list[str]:
        """The responses as text."""

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Σ over ranks of a scalar."""

    def max_over_ranks(self, value: Tensor) -> Tensor:
        """The largest of the ranks' scalars."""


class Collected(NamedTuple):
    """A rollout.

    Attributes:
        experience: what the policy learns from, in the order of the prompts.
        record: all that it was made of.
        metrics: the rollout's numbers, over all ranks.
        seconds: of sampling and scoring together, on this rank.
    """

    experience: ExperienceBatch
    record: RolloutRecord
    metrics: dict[str, float]
    seconds: float


@torch.no_grad()
def collect(policy: Collector, prompts: PromptBatch, number: int) -> Collected:
    """Answer prompts with the present policy, and work out what it is to learn from that.

    Args:
        policy: the algorithm.
        prompts: this rank's part of the rollout's prompts, on its device.
        number: which rollout of the run this is; keys the sampling noise.

    Raises:
        UserError: what is sampled is not the policy's own (``rollout.gap``), or a score is NaN or infinite.
    """
    started = time.perf_counter()
    samples = policy.respond(prompts, number)
    texts = policy.response_texts(samples)
    sequences, mask = samples.sequences, samples.sequences.mask
    sampled = time.perf_counter()

    comparison = score_pass(policy.roles, sequences, prompts.micro_batch_tokens, policy.sampling.temperature)
    gap = policy.max_over_ranks(torch.tensor(median_gap(samples, comparison.policy), device=mask.device))
    require_own_samples(float(gap), allowed_gap(policy.roles.policy, policy.vllm), number, policy.vllm)
    scores = _scores(policy, prompts, samples, texts)
    beta = policy.kl_coefficient
    penalty = beta * policy.kl.in_reward(comparison)
    rewards = token_rewards(scores.shaped, penalty, mask)
    values = comparison.values
    if values is None and policy.advantages.needs_critic:
        values = critic_values(policy.roles, sequences, prompts.micro_batch_tokens).to(rewards.dtype)
    estimated = policy.advantages(RolloutRewards(rewards, mask, prompts.index, values, policy.sum_over_ranks))

    experience = ExperienceBatch(
        sequences=sequences,
        sampled_logprobs=samples.sampled_logprobs,
        old_logprobs=comparison.policy,  # from the training forward, not from the sampler: the first ratio is 1
        reference_logprobs=comparison.reference,
        values=estimated.values,
        advantages=estimated.advantages,
        returns=estimated.returns,
        kl_coefficient=beta,
        micro_batch_tokens=prompts.micro_batch_tokens,
    )
    record = RolloutRecord(prompts, samples, comparison, scores, penalty, rewards, experience, texts)
    sampling, scoring = sampled - started, time.perf_counter() - sampled
    metrics = {**_summary(policy, record, sampling, scoring), **estimated.metrics}
    return Collected(experience, record, metrics, sampling + scoring)


def score_pass(roles: Roles, sequences: Sequences, budget: int, temperature: float) -> Comparison:
    """Policy and reference on sampled responses, in micro-batches. [rows, time] each.

    Args:
        roles: a policy with a reference.
        sequences: prompt + response, the mask on the response.
        budget: tokens of a training micro-batch.
        temperature: T, divides the logits of both.
    """
    comparison = Comparison.empty(sequences, roles.value_on_trunk)
    groups = sequences.cut_responses(SCORING_BUDGET * budget, layout_of(roles))
    for rows, counts in sharding_of(roles).passes(groups, no_rows):
        rows = rows.to(sequences.tokens.device)
        part = compare_with_reference(roles, sequences.part(rows), temperature)
        if counts:
            comparison.put(rows, part)
    return comparison


def critic_values(roles: Roles, sequences: Sequences, budget: int) -> Tensor:
    """[rows, time] values of a critic with a body of its own, in micro-batches; arguments as of ``score_pass``."""
    values = torch.zeros(sequences.tokens.shape, device=sequences.tokens.device)
    groups = sequences.cut_responses(SCORING_BUDGET * budget, layout_of(roles))
    for rows, counts in sharding_of(roles).passes(groups, no_rows):
        rows = rows.to(values.device)
        part = sequences.part(rows)
        with roles.acting("value") as model:
            found = token_values(model, roles.heads["value"], part)
        if counts:
            values[rows, : part.tokens.shape[1]] = found.to(values.dtype)
    return values


def raw_scores(reward: RewardSource, prompts: PromptBatch, samples: Samples, texts: list[str]) -> Tensor:
    """[rows] scores of the responses and their texts, as the reward source returns them."""
    budget = SCORING_BUDGET * prompts.micro_batch_tokens
    return reward(samples.sequences, list(prompts.texts), texts, list(prompts.rows), budget)


def held_out_means(policy: Collector, prompts: PromptBatch, stream: int) -> dict[str, Tensor]:
    """Means over one response to each prompt, on this rank: its score, and how far the policy has moved."""
    samples = policy.respond(prompts, stream)
    sequences, mask = samples.sequences, samples.sequences.mask
    comparison = score_pass(policy.roles, sequences, prompts.micro_batch_tokens, policy.sampling.temperature)
    return {
        "scores": raw_scores(policy.reward, prompts, samples, policy.response_texts(samples)).mean(),
        "kl": row_sums(comparison.logratio, mask).mean(),
        "kl_exact": row_sums(comparison.exact_kl, mask).mean(),
        "length": mask.sum(-1).float().mean(),
        "eos_rate": samples.ended.float().mean(),
    }


def token_rewards(scores: Tensor, penalty: Tensor, mask: Tensor) -> Tensor:
    """r_t = −β·kl_t + 1[t = last action]·score. The score sits on the last real action, not one past it.

    Args:
        scores: [rows].
        penalty: [rows, time] β·kl_t.
        mask: [rows, time] True on actions.

    Returns:
        [rows, time], 0 off the mask.
    """
    rewards = -penalty
    time_index = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, time_index, -1).max(-1).values
    rewards[torch.arange(len(rewards), device=mask.device), last] += scores
    return torch.where(mask, rewards, torch.zeros_like(rewards))


def _scores(policy: Collector, prompts: PromptBatch, samples: Samples, texts: list[str]) -> Scores:
    """Scores of a rollout, raw and shaped; the running moments take the raw ones in first."""
    raw = raw_scores(policy.reward, prompts, samples, texts)
    if not bool(raw.isfinite().all()):  # it would stay in the moments and the weights for good
        row = int((~raw.isfinite()).nonzero()[0])
        raise UserError(
            f"reward: the response {shown(texts[row])} to {shown(prompts.texts[row])} has the score {float(raw[row])}; "
            "the reward model is broken, or too wide for its dtype"
        )
    policy.score_moments.update(raw, policy.sum_over_ranks)
    return Scores(raw, policy.shaping(raw, samples.ended, policy.score_moments), dict(policy.reward.parts))


def _summary(policy: Collector, record: RolloutRecord, sampling: float, scoring: float) -> dict[str, float]:
    """The rollout's numbers, and the seconds it took."""
    means = {name: float(x) for name, x in record.means(policy.sum_over_ranks, policy.max_over_ranks).items()}
    mask = record.samples.sequences.mask
    tokens = policy.sum_over_ranks(mask.sum().float())
    slowest = policy.max_over_ranks(torch.tensor(sampling, device=mask.device))
    return {
        **means,
        "objective/kl_coef": record.experience.kl_coefficient,
        "rollout/tokens_per_s": float(tokens / slowest),
        "time/sampling": sampling,
        "time/scoring": scoring,
    }
