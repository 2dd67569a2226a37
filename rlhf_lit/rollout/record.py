"""The rollout record: everything a rollout was made of, and the numbers that sum it up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rlhf_lit.batches import ExperienceBatch, PromptBatch
from rlhf_lit.losses.reductions import masked_sum, row_sums
from rlhf_lit.models.score_pass import Comparison
from rlhf_lit.rollout.engine import Samples

OverRanks = Callable[[Tensor], Tensor]


class Scores(NamedTuple):
    """Scores of a rollout's responses, [rows] each.

    Attributes:
        raw: as the reward source returned them.
        shaped: normalised, clipped, the missing-EOS rule applied: what the policy learns from.
        parts: of the sources that a sum is made of, by name.
    """

    raw: Tensor
    shaped: Tensor
    parts: dict[str, Tensor]


@dataclass(frozen=True)
class RolloutRecord:
    """One rank's share of a rollout.

    Attributes:
        prompts: what was answered.
        samples: the responses.
        comparison: policy and reference on them.
        scores: of the responses.
        penalty: [rows, time] β·kl_t, what each token's reward lost.
        rewards: [rows, time] r_t.
        experience: what the policy learns from.
        texts: the responses as text.
    """

    prompts: PromptBatch
    samples: Samples
    comparison: Comparison
    scores: Scores
    penalty: Tensor
    rewards: Tensor
    experience: ExperienceBatch
    texts: list[str]

    def means(self, sum_over_ranks: OverRanks, max_over_ranks: OverRanks) -> dict[str, Tensor]:
        """The rollout's numbers: means over episodes on all ranks, unless docs/metrics.md says otherwise."""
        mask, comparison, scores = self.samples.sequences.mask, self.comparison, self.scores
        non_score = -row_sums(self.penalty, mask)
        per_row = {
            "objective/kl": row_sums(comparison.logratio, mask),
            "objective/kl_exact": row_sums(comparison.exact_kl, mask),
            "objective/scores": scores.raw,
            "objective/shaped_scores": scores.shaped,
            **{f"objective/scores/{name}": part for name, part in scores.parts.items()},
            "objective/non_score_reward": non_score,
            "objective/rlhf_reward": scores.shaped + non_score,
            "rollout/length": mask.sum(-1).float(),
            "rollout/eos_rate": self.samples.ended.float(),
        }
        rows = sum_over_ranks(torch.tensor(float(len(mask)), device=mask.device))
        gap = (self.samples.sampled_logprobs - comparison.policy).abs().max()
        return {
            **{name: sum_over_ranks(values.sum()) / rows for name, values in per_row.items()},
            "objective/entropy": sum_over_ranks(masked_sum(comparison.entropy, mask))
            / sum_over_ranks(mask.sum().float()),
            "rollout/sampler_gap": max_over_ranks(gap),
        }

    def contents(self) -> dict[str, Any]:
        """All of it by name, for who wants to look or to recompute: tensors on the CPU, texts, and β."""
        experience = self.experience
        tensors = {
            "tokens": experience.sequences.tokens,
            "lengths": experience.sequences.lengths,
            "mask": experience.sequences.mask,
            "ended": self.samples.ended,
            "prompt_index": self.prompts.index,
            "sampled_logprobs": experience.sampled_logprobs,
            "policy_logprobs": experience.old_logprobs,
            "reference_logprobs": experience.reference_logprobs,
            "exact_kl": self.comparison.exact_kl,
            "entropy": self.comparison.entropy,
            "scores": self.scores.raw,
            **{f"scores/{name}": part for name, part in self.scores.parts.items()},
            "shaped_scores": self.scores.shaped,
            "penalty": self.penalty,
            "rewards": self.rewards,
            "values": experience.values,
            "advantages": experience.advantages,
            "returns": experience.returns,
        }
        texts = {"prompts": list(self.prompts.texts), "responses": self.texts}
        return {"kl_coef": experience.kl_coefficient, **texts, **{name: x.cpu() for name, x in tensors.items()}}
