"""Which checks a run gets, and on which rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.algorithms.offline import OfflineAlgorithm
from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.algorithms.policy import Writer
from rlhf_lit.batches import Batch, PromptBatch, Sequences
from rlhf_lit.batches.micro_batches import SCORING_BUDGET, cut_by_tokens
from rlhf_lit.data.text_module import TextDataModule
from rlhf_lit.errors import UserError
from rlhf_lit.losses.supervised import NLLLoss
from rlhf_lit.models.anatomy import stop_ids
from rlhf_lit.models.score_pass import Comparison, compare_with_reference
from rlhf_lit.preflight.check import Check, tolerance_of
from rlhf_lit.preflight.models import (
    absolute,
    logprobs_of,
    no_distance,
    padding,
    preference_loss,
    ratio_one,
    reference_stays,
    relative,
    same_as_cached,
    scores_of,
    starting_loss,
    trainable_parameters,
)
from rlhf_lit.preflight.rewards import scores_alone, scores_vary
from rlhf_lit.preflight.sampler import prompts_of, sampler
from rlhf_lit.preflight.text import text_kept
from rlhf_lit.preflight.tokens import Marks, one_bos, supervised_eos, supervised_tokens
from rlhf_lit.rollout.collect import raw_scores, score_pass
from rlhf_lit.rollout.engine import Samples

TOKEN_ROWS = 64  # rows whose tokens are read
MODEL_ROWS = 4  # rows (or pairs) that go through the models
PROMPTS = 8  # prompts that are answered and scored
ANSWER_TOKENS = 32  # longest answer to one of them


def checks(module: Algorithm, data: TextDataModule | None, rank: int = 0, world: int = 1) -> Iterator[Check]:
    """The checks of a run, one after the other, on rows of the data module or as far as can be told without them.

    Token faults end the list: a model has nothing to say about rows without supervised tokens.

    Args:
        module: with its models built, in the modes it trains in.
        data: after ``setup``; None where the run has loaders of its own.
        rank, world: which rows this process looks at.
    """
    yield trainable_parameters(module)
    if data is None:
        return
    # Of rows that are not trained on, a cache may not know the reference's log-probs.
    cached = isinstance(module, OfflineAlgorithm) and module.cache is not None
    known = data.rows_seen("train") if cached else data.examples["train"]
    places = _places(len(known), TOKEN_ROWS, rank, world)
    rows = [known[place] for place in places]
    batch = data.first_seen(rows, places)
    if not isinstance(batch, Batch | PromptBatch):
        raise UserError(
            f"data: {type(data).__name__} makes {type(batch).__name__}, which is no kind of batch: derive it from "
            "rlhf_lit.batches.Batch"
        )
    yield text_kept(module.tokenizer, [(row["row"], row["source"]) for row in rows])
    failed = False
    for check in token_checks(module, batch, [row["row"] for row in rows]):
        failed |= check.verdict == "failed"
        yield check
    if failed:
        return
    some = batch.select(torch.arange(min(len(rows), PROMPTS if isinstance(batch, PromptBatch) else MODEL_ROWS)))
    some = module.on_before_batch_transfer(some, 0)
    yield from model_checks(module, some.to(module.device))


def _places(size: int, count: int, rank: int, world: int) -> list[int]:
    """Which rows a rank looks at: different ones on each, as far as they reach, and one at least."""
    return list(range(rank, size, world))[:count] or [rank % size]


def token_checks(module: Algorithm, batch: Batch | PromptBatch, rows: Sequence[int]) -> Iterator[Check]:
    """What the tokens of a batch tell.

    Args:
        module: whose tokenizer made them.
        batch: as the data module makes it.
        rows: numbers of its rows in the data file.

    Raises:
        UserError: a kind of batch of the user's own, whose answers cannot be told apart by row.
    """
    stops = _stops(module)
    marks = Marks.of(module.tokenizer, stops)
    if isinstance(batch, PromptBatch):
        yield one_bos([batch.prompts], rows, marks)
        return
    sides = batch.answers()
    if not sides:
        return
    rows = [rows[row] for row in batch.rows_of_answers().tolist()]
    if any(len(side) != len(rows) for side in sides):
        name = type(batch).__name__
        raise UserError(
            f"{name}.answers(): {' and '.join(str(len(side)) for side in sides)} sequences for {len(rows)} rows; say "
            f"in {name}.rows_of_answers() which row each belongs to"
        )
    yield one_bos(sides, rows, marks)
    supervised = supervised_tokens(sides, rows)
    yield supervised
    if supervised.verdict == "ok":
        yield supervised_eos(sides, rows, stops)


def _stops(module: Algorithm) -> tuple[int, ...]:
    if isinstance(module, Writer):
        return stop_ids(module.tokenizer, module.roles.policy)
    return (module.tokenizer.eos_token_id,)


def model_checks(module: Algorithm, batch: Batch | PromptBatch) -> Iterator[Check]:
    """What the models make of a handful of rows, by what the algorithm has. Call it without gradients."""
    if isinstance(batch, PromptBatch):
        if isinstance(module, OnPolicy):
            yield from _sampled(module, batch)
        return
    sides = batch.answers()
    if not sides:
        return
    sequences = reduce(Sequences.join, sides)
    for fits, check in OF_ANSWERS:
        if fits(module):
            yield from check(module, batch, sequences)


def _policy_padding(module: Any, batch: Batch, sequences: Sequences) -> Iterator[Check]:
    with _without_dropout(module):
        yield padding(logprobs_of(module.roles), absolute, sequences, _budget(batch), module.roles.policy)


def _scorer_padding(module: Any, batch: Batch, sequences: Sequences) -> Iterator[Check]:
    with _without_dropout(module):
        yield padding(scores_of(module), relative, sequences, _budget(batch), module.scorer)


def _starting_loss(module: Any, batch: Batch, sequences: Sequences) -> Iterator[Check]:
    with _without_dropout(module):
        yield starting_loss(module, batch)


def _held_to_reference(module: Any, batch: Batch, sequences: Sequences) -> Iterator[Check]:
    if module.runs_reference:
        part = sequences.select(cut_by_tokens(sequences.lengths.cpu(), _budget(batch))[0])

        def compare() -> Comparison:
            return compare_with_reference(module.roles, part)

        yield from _reference(module, compare(), compare, part.mask)
    elif module.compares:
        yield same_as_cached(module, batch) if at_start(module) else _too_late("KL = 0", module)
    yield preference_loss(module, batch) if at_start(module) else _too_late("loss at step 0", module)


def _sampler(module: Any, batch: Batch, sequences: Sequences) -> Iterator[Check]:
    with _without_dropout(module):
        yield sampler(module, prompts_of(sequences))


OF_ANSWERS: tuple[tuple[Callable[[Algorithm], bool], Callable[[Any, Batch, Sequences], Iterator[Check]]], ...] = (
    (lambda module: isinstance(module, Writer), _policy_padding),
    (lambda module: isinstance(module, Writer), _sampler),
    (lambda module: hasattr(module, "scores") and hasattr(module, "scorer"), _scorer_padding),
    (lambda module: isinstance(getattr(module, "loss", None), NLLLoss), _starting_loss),
    (lambda module: isinstance(module, OfflineAlgorithm), _held_to_reference),
)
"""Checks that answers of a batch allow, each with what an algorithm must have for it."""


def _budget(batch: Any) -> int:
    """Padded tokens of a pass without gradients."""
    return SCORING_BUDGET * int(batch.micro_batch_tokens)


def _sampled(module: OnPolicy, prompts: PromptBatch) -> Iterator[Check]:
    """The checks that need answers: one is drawn to each prompt, with the noise that evaluations use."""
    samples = module.respond(prompts, at_most=ANSWER_TOKENS)
    yield sampler(module, prompts.prompts)
    texts = module.response_texts(samples)
    sequences, budget = samples.sequences, prompts.micro_batch_tokens
    yield padding(logprobs_of(module.roles), absolute, sequences, SCORING_BUDGET * budget, module.roles.policy)

    def compare() -> Comparison:
        return score_pass(module.roles, sequences, budget, module.sampling.temperature)

    comparison = compare()
    yield from _reference(module, comparison, compare, sequences.mask)
    yield ratio_one(module, sequences, comparison.policy, budget)

    def score(rows: Tensor) -> Tensor:
        there = rows.to(samples.ended.device)
        chosen = Samples(sequences.select(there), samples.sampled_logprobs[there], samples.ended[there])
        return raw_scores(module.reward, prompts.select(rows), chosen, [texts[row] for row in rows.tolist()])

    scores = score(torch.arange(len(prompts)))
    varied = scores_vary(scores)
    yield varied
    if varied.verdict != "failed":
        # Of the whole module, as the reward may stand on the policy's base.
        yield scores_alone(score, scores, tolerance_of(module).reshaped)


def _reference(
    module: OfflineAlgorithm | OnPolicy, comparison: Comparison, compare: Callable[[], Comparison], mask: Tensor
) -> Iterator[Check]:
    if at_start(module):
        yield no_distance(comparison, mask, tolerance_of(module.roles).same)
    else:
        yield _too_late("KL = 0", module)
    yield reference_stays(module.roles, comparison, compare, mask)


def at_start(module: Algorithm) -> bool:
    """Whether the policy is still what it started from: not in a run continued from a checkpoint."""
    return module.global_step == 0


def _too_late(name: str, module: Algorithm) -> Check:
    return Check(name, "skipped", f"holds at step 0 alone; this run goes on from step {module.global_step}")


@contextmanager
def _without_dropout(module: nn.Module) -> Iterator[None]:
    """eval() for the time of the block; every part then back in its own mode."""
    modes = {name: part.training for name, part in module.named_modules()}
    module.eval()
    try:
        yield
    finally:
        for name, part in module.named_modules():
            part.training = modes[name]
