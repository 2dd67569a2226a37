"""Which checks a run gets, and on which rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.algorithms.offline import OfflineAlgorithm
from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.algorithms.policy import Writer
from rlhf_lit.algorithms.reward_model import RewardModel
from rlhf_lit.batches import Batch, PromptBatch, Sequences
from rlhf_lit.batches.micro_batches import SCORING_BUDGET, cut_by_tokens
from rlhf_lit.data.modules import RolloutDataModule
from rlhf_lit.data.text_module import TextDataModule
from rlhf_lit.errors import UserError
from rlhf_lit.losses.supervised import NLLLoss
from rlhf_lit.models.anatomy import stop_ids
from rlhf_lit.models.score_pass import compare_with_reference
from rlhf_lit.preflight.check import Check, LeftOut, tolerance_of
from rlhf_lit.preflight.models import (
    absolute,
    at_start,
    logprobs_of,
    no_distance,
    padding,
    preference_loss,
    reference_stays,
    relative,
    same_as_cached,
    scores_of,
    starting_loss,
    starting_scores,
    too_late,
    trainable_parameters,
)
from rlhf_lit.preflight.rows import (
    MOVED_ROWS,
    PASS_TOKENS,
    SHORT_ANSWER_TOKENS,
    TOKEN_ROWS,
    Looked,
    ModelRows,
    budget_of,
    lengths_of,
    model_rows,
)
from rlhf_lit.preflight.sampler import prompts_of, sampler
from rlhf_lit.preflight.samples import OF_SAMPLES, Rollout
from rlhf_lit.preflight.text import text_kept
from rlhf_lit.preflight.tokens import Marks, one_bos, supervised_eos, supervised_tokens


def checks(
    module: Algorithm,
    data: TextDataModule | None,
    rank: int = 0,
    world: int = 1,
    left_out: LeftOut = LeftOut(),
    looked: Looked | None = None,
) -> Iterator[Check]:
    """The checks of a run, one after the other, on rows of the data module or as far as can be told without them.

    Token faults end the list: a model has nothing to say about rows without supervised tokens.

    Args:
        module: with its models built, in the modes it trains in.
        data: after ``setup``; None where the run has loaders of its own.
        rank, world: which rows this process looks at.
        left_out: checks that are not made.
        looked: told what was looked at.
    """
    looked = looked or Looked()
    yield left_out.unless("trainable parameters", lambda: trainable_parameters(module))
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
    looked.read = len(rows)
    yield left_out.unless(
        "text kept", lambda: text_kept(module.tokenizer, [(row["row"], row["source"]) for row in rows])
    )
    failed = False
    for check in token_checks(module, batch, [row["row"] for row in rows], left_out):
        failed |= check.verdict == "failed"
        yield check
    if not failed:
        yield from model_checks(module, batch, budget_of(_step_tokens(module, data, batch, world)), left_out, looked)


def _places(size: int, count: int, rank: int, world: int) -> list[int]:
    """Which rows a rank looks at: different ones on each, as far as they reach, and one at least."""
    return list(range(rank, size, world))[:count] or [rank % size]


def _step_tokens(module: Any, data: TextDataModule, batch: Batch | PromptBatch, world: int) -> float:
    """About how many tokens an optimizer step sees on a rank: of a rollout, all of it."""
    if isinstance(batch, PromptBatch):
        size = data.rollout_size if isinstance(data, RolloutDataModule) else data.batch_size
        tokens = float(batch.prompts.lengths.float().mean()) + module.sampling.limit
    else:
        size, tokens = data.batch_size, sum(lengths_of(batch)) / len(batch)
    return size * tokens / world


def token_checks(
    module: Algorithm, batch: Batch | PromptBatch, rows: Sequence[int], left_out: LeftOut = LeftOut()
) -> Iterator[Check]:
    """What the tokens of a batch tell.

    Args:
        module: whose tokenizer made them.
        batch: as the data module makes it.
        rows: numbers of its rows in the data file.
        left_out: checks that are not made.

    Raises:
        UserError: a kind of batch of the user's own, whose answers cannot be told apart by row.
    """
    stops = _stops(module)
    marks = Marks.of(module.tokenizer, stops)
    if isinstance(batch, PromptBatch):
        yield left_out.unless("one BOS", lambda: one_bos([batch.prompts], rows, marks))
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
    yield left_out.unless("one BOS", lambda: one_bos(sides, rows, marks))
    supervised = left_out.unless("supervised tokens", lambda: supervised_tokens(sides, rows))
    yield supervised
    if supervised.verdict != "failed":
        yield left_out.unless("EOS supervised", lambda: supervised_eos(sides, rows, stops))


def _stops(module: Algorithm) -> tuple[int, ...]:
    if isinstance(module, Writer):
        return stop_ids(module.tokenizer, module.roles.policy)
    return (module.tokenizer.eos_token_id,)


def model_checks(
    module: Algorithm,
    batch: Batch | PromptBatch,
    budget: int = PASS_TOKENS,
    left_out: LeftOut = LeftOut(),
    looked: Looked | None = None,
) -> Iterator[Check]:
    """What the models make of a handful of rows, by what the algorithm has. Call it without gradients.

    Args:
        module: the algorithm.
        batch: rows to choose from, on the CPU.
        budget: tokens of a pass.
        left_out: checks that are not made.
        looked: told what was looked at.
    """
    looked = looked or Looked()
    if isinstance(batch, PromptBatch):
        if isinstance(module, OnPolicy):
            rollout = Rollout(module, batch, budget, looked)
            for name, on_samples in OF_SAMPLES:
                yield left_out.unless(name, partial(on_samples, rollout))
        return
    if not batch.answers() or (chosen := model_rows(batch, budget)) is None:
        return
    looked.rows, looked.tokens = chosen.rows, int(chosen.sequences.lengths.sum())
    whole = module.on_before_batch_transfer(chosen.whole, 0).to(module.device)
    sequences, first = chosen.sequences.to(module.device), chosen.first.to(module.device)
    rows = replace(chosen, whole=whole, sequences=sequences, first=first)
    for name, fits, on_answers in OF_ANSWERS:
        if fits(module):
            yield left_out.unless(name, partial(on_answers, module, rows))


def _policy_padding(module: Any, rows: ModelRows) -> Check:
    with _without_dropout(module):
        return padding(logprobs_of(module.roles), absolute, rows.sequences, _budget(rows.whole), module.roles.policy)


def _scorer_padding(module: Any, rows: ModelRows) -> Check:
    with _without_dropout(module):
        return padding(scores_of(module), relative, rows.sequences, _budget(rows.whole), module.scorer)


def _sampler(module: Any, rows: ModelRows) -> Check:
    with _without_dropout(module):
        return sampler(module, prompts_of(rows.first), SHORT_ANSWER_TOKENS)


def _starting_loss(module: Any, rows: ModelRows) -> Check:
    with _without_dropout(module):
        return starting_loss(module, rows.whole)


def _starting_scores(module: Any, rows: ModelRows) -> Check:
    with _without_dropout(module):
        return starting_scores(module, rows.whole)


def _no_distance(module: Any, rows: ModelRows) -> Check:
    if not at_start(module):
        return too_late("KL = 0", module)
    if not module.runs_reference:
        return same_as_cached(module, rows.whole)
    part = _one_pass(rows)
    return no_distance(compare_with_reference(module.roles, part), part.mask, tolerance_of(module.roles).same)


def _reference_stays(module: Any, rows: ModelRows) -> Check:
    part = _one_pass(rows)
    part = part.select(torch.arange(min(MOVED_ROWS, len(part))))
    return reference_stays(module.roles, lambda: compare_with_reference(module.roles, part), part.mask)


def _loss_at_start(module: Any, rows: ModelRows) -> Check:
    return preference_loss(module, rows.whole) if at_start(module) else too_late("loss at step 0", module)


def _one_pass(rows: ModelRows) -> Sequences:
    """Of the sequences as many as may go through the device at once."""
    return rows.sequences.select(cut_by_tokens(rows.sequences.lengths.cpu(), _budget(rows.whole))[0])


OF_ANSWERS: tuple[tuple[str, Callable[[Any], bool], Callable[[Any, ModelRows], Check]], ...] = (
    ("padding", lambda module: isinstance(module, Writer), _policy_padding),
    ("sampler", lambda module: isinstance(module, Writer), _sampler),
    ("padding", lambda module: hasattr(module, "scores") and hasattr(module, "scorer"), _scorer_padding),
    ("starting loss", lambda module: isinstance(getattr(module, "loss", None), NLLLoss), _starting_loss),
    ("starting loss", lambda module: isinstance(module, RewardModel), _starting_scores),
    ("KL = 0", lambda module: isinstance(module, OfflineAlgorithm) and module.compares, _no_distance),
    ("reference", lambda module: isinstance(module, OfflineAlgorithm) and module.runs_reference, _reference_stays),
    ("loss at step 0", lambda module: isinstance(module, OfflineAlgorithm), _loss_at_start),
)
"""Checks that answers of a batch allow: the name, what an algorithm must have for it, the check."""


def _budget(batch: Any) -> int:
    """Padded tokens of a pass without gradients."""
    return SCORING_BUDGET * int(batch.micro_batch_tokens)


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
