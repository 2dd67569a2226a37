"""What the models make of a handful of rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.algorithms.offline import OfflineAlgorithm
from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.algorithms.reward_model import RewardModel
from rlhf_lit.batches import Batch, Sequences
from rlhf_lit.batches.micro_batches import cut_by_tokens
from rlhf_lit.errors import and_more
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.anatomy import context_length, unwrapped
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.packing import layout_of
from rlhf_lit.models.roles import Roles
from rlhf_lit.models.score_pass import Comparison
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.preflight.check import Check, judge, tolerance_of

EXTRA_COLUMNS = 8  # padding added to see whether it changes anything


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
        f"{number:,}" + (" in adapters and heads" if lora else "") + (f"; {and_more(wrong)}" if wrong else ""),
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


def at_start(module: Algorithm) -> bool:
    """Whether the policy is still what it started from: not in a run continued from a checkpoint."""
    return module.global_step == 0


def too_late(name: str, module: Algorithm) -> Check:
    return Check(name, "skipped", f"holds at step 0 alone; this run goes on from step {module.global_step}")


Measure = Callable[[Sequences], list[Tensor]]
"""What a model says of each row: [tokens] log-probs, or [1] score."""


def padding(
    measure: Measure, distance: Callable[[Tensor, Tensor], float], sequences: Sequences, budget: int, model: nn.Module
) -> Check:
    """A row alone = the same row among others, behind one another or padded, with more padding on the right.

    Alone goes the first and the last row of each group: the longest and the shortest, which has the most padding, or
    stands behind all others.

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
        for place in {0, len(rows) - 1}:
            (alone,) = measure(sequences.select(rows[place : place + 1]))
            worst = worse(worst, distance(alone, together[place]))
    limit = tolerance_of(model).reshaped
    return judge(
        "padding",
        worst <= limit,
        f"alone and among others {worst:.1g} apart, {limit:g} allowed",
        "the model sees the padding or the other rows: try another model.base.attention, or another model",
    )


def _widened(sequences: Sequences, extra: int) -> Sequences:
    """The same rows with more columns, filled with a real token: nothing may ask what stands there."""
    tokens = nn.functional.pad(sequences.tokens, (0, extra), value=int(sequences.tokens[0, 0]))
    return Sequences(tokens, sequences.lengths, nn.functional.pad(sequences.mask, (0, extra)))


def absolute(a: Tensor, b: Tensor) -> float:
    """Mean |a − b| of log-probs, in nats per token."""
    return float((a - b).abs().mean())


def relative(a: Tensor, b: Tensor) -> float:
    """Largest |a − b| of scores, relative where |b| is above 1."""
    return largest((a - b).abs() / b.abs().clamp(min=1))


def worse(a: float, b: float) -> float:
    """The larger; a number that is none is the worst of all."""
    return math.inf if math.isnan(b) else max(a, b)


def logprobs_of(roles: Roles) -> Measure:
    def measure(sequences: Sequences) -> list[Tensor]:
        with roles.acting("policy") as model:
            logprobs = token_logprobs(model, sequences)
        return [row[mask] for row, mask in zip(logprobs, sequences.mask, strict=True)]

    return measure


def scores_of(module: RewardModel) -> Measure:
    return lambda sequences: list(module.scores(sequences).split(1))


def starting_loss(module: Algorithm, batch: Batch) -> Check:
    """Finite; far above ln(vocabulary), a uniform guess's, weights and tokenizer hardly belong together."""
    loss = _loss(module, batch)
    policy: nn.Module = module.roles.policy  # type: ignore[union-attr, assignment]
    uniform = math.log(unwrapped(policy).config.get_text_config().vocab_size)
    found = f"{loss:.4g} nats per token, a uniform guess {uniform:.4g}"
    if not math.isfinite(loss):
        return Check("starting loss", "failed", found, "the weights are broken, or too wide for model.base.dtype")
    if loss > uniform + 1:  # random weights lie above it too, by half the variance of their logits
        return Check("starting loss", "warning", found, "do weights and tokenizer belong together?")
    return Check("starting loss", "ok", found)


def starting_scores(module: RewardModel, batch: Any) -> Check:
    """A new head knows no better from worse: the loss starts near that of equal scores, ln 2 for each pair without a
    margin. Scores far apart come from a head that is too large for its hidden states."""
    loss = _loss(module, batch)
    if not math.isfinite(loss):
        return Check("starting loss", "failed", f"{loss}", "the weights are broken, or too wide for model.base.dtype")
    compared = batch.comparisons()
    equal = torch.zeros(len(compared.better), device=compared.margin.device)
    known = float((module.loss(equal, equal, compared.margin) / compared.siblings).sum() / len(batch))
    found = f"{loss:.4g} nats per prompt, of equal scores {known:.4g}"
    if not unwrapped(module.scorer).new_head or not at_start(module):
        return Check("starting loss", "ok", f"{found}; the head was trained before")
    if loss > known + 1:
        return Check("starting loss", "warning", found, "the new head's scores lie far apart: set model.head to scaled")
    return Check("starting loss", "ok", found)


def preference_loss(module: OfflineAlgorithm, batch: Batch) -> Check:
    """The loss at the value it is known to have while policy = reference."""
    loss, known = _loss(module, batch), module.value_at_start(batch)
    name = type(module.loss).__name__
    if not math.isfinite(loss):
        return Check("loss at step 0", "failed", f"{loss}", "the weights are broken, or too wide for model.base.dtype")
    if known is None:
        return Check("loss at step 0", "skipped", f"{loss:.6g}; {name} states no value_at_start")
    tolerance = tolerance_of(module.roles)
    # A cached reference was computed in batches of other shapes.
    limit = (tolerance.same if module.runs_reference else tolerance.reshaped) * max(1.0, abs(known))
    return judge(
        "loss at step 0",
        abs(loss - known) <= limit,
        f"{loss:.6g}, {name} starts at {known:.6g}",
        "policy and reference differ, or the loss computes something else; a loss of your own says in value_at_start "
        "where it starts (None: not known)",
    )


def _loss(module: Algorithm, batch: Any) -> float:
    denominators = module.denominators(batch)
    module.prepare(batch)
    return sum(float(term.loss) for term in module.step_losses(batch, denominators))


def no_distance(comparison: Comparison, mask: Tensor, limit: float) -> Check:
    """KL(π‖π₀) = 0 on real tokens before the first step, exactly and by its estimate."""
    tokens = mask.sum(-1)
    ratio = largest(row_sums(comparison.logratio.abs(), mask) / tokens)
    exact = largest(row_sums(comparison.exact_kl, mask).abs() / tokens)
    return judge(
        "KL = 0",
        max(ratio, exact) <= limit,
        f"{exact:.1g} nats per token, log-ratio {ratio:.1g}; {limit:g} allowed",
        "the reference is another model than the policy starts from, or they run in different modes (dropout, dtype)",
    )


def same_as_cached(module: OfflineAlgorithm, batch: Batch) -> Check:
    """The policy is, before the first step, the reference whose log-probs were computed beforehand."""
    worst, limit = 0.0, tolerance_of(module.roles).reshaped

    def compare(sequences: Sequences) -> Tensor:
        nonlocal worst
        with module.roles.acting("policy") as model:
            logprobs = token_logprobs(model, sequences)
        known = module.known_logprobs(sequences)
        distance = row_sums((logprobs - known).abs(), sequences.mask) / sequences.mask.sum(-1)
        worst = worse(worst, largest(distance))
        return logprobs

    for part in batch.micro_batches(layout_of(module)):
        module.with_reference(part, compare)
    return judge(
        "KL = 0",
        worst <= limit,
        f"log-ratio to the cached reference {worst:.1g} nats per token; {limit:g} allowed",
        "the cache holds another model's log-probs: `python -m rlhf_lit cache clear`",
    )


def largest(values: Tensor) -> float:
    value = float(values.max())
    return math.inf if math.isnan(value) else value


def reference_stays(roles: Roles, compare: Callable[[], Comparison], mask: Tensor) -> Check:
    """Move the policy a little: the reference must not move with it. The policy is put back to the bit.

    Policy = reference at step 0 cannot tell a reference from the policy under another name.

    Args:
        roles: a policy with a reference.
        compare: the two on some sequences, whenever it is called.
        mask: of those sequences.
    """
    if not roles.shared:
        kind = "a frozen copy"
    elif any(".reference." in name for name, _ in roles.policy.named_parameters()):
        kind = "a frozen adapter"
    else:
        kind = "adapters off"
    before = compare()
    sharding_of(roles).reshard()  # before the weight is looked up: a gathered one would be moved in vain, or be freed
    parameter = _lever(roles)
    if parameter is None:
        return Check("reference", "skipped", f"{kind}; nothing of the policy trains")
    with _moved(roles, parameter):
        after = compare()
    policy, reference = (
        largest(row_sums((getattr(after, side) - getattr(before, side)).abs(), mask) / mask.sum(-1))
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
def _moved(roles: Roles, parameter: nn.Parameter) -> Iterator[None]:
    sharding = sharding_of(roles)
    before = sharding.gathered(parameter).clone()
    sharding.assign(parameter, before + torch.linspace(-1, 1, before.numel()).view_as(before).to(before))
    try:
        yield
    finally:
        sharding.assign(parameter, before)


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
        worst = worse(worst, largest(row_sums(logratio, part.mask) / part.mask.sum(-1)))
    limit = tolerance_of(module.roles.policy).reshaped
    return judge(
        "ratio = 1",
        worst <= limit,
        f"log-ratio {worst:.1g} per token between rollout and update, {limit:g} allowed",
        "rollout and update compute different log-probs: dropout in training mode, or a model that sees its batch",
    )
