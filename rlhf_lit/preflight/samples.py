"""Checks of an algorithm that answers prompts, on a few of its own answers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.batches import PromptBatch, Sequences
from rlhf_lit.batches.micro_batches import SCORING_BUDGET
from rlhf_lit.models.score_pass import Comparison
from rlhf_lit.preflight.check import Check, tolerance_of
from rlhf_lit.preflight.models import (
    absolute,
    at_start,
    logprobs_of,
    no_distance,
    padding,
    ratio_one,
    reference_stays,
    too_late,
)
from rlhf_lit.preflight.rewards import scores_alone, scores_vary
from rlhf_lit.preflight.rows import ANSWER_TOKENS, MOVED_ROWS, Looked, prompts_within
from rlhf_lit.preflight.sampler import own_distribution, sampler
from rlhf_lit.rollout.collect import raw_scores, score_pass
from rlhf_lit.rollout.engine import Samples
from rlhf_lit.rollout.gap import gap_of


class Rollout:
    """Answers to a few prompts, drawn with the noise that evaluations use, and what was found out about them; each is
    made when a check first asks for it."""

    def __init__(self, module: OnPolicy, prompts: PromptBatch, budget: int, looked: Looked) -> None:
        self.module = module
        self.prompts = prompts_within(prompts, min(ANSWER_TOKENS, module.sampling.limit), budget).to(module.device)
        self.budget = int(prompts.micro_batch_tokens)
        self._looked = looked

    @cached_property
    def samples(self) -> Samples:
        found = self.module.respond(self.prompts, at_most=ANSWER_TOKENS)
        self._looked.rows, self._looked.tokens = len(self.prompts), int(found.sequences.lengths.sum())
        return found

    @property
    def sequences(self) -> Sequences:
        return self.samples.sequences

    def compared(self, sequences: Sequences) -> Comparison:
        return score_pass(self.module.roles, sequences, self.budget, self.module.sampling.temperature)

    @cached_property
    def comparison(self) -> Comparison:
        return self.compared(self.sequences)

    def score(self, rows: Tensor) -> Tensor:
        """[n] numbers of answers → [n] their scores, as a batch."""
        there = rows.to(self.samples.ended.device)
        chosen = Samples(self.sequences.select(there), self.samples.sampled_logprobs[there], self.samples.ended[there])
        texts = [self._texts[row] for row in rows.tolist()]
        return raw_scores(self.module.reward, self.prompts.select(rows), chosen, texts)

    @cached_property
    def _texts(self) -> list[str]:
        return self.module.response_texts(self.samples)

    @cached_property
    def scores(self) -> Tensor:
        return self.score(torch.arange(len(self.prompts)))


def _drawn(rollout: Rollout) -> Check:
    lengths = rollout.prompts.prompts.lengths
    if bool((lengths == lengths[0]).all()):  # there is no padding between them: some are to be made shorter
        return sampler(rollout.module, rollout.prompts.prompts)
    return own_distribution(rollout.module, gap_of(rollout.samples, rollout.comparison.policy))


def _samples_padding(rollout: Rollout) -> Check:
    roles = rollout.module.roles
    return padding(logprobs_of(roles), absolute, rollout.sequences, SCORING_BUDGET * rollout.budget, roles.policy)


def _samples_no_distance(rollout: Rollout) -> Check:
    if not at_start(rollout.module):
        return too_late("KL = 0", rollout.module)
    return no_distance(rollout.comparison, rollout.sequences.mask, tolerance_of(rollout.module.roles).same)


def _samples_reference_stays(rollout: Rollout) -> Check:
    part = rollout.sequences.select(torch.arange(min(MOVED_ROWS, len(rollout.sequences))))
    return reference_stays(rollout.module.roles, lambda: rollout.compared(part), part.mask)


def _ratio_one(rollout: Rollout) -> Check:
    return ratio_one(rollout.module, rollout.sequences, rollout.comparison.policy, rollout.budget)


def _scores_alone(rollout: Rollout) -> Check:
    if not bool(rollout.scores.isfinite().all()):
        return Check("reward alone", "skipped", "the scores are no numbers")
    # Of the whole module, as the reward may stand on the policy's base.
    return scores_alone(rollout.score, rollout.scores, tolerance_of(rollout.module).reshaped)


OF_SAMPLES: tuple[tuple[str, Callable[[Rollout], Check]], ...] = (
    ("sampler", _drawn),
    ("padding", _samples_padding),
    ("KL = 0", _samples_no_distance),
    ("reference", _samples_reference_stays),
    ("ratio = 1", _ratio_one),
    ("reward scores", lambda rollout: scores_vary(rollout.scores)),
    ("reward alone", _scores_alone),
)
"""Checks of an algorithm that answers prompts."""
