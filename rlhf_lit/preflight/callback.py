"""Which checks a run gets, and when."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.algorithms.offline import OfflineAlgorithm
from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.algorithms.policy import SCORING_BUDGET, Writer
from rlhf_lit.algorithms.reward_model import RewardModel
from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.batches import (
    PreferenceBatch,
    PromptBatch,
    RankedBatch,
    Record,
    Sequences,
    SupervisedBatch,
    UnpairedBatch,
)
from rlhf_lit.batches.micro_batches import cut_by_tokens
from rlhf_lit.data.modules import RolloutDataModule
from rlhf_lit.data.text_module import TextDataModule
from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import stop_ids
from rlhf_lit.models.score_pass import Comparison, compare_with_reference
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.preflight.check import VERDICTS, Check, show, tolerance_of
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
from rlhf_lit.preflight.tokens import one_bos, supervised_eos, supervised_tokens
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
    prompting = isinstance(data, RolloutDataModule)
    batch: Any = (
        data.prompt_batch([(row, place, 0) for row, place in zip(rows, places, strict=True)])
        if prompting
        else data.collate(rows)
    )
    failed = False
    for check in token_checks(module, batch, [row["row"] for row in rows]):
        failed |= check.verdict == "failed"
        yield check
    if failed:
        return
    count = min(len(rows), PROMPTS if prompting else MODEL_ROWS)
    some = module.on_before_batch_transfer(batch.select(torch.arange(count)), 0)
    yield from model_checks(module, some.to(module.device))


def _places(size: int, count: int, rank: int, world: int) -> list[int]:
    """Which rows a rank looks at: different ones on each, as far as they reach, and one at least."""
    return list(range(rank, size, world))[:count] or [rank % size]


def token_checks(module: Algorithm, batch: Record, rows: Sequence[int]) -> Iterator[Check]:
    """What the tokens of a batch tell; nothing of a record that a user's own algorithm brought.

    Args:
        module: whose tokenizer made them.
        batch: as the data module collates it.
        rows: numbers of its rows in the data file.
    """
    tokenizer, stops = module.tokenizer, _stops(module)
    if isinstance(batch, PromptBatch):
        yield one_bos([batch.prompts], rows, tokenizer.bos_token_id, stops)
    elif sides := _sides(batch):
        if isinstance(batch, RankedBatch):
            rows = [rows[prompt] for prompt in batch.prompt_of_answer().tolist()]
        yield one_bos(sides, rows, tokenizer.bos_token_id, stops)
        supervised = supervised_tokens(sides, rows)
        yield supervised
        if supervised.verdict == "ok":
            yield supervised_eos(sides, rows, stops)


def _stops(module: Algorithm) -> tuple[int, ...]:
    if isinstance(module, Writer):
        return stop_ids(module.tokenizer, module.roles.policy)
    return (module.tokenizer.eos_token_id,)


def _sides(batch: Record) -> list[Sequences]:
    """The answers of a batch that holds any."""
    if isinstance(batch, SupervisedBatch | UnpairedBatch):
        return [batch.sequences]
    if isinstance(batch, RankedBatch):
        return [batch.sequences]
    return [batch.chosen, batch.rejected] if isinstance(batch, PreferenceBatch) else []


def model_checks(module: Algorithm, batch: Any) -> Iterator[Check]:
    """What the models make of a handful of rows, by the kind of algorithm. Call it without gradients."""
    if isinstance(module, OnPolicy):
        yield from _sampled(module, batch)
        return
    sides = _sides(batch)
    if not sides:
        return
    sequences = sides[0] if len(sides) == 1 else sides[0].join(sides[1])
    budget = SCORING_BUDGET * batch.micro_batch_tokens
    with _without_dropout(module):
        if isinstance(module, Writer):
            yield padding(logprobs_of(module.roles), absolute, sequences, budget, module.roles.policy)
        elif isinstance(module, RewardModel):
            yield padding(scores_of(module), relative, sequences, budget, module.scorer)
        if isinstance(module, SFT):
            yield starting_loss(module, batch)
    if isinstance(module, OfflineAlgorithm):
        if module.runs_reference:
            part = sequences.select(cut_by_tokens(sequences.lengths.cpu(), budget)[0])

            def compare() -> Comparison:
                return compare_with_reference(module.roles, part)

            yield from _reference(module, compare(), compare, part.mask)
        elif module.compares:
            yield same_as_cached(module, batch) if at_start(module) else _too_late("KL = 0", module)
        yield preference_loss(module, batch) if at_start(module) else _too_late("loss at step 0", module)


def _sampled(module: OnPolicy, prompts: PromptBatch) -> Iterator[Check]:
    """The checks that need answers: one is drawn to each prompt, with the noise that evaluations use."""
    with _short_answers(module):
        samples = module.respond(prompts)
    texts = module.response_texts(samples)
    sequences, budget = samples.sequences, prompts.micro_batch_tokens
    yield padding(logprobs_of(module.roles), absolute, sequences, SCORING_BUDGET * budget, module.roles.policy)

    def compare() -> Comparison:
        return module._score_pass(sequences, budget)

    comparison = compare()
    yield from _reference(module, comparison, compare, sequences.mask)
    yield ratio_one(module, sequences, comparison.policy, budget)

    def score(rows: Tensor) -> Tensor:
        there = rows.to(samples.ended.device)
        chosen = Samples(sequences.select(there), samples.sampled_logprobs[there], samples.ended[there])
        return module.raw_scores(prompts.select(rows), chosen, [texts[row] for row in rows.tolist()])

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


@contextmanager
def _short_answers(module: OnPolicy) -> Iterator[None]:
    """No answer longer than ``ANSWER_TOKENS`` for the time of the block."""
    own = module.sampling
    module.sampling = replace(own, max_new_tokens=min(own.max_new_tokens, ANSWER_TOKENS))
    try:
        yield
    finally:
        module.sampling = own


class Preflight(Callback):
    """Runs the checks when models and data are ready and nothing was trained yet, and prints them in a table.

    Every rank looks at rows of its own; the worst verdict counts, on all of them.

    Raises:
        UserError: a check failed; in one line which, what was found, and what to do.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once per ``fit``, after a checkpoint was restored."""
        assert isinstance(pl_module, Algorithm)
        started = time.perf_counter()
        own: Any = getattr(trainer, "datamodule", None)
        data = own if isinstance(own, TextDataModule) else None
        found: list[Check] = []
        error = None
        sharding = sharding_of(pl_module)
        with isolate_rng(), trainer.precision_plugin.forward_context(), torch.no_grad():
            try:
                # All ranks must run the same passes where models are sharded: there they look at the same rows.
                place = (0, 1) if sharding.is_sharded else (trainer.global_rank, trainer.world_size)
                found.extend(checks(pl_module, data, *place))
            except UserError as problem:  # on this rank; the others wait for its findings
                error = str(problem)
        sharding.reshard()
        reports = _gathered((found, error), trainer.world_size)
        for _, line in reports:
            if line is not None:
                raise UserError(line)
        verdict = merged([rank for rank, _ in reports])
        if trainer.is_global_zero:
            show(verdict, time.perf_counter() - started)
        for check in verdict:
            if check.verdict == "failed":
                advice = f"{check.advice}; or preflight: false to go on without"
                raise UserError(f"preflight: {check.name}: {check.found}; {advice}")


def _gathered(own: Any, world: int) -> list[Any]:
    """Each rank's, on all ranks."""
    if world == 1:
        return [own]
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, own)
    return parts


def merged(ranks: Sequence[Sequence[Check]]) -> list[Check]:
    """The worst of the ranks' verdicts on each check, in the order of the checks."""
    worst: dict[str, Check] = {}
    for check in (check for rank in ranks for check in rank):
        known = worst.get(check.name)
        if known is None or VERDICTS.index(check.verdict) > VERDICTS.index(known.verdict):
            worst[check.name] = check
    return list(worst.values())
