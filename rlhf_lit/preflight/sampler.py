"""Whether what is sampled is drawn from the distribution that is trained."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.batches import Sequences
from rlhf_lit.models.anatomy import stop_ids
from rlhf_lit.preflight.check import Check
from rlhf_lit.rollout.gap import MOST_TOKENS, allowed_gap, cure_of, measured_gap

PROMPTS = 8


def prompts_of(sequences: Sequences) -> Sequences:
    """The prompts of the first few of some rows: all before a row's first masked token, and one token at least."""
    first = sequences.mask.int().argmax(-1).clamp(min=1).tolist()[:PROMPTS]
    rows = [tokens[:n] for tokens, n in zip(sequences.tokens.tolist(), first, strict=False)]
    return Sequences.pad(rows, [[False] * len(row) for row in rows]).to(sequences.tokens.device)


def sampler(module: Any, prompts: Sequences, at_most: int = MOST_TOKENS) -> Check:
    """The sampler's log-probs = the training forward's, on short responses to prompts of different lengths.

    A failure where the algorithm learns from what it samples; elsewhere a warning, as only samples, predictions and win
    rates are wrong.

    Args:
        module: an algorithm that writes.
        prompts: a few.
        at_most: tokens of a response.
    """
    sampling = replace(module.sampling, max_new_tokens=min(module.sampling.limit, at_most))
    gap = measured_gap(module.engine, module.roles, prompts, sampling, stop_ids(module.tokenizer, module.roles.policy))
    if gap is None:
        return Check("sampler", "skipped", "no prompt leaves room for a response")
    return own_distribution(module, gap)


def own_distribution(module: Any, gap: float) -> Check:
    """The verdict on a gap between the two, in nats per token (``rollout.gap``)."""
    vllm = module.vllm
    learns, limit = isinstance(module, OnPolicy), allowed_gap(module.roles.policy, vllm)
    found = f"its log-probs and those of the training forward {gap:.1g} apart, {limit:g} allowed"
    if gap <= limit:
        return Check("sampler", "ok", found)
    if learns:
        return Check("sampler", "failed", found, cure_of(vllm))
    return Check("sampler", "warning", found, "what this model generates is not its own: trust no sample, no win rate")
