"""Sequences → hidden states, without padding and with common prompts computed once.

The sequences of a micro-batch are packed into one row. Each has positions that begin at 0 and attends to itself alone,
so every state is the one that a row of its own would have, up to rounding; what is saved is the work on padding, and
small matrix products. (Packing without cross-contamination: Krell et al. 2021, arXiv 2107.02027.)

A prompt that several sequences begin with is computed once for all of them: ``[prompt | rest of the first | rest of the
second | …]``, where no answer sees another. That holds for both sides of a pair, for ranked answers, and for several
responses to one prompt alike; it is found from the tokens, and no caller says so. (Wang and Hegde 2024, "Accelerating
Direct Preference Optimization with Prefix Sharing", arXiv 2410.20305.) It is not done while any dropout is active,
which would give the sequences the same noise on their prompt.

Models whose attention cannot be told of segments, which is tried out when they are loaded, are given rows padded on the
right, and no attention mask: causal order already hides the pads.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.batches import Layout, Sequences, same_prompts
from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import (
    attends_to_everything,
    body_of,
    decoder_layers,
    drops_out,
    drops_out_attention,
    unwrapped,
)
from rlhf_lit.models.flops import count_body
from rlhf_lit.models.rope import first_context, frequencies_by_sequence
from rlhf_lit.models.routing import collect, recorded_routers
from rlhf_lit.models.segments import Segments, recorded_calls, register

_SHARING: ContextVar[bool] = ContextVar("sharing", default=True)


def hidden_states(
    model: nn.Module,
    tokens: Tensor,
    positions: Tensor | None = None,
    segments: Segments | None = None,
    longest: int | None = None,
    long: Tensor | None = None,
) -> Tensor:
    """[rows, time] tokens → [rows, time, width] last hidden states, from the body without its head.

    Args:
        model: a causal language model, or one with a scalar head.
        tokens: right-padded.
        positions: [rows, time] of each token, where they are not 0, 1, 2, …
        segments: the sequences of one row, where it holds several.
        longest: tokens of the longest of them.
        long: see ``rope.frequencies_by_sequence``.

    Raises:
        UserError: more tokens than the model has positions for.
    """
    inner = unwrapped(model)
    limit = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    length = tokens.shape[1] if longest is None else longest
    if limit is not None and length > limit:
        raise UserError(f"data.max_length: a sequence of {length} tokens does not fit the model's context of {limit}")
    body = body_of(inner)
    options: dict[str, Any] = {}
    if segments is not None:
        register()
        # A mask of four dimensions is handed on as it is; without one, transformers would make one of time × time.
        unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
        options = {"position_ids": positions, "attention_mask": unread, "segments": segments}
    with frequencies_by_sequence(inner, long):
        return body(input_ids=tokens, use_cache=False, **options).last_hidden_state


def packs(model: nn.Module) -> bool:
    """Whether several sequences can be packed into one row: the model was seen to tell them apart (``prove_packing``),
    and drops no attention."""
    inner: Any = unwrapped(model)
    if not hasattr(inner, "tells_segments_apart"):
        prove_packing(inner)
    return inner.tells_segments_apart and not drops_out_attention(inner)


def shares(model: nn.Module) -> bool:
    """Whether a prompt may be computed once for several sequences: the model packs, and no dropout is active."""
    return _SHARING.get() and packs(model) and not drops_out(unwrapped(model))


@torch.no_grad()
def prove_packing(model: nn.Module) -> None:
    """Find out whether a model tells the sequences of a row apart, and remember it on the model.

    What a config says of it is not believed: some layers drop what they are told (Nemotron's), and attention then runs
    over the whole row. Three short sequences, two of them with one prompt, are computed in rows of their own, in one
    row, and in one row whose attention runs over all of it. The second must agree with the first, as well as the width
    of the numbers allows and far better than the third does. That is blind where attention adds nothing yet (weights
    that begin at 0), so the calls of attention are looked at too: each decoder layer must make one, with the segments
    and without a mask of its own.

    No random numbers are drawn, and all ranks find the same. Call it in eval mode, with whole weights.
    """
    inner: Any = unwrapped(model)
    inner.tells_segments_apart = False
    config = inner.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) and not getattr(config, "alibi", False)
    takes = inner._supports_attention_backend and config._attn_implementation == "sdpa"
    if not (rotary and takes and attends_to_everything(inner)):
        return
    body = body_of(inner)
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in signature(body.forward).parameters.values()):
        return
    embeddings = inner.get_input_embeddings().weight
    rows = [[3, 5, 7, 4, 6], [8, 9, 4, 7, 3, 6, 5, 3], [8, 9, 4, 5, 6, 3, 9]]
    rows = [[token % len(embeddings) for token in row] for row in rows]
    sequences = Sequences.pad(rows, [[False] * len(row) for row in rows]).to(embeddings.device)
    row = _in_one_row(sequences, sequences.lengths.cpu(), torch.tensor([0, 1, 1]), torch.tensor([0, 0, 3]), None)
    with recorded_calls() as calls:
        packed = row.states_of(inner)
    called = {id(call.layer) for call in calls if call.segmented and not call.masked}
    heard = all(any(id(part) in called for part in layer.modules()) for layer in decoder_layers(inner))
    if not called or not heard or len(called) < len({id(call.layer) for call in calls}):
        return
    over_all = Segments.of(torch.tensor([row.tokens.shape[1]]), torch.zeros(1, dtype=torch.int64), embeddings.device)
    run_on = replace(row, segments=over_all).states_of(inner)
    apart = hidden_states(inner, sequences.tokens)
    real = row.inside.clone()
    real[0] = False  # nothing stands before the first

    def distance(states: Tensor) -> float:
        """Relative, the mean over tokens: of a mixture of experts rounding may send a single one elsewhere."""
        off, size = ((x[real].double()).norm(dim=-1) for x in (states - apart, apart))
        return float((off / size.clamp(min=torch.finfo(torch.float64).tiny)).mean())

    narrow = any(weight.dtype not in (torch.float32, torch.float64) for weight in inner.parameters())
    rounding, most = (torch.finfo(torch.bfloat16).eps, 0.1) if narrow else (torch.finfo(torch.float32).eps, 1e-4)
    inner.tells_segments_apart = distance(packed) <= min(most, 0.1 * distance(run_on) + 16 * rounding)


@contextmanager
def without_sharing() -> Iterator[None]:
    """Compute every prompt for itself inside the block, though models may share them. For tests, and for benchmarks of
    what sharing saves; results differ by rounding alone."""
    token = _SHARING.set(False)
    try:
        yield
    finally:
        _SHARING.reset(token)


def layout_of(module: nn.Module) -> Layout:
    """The layout that all transformers models inside a module allow, as they stand (train or eval mode)."""
    from transformers import PreTrainedModel

    parts = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    bodies = {id(body) for part in parts if (body := body_of(part)) is not part}
    models = [part for part in parts if id(part) not in bodies]
    if not all(packs(model) for model in models):
        return "padded"
    return "shared" if all(shares(model) for model in models) else "packed"


def sequence_states(model: nn.Module, sequences: Sequences) -> Tensor:
    """The hidden states of sequences, laid out as the model allows: [rows, time, width]. Past the end of a sequence
    they are arbitrary. The pass is counted by its real tokens (``models.flops``), and its routers' probabilities are
    collected by sequence where a loss asks for them (``models.routing``).

    Args:
        model: a causal language model, or one with a scalar head.
        sequences: rows; the prompt of a row is all before its first masked token.
    """
    lengths = sequences.lengths.cpu()
    count_body(model, lengths)
    first = first_context(unwrapped(model))
    long = None if first is None else lengths > first
    with recorded_routers() as routers:
        states, place = _laid_out(model, sequences, lengths, long)
    if routers:
        collect(routers, place, sequences.lengths)
    return states


def _laid_out(model: nn.Module, sequences: Sequences, lengths: Tensor, long: Tensor | None) -> tuple[Tensor, Tensor]:
    """``sequence_states``, and [rows, time] the place of each of their tokens among all that went through the model.

    Args:
        lengths: [rows] on the CPU.
        long: [rows] on the CPU, which are longer than the context that a model with two sets of rotary frequencies was
            first trained on; None of other models.
    """
    if packs(model):
        leader, shared = _common_prompts(model, sequences, long)
        if sequences.tokens.numel() > int(lengths.sum()) or shared.any():  # else there is nothing to save
            row = _in_one_row(sequences, lengths, leader, shared, long)
            return row.states_of(model), row.place
    differ = None if long is None or long.all() or not long.any() else long[:, None].to(sequences.tokens.device)
    every = torch.arange(sequences.tokens.numel(), device=sequences.tokens.device)
    return hidden_states(model, sequences.tokens, long=differ), every.view(sequences.tokens.shape)


def _common_prompts(model: nn.Module, sequences: Sequences, long: Tensor | None) -> tuple[Tensor, Tensor]:
    """On the CPU, [rows] int64 each: the row whose first tokens a row has too (its own number where it shares none),
    and how many these are. A leader shares none itself. Rows with other rotary frequencies share nothing."""
    alone = torch.arange(len(sequences))
    if len(sequences) > 1 and _SHARING.get():
        leader, prompts = same_prompts(sequences)
        if long is not None:
            _, group = torch.unique(2 * leader + long, return_inverse=True)
            leader = torch.full_like(leader, len(leader)).scatter_reduce(0, group, alone, "amin")[group]
        shared = torch.where(leader == alone, 0, prompts)
        if shared.any() and shares(model):
            return leader, shared
    return alone, torch.zeros_like(alone)


@dataclass(frozen=True)
class _Row:
    """Sequences in one row, where prompts that are shared stand once.

    Attributes:
        tokens, positions: [1, places].
        segments: of the row.
        place: [rows, time] where in the row each token of a sequence is; past its end 0.
        inside: [rows, time] the tokens before a sequence's end.
        longest: tokens of the longest sequence.
        long: [1, places] bool, or None; see ``rope.frequencies_by_sequence``.
    """

    tokens: Tensor
    positions: Tensor
    segments: Segments
    place: Tensor
    inside: Tensor
    longest: int
    long: Tensor | None

    def states_of(self, model: nn.Module) -> Tensor:
        """[rows, time, width] hidden states of the sequences; past their ends arbitrary."""
        states = hidden_states(model, self.tokens, self.positions, self.segments, self.longest, self.long)
        return states[0][self.place]


def _in_one_row(sequences: Sequences, lengths: Tensor, leader: Tensor, shared: Tensor, long: Tensor | None) -> _Row:
    """Each leader, then what is different in those that share its prompt. ``lengths`` and ``long`` on the CPU, [rows];
    ``leader`` and ``shared`` as of ``_common_prompts``."""
    alone = torch.arange(len(lengths))
    device, width = sequences.tokens.device, sequences.tokens.shape[1]
    own = lengths - shared
    order = torch.argsort(leader * 2 + (leader != alone), stable=True)  # each leader, then those that share with it
    begins = torch.empty_like(own)
    begins[order] = own[order].cumsum(0) - own[order]
    time = torch.arange(width)[None]
    inside = time < lengths[:, None]
    # The row's tokens by their place in the batch, and where in the row each place of the batch is found again.
    taken = (inside & (time >= shared[:, None]))[order]
    source = (alone[:, None] * width + time)[order][taken].to(device)
    positions = time.expand(len(lengths), -1)[order][taken].to(device)
    place = torch.where(time < shared[:, None], begins[leader][:, None] + time, (begins - shared)[:, None] + time)
    kept = order[own[order] > 0]  # a sequence that is all shared has no tokens of its own
    differ = None
    if long is not None and long.any() and not long.all():
        differ = long[:, None].expand(-1, width)[order][taken].to(device)[None]
    return _Row(
        sequences.tokens.reshape(-1)[source][None],
        positions[None],
        Segments.of(own[kept], shared[kept], device),
        torch.where(inside, place, 0).to(device),
        inside.to(device),
        int(lengths.max()),
        differ,
    )
