"""Before the first optimizer step: what silently ruins runs, checked on a few real rows, in seconds.

Each check is a function that looks at one thing and returns a :class:`Check`: what it found and, where that is wrong,
what to do. The cheap ones read tokens alone; the others send a handful of rows through the models, under the run's own
precision. Nothing of the run is used up: the training loader, the random state, the modes and the weights are left as
they were found, so a run comes out the same to the bit with and without them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from rlhf_lit.algorithms.base import Algorithm
from rlhf_lit.algorithms.dpo import DPO
from rlhf_lit.algorithms.on_policy import SCORING_BUDGET, OnPolicy
from rlhf_lit.algorithms.reward_model import RewardModel
from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.algorithms.writing import WritingAlgorithm
from rlhf_lit.batches import PreferenceBatch, PromptBatch, Record, Sequences, SupervisedBatch, cut_by_tokens
from rlhf_lit.data.modules import RolloutDataModule
from rlhf_lit.data.text_module import TextDataModule
from rlhf_lit.errors import UserError
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.comparison import Comparison, compare_with_reference
from rlhf_lit.models.loading import context_length, stop_ids, unwrapped
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.roles import Roles
from rlhf_lit.rollout.engine import Samples

TOKEN_ROWS = 64  # rows whose tokens are read
MODEL_ROWS = 4  # rows (or pairs) that go through the models
PROMPTS = 8  # prompts that are answered and scored
ANSWER_TOKENS = 32  # longest answer to one of them
EXTRA_COLUMNS = 8  # padding added to see whether it changes anything

Verdict = Literal["ok", "skipped", "warning", "failed"]
VERDICTS: tuple[Verdict, ...] = ("ok", "skipped", "warning", "failed")  # from best to worst
STYLES = {"ok": "green", "skipped": "dim", "warning": "yellow", "failed": "bold red"}


@dataclass(frozen=True)
class Check:
    """What one check has to say.

    Attributes:
        name: of the check, as it stands in the table.
        verdict: only ``failed`` stops the run.
        found: what was seen, in a few words and numbers.
        advice: what to do about a failure or a warning.
    """

    name: str
    verdict: Verdict
    found: str
    advice: str = ""


def judge(name: str, passed: bool, found: str, advice: str) -> Check:
    """A check that either passed or stops the run."""
    return Check(name, "ok", found) if passed else Check(name, "failed", found, advice)


@dataclass(frozen=True)
class Tolerance:
    """How far two computations of one number may lie apart, in nats per token (of scores: relative to their size).

    Attributes:
        reshaped: the same row in batches of different shapes, where sums are taken in another order.
        same: the same batch through the same arithmetic.
    """

    reshaped: float
    same: float


# Measured as the mean |Δ log-prob| over a row's tokens, the largest over rows, alone against padded in a batch (a
# trained 0.26 M-parameter Llama and random Qwen2s of 8 layers × 1024): at most 1e-6 in float32; 1e-3 with bfloat16
# weights and 6e-3 under bf16 autocast, where single tokens are off by 0.06, which is why the mean over a row is judged
# and not its largest token. Real faults are larger: positions counted from the pads, or pads attended to, move every
# token by tenths of a nat.
FULL_WIDTH = Tolerance(reshaped=1e-4, same=1e-5)
HALF_WIDTH = Tolerance(reshaped=0.05, same=1e-3)


def tolerance_of(model: nn.Module) -> Tolerance:
    """What the dtype allows: of the weights (4-bit ones compute in bfloat16), or of the autocast in force."""
    narrow = any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters())
    device = next((p.device.type for p in model.parameters()), "cpu")
    return HALF_WIDTH if narrow or torch.is_autocast_enabled(device) else FULL_WIDTH


# --- tokens ----------------------------------------------------------------------------------------------------------


def one_bos(sides: Sequence[Sequences], rows: Sequence[int], bos: int | None, stops: tuple[int, ...]) -> Check:
    """At most one BOS: at a row's start, or after an EOS where a template opens each turn with one.

    In most rows a surplus comes from the template or the tokenizer, and stops the run. In a few it comes from their own
    text (an HTML tag that reads like a BOS), and is worth a warning.

    Args:
        sides: sequences, each of the given rows.
        rows: their numbers in the data file.
        bos: id of the tokenizer's BOS, if it has one.
        stops: ids of the tokens that end a turn.
    """
    if bos is None:
        return Check("one BOS", "ok", "the tokenizer has none")
    bad = sorted({row for row, tokens, mask in _rows_of(sides, rows) if _surplus_bos(tokens, mask, bos, stops)})
    if not bad:
        return Check("one BOS", "ok", f"no second one in {_count(len(rows), 'row')}")
    found = f"a second one in {len(bad)} of {_count(len(rows), 'row')}, first in row {bad[0]}"
    if 2 * len(bad) > len(rows):
        return Check("one BOS", "failed", found, "let the chat template or the text write it, not both (data.template)")
    return Check("one BOS", "warning", found, "their text itself holds one")


def _surplus_bos(tokens: list[int], mask: list[bool], bos: int, stops: tuple[int, ...]) -> bool:
    if bos in stops:  # one token for both (GPT-2): only at the start is it certain which of the two it is
        return tokens[:2] == [bos, bos] and not mask[1]
    return any(token == bos and before not in stops for before, token in pairwise(tokens))


def supervised_tokens(sides: Sequence[Sequences], rows: Sequence[int]) -> Check:
    """Something to learn in every row."""
    counts = [(sum(mask), row) for row, _, mask in _rows_of(sides, rows)]
    (fewest, row), (most, _) = min(counts), max(counts)
    total = sum(len(tokens) for _, tokens, _ in _rows_of(sides, rows))
    per_row = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    found = f"{per_row} per row, {sum(count for count, _ in counts)} of {total} tokens"
    return judge(
        "supervised tokens",
        fewest > 0,
        found if fewest else f"none in row {row}",
        "every row needs an answer to learn: look at its fields and at data.template",
    )


def supervised_eos(sides: Sequence[Sequences], rows: Sequence[int], stops: tuple[int, ...]) -> Check:
    """An end among the supervised tokens of every row, or the model never learns to stop."""
    bad = [
        row
        for row, tokens, mask in _rows_of(sides, rows)
        if not any(kept and token in stops for token, kept in zip(tokens, mask, strict=True))
    ]
    return judge(
        "EOS supervised",
        not bad,
        f"none in row {bad[0]}, nor in {len(bad) - 1} more" if bad else "in every row",
        "the model would never learn to stop: its template must close each answer with the tokenizer's EOS",
    )


def _rows_of(sides: Sequence[Sequences], rows: Sequence[int]) -> Iterator[tuple[int, list[int], list[bool]]]:
    """(number, tokens, mask) of each row of each side, without its padding."""
    for side in sides:
        for row, tokens, mask, length in zip(rows, side.tokens, side.mask, side.lengths.tolist(), strict=True):
            yield row, tokens[:length].tolist(), mask[:length].tolist()


# --- parameters ------------------------------------------------------------------------------------------------------


def trainable_parameters(module: Algorithm) -> Check:
    """With LoRA adapters and heads train and nothing else, without it the whole policy; never reference or reward."""
    lora = any(_is_adapter(name) for name, _ in module.named_parameters())
    wrong = [
        f"{name} {'trains' if parameter.requires_grad else 'is frozen'}"
        for name, parameter in module.named_parameters()
        if _should_train(name, lora) not in (None, parameter.requires_grad)
    ]
    number = sum(parameter.numel() for parameter in module.trainable_parameters())
    return judge(
        "trainable parameters",
        number > 0 and not wrong,
        f"{number:,}" + (" in adapters and heads" if lora else "") + (f"; {_and_more(wrong)}" if wrong else ""),
        "something changed requires_grad after the models were built (a callback, peft's set_adapter); leave it to "
        "model.base.lora",
    )


def _is_adapter(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _should_train(name: str, lora: bool) -> bool | None:
    """Whether a parameter is to train; None for a part that a user's own algorithm brought."""
    if name.startswith(("reward.", "roles.models.reference.", "roles.heads.reward")):
        return False
    if name.startswith(("roles.heads.", "roles.models.value.")):
        return True
    if name.startswith(("roles.models.policy.", "scorer.")):
        parts = name.split(".")
        added = _is_adapter(name) or "modules_to_save" in parts
        frozen = any(part.startswith(("reference", "reward")) for part in parts)
        return not lora or (added and not frozen)
    return None


# --- models ----------------------------------------------------------------------------------------------------------

Measure = Callable[[Sequences], list[Tensor]]
"""What a model says of each row: [tokens] log-probs, or [1] score."""


def padding(
    measure: Measure, distance: Callable[[Tensor, Tensor], float], sequences: Sequences, budget: int, model: nn.Module
) -> Check:
    """A row alone = the same row in a batch, padded, with more padding on the right.

    Args:
        measure: what to compare.
        distance: between what two passes say of a row.
        sequences: the rows.
        budget: padded tokens that may go through the device at once.
        model: whose dtype and context set the limits.
    """
    context = context_length(model)
    worst = 0.0
    for rows in cut_by_tokens(sequences.lengths.cpu(), budget):
        part = sequences.select(rows)
        room = EXTRA_COLUMNS if context is None else min(EXTRA_COLUMNS, context - part.tokens.shape[1])
        together = measure(_widened(part, max(0, room)))
        for row, in_batch in zip(rows, together, strict=True):
            (alone,) = measure(sequences.select(row[None]))
            worst = _worse(worst, distance(alone, in_batch))
    limit = tolerance_of(model).reshaped
    return judge(
        "padding",
        worst <= limit,
        f"alone and in a padded batch {worst:.1g} apart, {limit:g} allowed",
        "the model sees the padding or the other rows: try another model.base.attention, or another model",
    )


def _widened(sequences: Sequences, extra: int) -> Sequences:
    """The same rows with more columns, filled with a real token: nothing may ask what stands there."""
    tokens = nn.functional.pad(sequences.tokens, (0, extra), value=int(sequences.tokens[0, 0]))
    return Sequences(tokens, sequences.lengths, nn.functional.pad(sequences.mask, (0, extra)))


def _absolute(a: Tensor, b: Tensor) -> float:
    """Mean |a − b| of log-probs, in nats per token."""
    return float((a - b).abs().mean())


def _relative(a: Tensor, b: Tensor) -> float:
    """Largest |a − b| of scores, relative where |b| is above 1."""
    return _largest((a - b).abs() / b.abs().clamp(min=1))


def _worse(a: float, b: float) -> float:
    """The larger; a number that is none is the worst of all."""
    return math.inf if math.isnan(b) else max(a, b)


def _logprobs(roles: Roles) -> Measure:
    def measure(sequences: Sequences) -> list[Tensor]:
        with roles.acting("policy") as model:
            logprobs = token_logprobs(model, sequences)
        return [row[mask] for row, mask in zip(logprobs, sequences.mask, strict=True)]

    return measure


def _scores(module: RewardModel) -> Measure:
    return lambda sequences: list(module.scores(sequences).split(1))


def starting_loss(module: SFT, batch: SupervisedBatch) -> Check:
    """Finite; far above ln(vocabulary), a uniform guess's, weights and tokenizer hardly belong together."""
    loss = _loss(module, batch)
    uniform = math.log(unwrapped(module.roles.policy).config.get_text_config().vocab_size)
    found = f"{loss:.4g} nats per token, a uniform guess {uniform:.4g}"
    if not math.isfinite(loss):
        return Check("starting loss", "failed", found, "the weights are broken, or too wide for model.base.dtype")
    if loss > uniform + 1:  # random weights lie above it too, by half the variance of their logits
        return Check("starting loss", "warning", found, "do weights and tokenizer belong together?")
    return Check("starting loss", "ok", found)


def preference_loss(module: DPO, batch: PreferenceBatch) -> Check:
    """The loss at the value it is known to have while policy = reference."""
    loss, known = _loss(module, batch), module.loss.value_at_start()
    name = type(module.loss).__name__
    if known is None:
        return Check("loss at step 0", "skipped", f"{loss:.6g}; {name} states no value_at_start")
    limit = tolerance_of(module.roles).same * max(1.0, abs(known))
    return judge(
        "loss at step 0",
        abs(loss - known) <= limit,
        f"{loss:.6g}, {name} starts at {known:.6g}",
        "policy and reference differ, or the loss computes something else; a loss of your own says in value_at_start "
        "where it starts (None: not known)",
    )


def _loss(module: Algorithm, batch: Any) -> float:
    units = module.units(batch)
    return sum(float(share.loss) for part in batch.micro_batches() for share in module.shares(part, units))


def no_distance(comparison: Comparison, mask: Tensor, limit: float) -> Check:
    """KL(π‖π₀) = 0 on real tokens before the first step, exactly and by its estimate."""
    tokens = mask.sum(-1)
    ratio = _largest(row_sums(comparison.logratio.abs(), mask) / tokens)
    exact = _largest(row_sums(comparison.exact_kl, mask).abs() / tokens)
    return judge(
        "KL = 0",
        max(ratio, exact) <= limit,
        f"{exact:.1g} nats per token, log-ratio {ratio:.1g}; {limit:g} allowed",
        "the reference is another model than the policy starts from, or they run in different modes (dropout, dtype)",
    )


def _largest(values: Tensor) -> float:
    value = float(values.max())
    return math.inf if math.isnan(value) else value


def reference_stays(roles: Roles, before: Comparison, compare: Callable[[], Comparison], mask: Tensor) -> Check:
    """Move the policy a little: the reference must not move with it. The policy is put back to the bit.

    Policy = reference at step 0 cannot tell a reference from the policy under another name.

    Args:
        roles: a policy with a reference.
        before: the two on some sequences.
        compare: the same again, when it is called.
        mask: of those sequences.
    """
    if not roles.shared:
        kind = "a frozen copy"
    elif any(".reference." in name for name, _ in roles.policy.named_parameters()):
        kind = "a frozen adapter"
    else:
        kind = "adapters off"
    parameter = _lever(roles)
    if parameter is None:
        return Check("reference", "skipped", f"{kind}; nothing of the policy trains")
    with _moved(parameter):
        after = compare()
    policy, reference = (
        _largest(row_sums((getattr(after, side) - getattr(before, side)).abs(), mask) / mask.sum(-1))
        for side in ("policy", "reference")
    )
    limit = tolerance_of(roles).same
    if policy <= limit:
        return Check("reference", "skipped", f"{kind}; no weight was found that moves the policy")
    return judge(
        "reference",
        reference <= limit,
        f"{kind}; when the policy moves by {policy:.1g} nats per token, it moves by {reference:.1g}",
        "the reference shares weights or an adapter with the policy, so nothing would hold the policy back",
    )


def _lever(roles: Roles) -> nn.Parameter | None:
    """A small trainable weight that every log-prob depends on: the last adapter, or the last norm."""
    found = [
        parameter
        for name, parameter in roles.policy.named_parameters()
        if parameter.requires_grad and (".lora_B.default" in name if roles.shared else parameter.dim() == 1)
    ]
    return found[-1] if found else None


@contextmanager
def _moved(parameter: nn.Parameter) -> Iterator[None]:
    before = parameter.detach().clone()
    parameter.add_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter).to(parameter))
    try:
        yield
    finally:
        parameter.copy_(before)


def ratio_one(module: OnPolicy, sequences: Sequences, old: Tensor, budget: int) -> Check:
    """The forward of an update, gradients on, gives the log-probs that the rollout stored: ρ = 1, nothing clipped.

    Args:
        module: the algorithm.
        sequences: sampled responses.
        old: [rows, time] their log-probs from the score pass.
        budget: padded tokens of a training micro-batch.
    """
    worst = 0.0
    for rows in cut_by_tokens(sequences.lengths.cpu(), budget):
        rows = rows.to(old.device)
        part = sequences.select(rows)
        with torch.enable_grad(), module.roles.acting("policy") as model:
            new = token_logprobs(model, part, module.sampling.temperature).detach()
        logratio = (new - old[rows, : new.shape[1]]).abs()
        worst = _worse(worst, _largest(row_sums(logratio, part.mask) / part.mask.sum(-1)))
    limit = tolerance_of(module.roles.policy).reshaped
    return judge(
        "ratio = 1",
        worst <= limit,
        f"log-ratio {worst:.1g} per token between rollout and update, {limit:g} allowed",
        "rollout and update compute different log-probs: dropout in training mode, or a model that sees its batch",
    )


# --- rewards ---------------------------------------------------------------------------------------------------------


def scores_vary(scores: Tensor) -> Check:
    """Equal scores teach nothing; but a verifiable reward may be 0 on all of a few answers, so the run goes on."""
    low, high = float(scores.min()), float(scores.max())
    found = f"{low:.4g} to {high:.4g} on {_count(len(scores), 'answer')}"
    if not bool(scores.isfinite().all()):
        return Check("reward scores", "failed", found, "the reward model is broken, or too wide for its dtype")
    if low == high and len(scores) > 1:
        found = f"all {len(scores)} are {low:.4g}"
        return Check("reward scores", "warning", found, "a reward that never varies teaches nothing")
    return Check("reward scores", "ok", found)


def scores_alone(score: Callable[[Tensor], Tensor], scores: Tensor, limit: float) -> Check:
    """A response's score is its own: alone or among others, the same.

    Args:
        score: [n] numbers of responses → [n] their scores, as a batch.
        scores: [rows] of all of them together.
        limit: how far apart they may lie, relative to the larger of 1 and the scores.
    """
    name, advice = "reward alone", "a score must not depend on the other responses or on padding: score each by itself"
    try:
        alone = torch.cat([score(row[None]) for row in torch.arange(len(scores))])
    except Exception as error:  # the reward is anybody's code, and it did score them together
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Check(name, "failed", f"a response alone cannot be scored: {reason}", advice)
    apart = _relative(alone, scores)
    if apart > limit and (again := _relative(score(torch.arange(len(scores))), scores)) > limit:
        found = f"the same responses scored twice lie {again:.1g} apart"
        return Check(name, "warning", found, "a noisy reward: whether it depends on the batch cannot be told")
    return judge(name, apart <= limit, f"alone and in a batch {apart:.1g} apart, {limit:g} allowed", advice)


# --- which checks a run gets -----------------------------------------------------------------------------------------


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
    places = _places(len(data.examples["train"]), TOKEN_ROWS, rank, world)
    rows = [data.examples["train"][place] for place in places]
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
    yield from model_checks(module, batch.select(torch.arange(count)).to(module.device))


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
        yield one_bos(sides, rows, tokenizer.bos_token_id, stops)
        supervised = supervised_tokens(sides, rows)
        yield supervised
        if supervised.verdict == "ok":
            yield supervised_eos(sides, rows, stops)


def _stops(module: Algorithm) -> tuple[int, ...]:
    if isinstance(module, WritingAlgorithm):
        return stop_ids(module.tokenizer, module.roles.policy)
    return (module.tokenizer.eos_token_id,)


def _sides(batch: Record) -> list[Sequences]:
    """The answers of a batch that holds any."""
    if isinstance(batch, SupervisedBatch):
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
        if isinstance(module, WritingAlgorithm):
            yield padding(_logprobs(module.roles), _absolute, sequences, budget, module.roles.policy)
        elif isinstance(module, RewardModel):
            yield padding(_scores(module), _relative, sequences, budget, module.scorer)
        if isinstance(module, SFT):
            yield starting_loss(module, batch)
    if isinstance(module, DPO):
        part = sequences.select(cut_by_tokens(sequences.lengths.cpu(), budget)[0])

        def compare() -> Comparison:
            return compare_with_reference(module.roles, part)

        yield from _reference(module, compare(), compare, part.mask)
        yield preference_loss(module, batch) if at_start(module) else _too_late("loss at step 0", module)


def _sampled(module: OnPolicy, prompts: PromptBatch) -> Iterator[Check]:
    """The checks that need answers: one is drawn to each prompt, with the noise that evaluations use."""
    with _short_answers(module):
        samples = module.respond(prompts)
    texts = module.response_texts(samples)
    sequences, budget = samples.sequences, prompts.micro_batch_tokens
    yield padding(_logprobs(module.roles), _absolute, sequences, SCORING_BUDGET * budget, module.roles.policy)

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
    module: DPO | OnPolicy, comparison: Comparison, compare: Callable[[], Comparison], mask: Tensor
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


# --- the callback ----------------------------------------------------------------------------------------------------


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
        with isolate_rng(), trainer.precision_plugin.forward_context(), torch.no_grad():
            try:
                found.extend(checks(pl_module, data, trainer.global_rank, trainer.world_size))
            except UserError as problem:  # on this rank; the others wait for its findings
                error = str(problem)
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


def show(found: Sequence[Check], seconds: float) -> None:
    """The table, a line for each check, and how many passed in what time."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)  # colours on a terminal alone
    widths = [
        max(len(str(cell)) for cell in column) for column in zip(*((c.verdict, c.name) for c in found), strict=True)
    ]
    for check in found:
        said = f"{check.found}; {check.advice}" if check.verdict == "warning" else check.found
        verdict = (f"{check.verdict:<{widths[0]}}  ", STYLES[check.verdict])
        console.print(Text.assemble(verdict, f"{check.name:<{widths[1]}}  {said}"))
    counts = {verdict: sum(check.verdict == verdict for check in found) for verdict in VERDICTS}
    others = [f"{counts[verdict]} {verdict}" for verdict in VERDICTS[1:] if counts[verdict]]
    console.print(f"preflight: {', '.join([_count(counts['ok'], 'check') + ' passed', *others])} in {seconds:.1f} s")


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"


def _and_more(items: Sequence[str]) -> str:
    return items[0] + (f" and {len(items) - 1} more" if len(items) > 1 else "")
