"""Sequences → hidden states, without padding and with common prompts computed once.

The sequences of a micro-batch are packed into one row. Each has positions that begin at 0 and attends to itself alone,
so every state is the one that a row of its own would have, up to rounding; what is saved is the work on padding, and
small matrix products. (Packing without cross-contamination: Krell et al. 2021, arXiv 2107.02027.)

A prompt that several sequences begin with is computed once for all of them: ``[prompt | rest of the first | rest of the
second | …]``, where no answer sees another. That holds for both sides of a pair, for ranked answers, and for several
responses to one prompt alike; it is found from the tokens, and no caller says so. (Wang and Hegde 2024, "Accelerating
Direct Preference Optimization with Prefix Sharing", arXiv 2410.20305.) It is not done while any dropout is active,
which would give the sequences the same noise on their prompt.

Models whose attention cannot be told of segments are given rows padded on the right, and no attention mask: causal
order already hides the pads.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from rlhf_lit.batches import Layout, Sequences, same_prompts
from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import attends_to_everything, body_of, drops_out, unwrapped
from rlhf_lit.models.flops import count_body

_SHARING: ContextVar[bool] = ContextVar("sharing", default=True)


def hidden_states(
    model: nn.Module,
    tokens: Tensor,
    positions: Tensor | None = None,
    segments: Segments | None = None,
    longest: int | None = None,
) -> Tensor:
    """[rows, time] tokens → [rows, time, width] last hidden states, from the body without its head.

    Args:
        model: a causal language model, or one with a scalar head.
        tokens: right-padded.
        positions: [rows, time] of each token, where they are not 0, 1, 2, …
        segments: the sequences of one row, where it holds several.
        longest: tokens of the longest of them.

    Raises:
        UserError: more tokens than the model has positions for.
    """
    inner = unwrapped(model)
    limit = getattr(inner.config.get_text_config(), "max_position_embeddings", None)
    length = tokens.shape[1] if longest is None else longest
    if limit is not None and length > limit:
        raise UserError(f"data.max_length: a sequence of {length} tokens does not fit the model's context of {limit}")
    body = body_of(inner)
    if segments is None:
        return body(input_ids=tokens, use_cache=False).last_hidden_state
    register()
    # A mask of four dimensions is handed on as it is; without one, transformers would make one of time × time.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    options = {"position_ids": positions, "attention_mask": unread, "segments": segments}
    return body(input_ids=tokens, use_cache=False, **options).last_hidden_state


def packs(model: nn.Module) -> bool:
    """Whether several sequences can be packed into one row: attention is by ``sdpa`` over everything before, the layers
    hand on what it is told, and positions are those that are given."""
    inner: Any = unwrapped(model)
    config = inner.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) and not getattr(config, "alibi", False)
    takes = inner._supports_attention_backend and config._attn_implementation == "sdpa"
    quiet = not (inner.training and getattr(config, "attention_dropout", 0))
    return bool(rotary) and takes and quiet and attends_to_everything(inner)


def shares(model: nn.Module) -> bool:
    """Whether a prompt may be computed once for several sequences: the model packs, and no dropout is active."""
    return _SHARING.get() and packs(model) and not drops_out(unwrapped(model))


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

    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    if not all(packs(model) for model in models):
        return "padded"
    return "shared" if all(shares(model) for model in models) else "packed"


def sequence_states(model: nn.Module, sequences: Sequences) -> Tensor:
    """The hidden states of sequences, laid out as the model allows: [rows, time, width]. Past the end of a sequence
    they are arbitrary. The pass is counted by its real tokens (``models.flops``).

    Args:
        model: a causal language model, or one with a scalar head.
        sequences: rows; the prompt of a row is all before its first masked token.
    """
    lengths = sequences.lengths.cpu()
    count_body(model, lengths)
    if not packs(model):
        return hidden_states(model, sequences.tokens)
    leader, shared = _common_prompts(model, sequences)
    if sequences.tokens.numel() == int(lengths.sum()) and not shared.any():
        return hidden_states(model, sequences.tokens)  # nothing to save
    return _packed_states(model, sequences, lengths, leader, shared)


def _common_prompts(model: nn.Module, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """On the CPU, [rows] int64 each: the row whose first tokens a row has too (its own number where it shares none),
    and how many these are. A leader shares none itself."""
    alone = torch.arange(len(sequences))
    if len(sequences) > 1 and _SHARING.get():
        leader, prompts = same_prompts(sequences)
        shared = torch.where(leader == alone, 0, prompts)
        if shared.any() and shares(model):
            return leader, shared
    return alone, torch.zeros_like(alone)


def _packed_states(model: nn.Module, sequences: Sequences, lengths: Tensor, leader: Tensor, shared: Tensor) -> Tensor:
    """``sequence_states`` in one row: [rows, time, width]. ``lengths`` on the CPU; ``leader`` and ``shared`` as of
    ``_common_prompts``."""
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
    segments = Segments.of(own[kept], shared[kept], device)
    tokens = sequences.tokens.reshape(-1)[source]
    states = hidden_states(model, tokens[None], positions[None], segments, longest=int(lengths.max()))
    return states[0][torch.where(inside, place, 0).to(device)]


@dataclass(frozen=True)
class Segments:
    """Where the sequences of a row begin and end, and what they have in common.

    Attributes:
        lengths: of each segment, in the order of the row; none is empty.
        shared: how many tokens it attends to, of the last segment before it that shares none; 0 for its own alone.
        query_bounds, key_bounds: [segments + 1] int32, running sums of lengths, and of lengths with what is shared.
        keys: the row's places from which the keys are gathered; None where no segment shares any.
    """

    lengths: tuple[int, ...]
    shared: tuple[int, ...]
    query_bounds: Tensor
    key_bounds: Tensor
    keys: Tensor | None

    @classmethod
    def of(cls, lengths: Tensor, shared: Tensor, device: torch.device) -> Self:
        """From [segments] int64 each, on the CPU."""
        ends, whole = lengths.cumsum(0), shared + lengths
        keys = None
        if shared.any():
            begins = ends - lengths
            head = torch.where(shared == 0, torch.arange(len(lengths)), 0).cummax(0).values
            inside = torch.arange(int(whole.sum())) - (whole.cumsum(0) - whole).repeat_interleave(whole)
            common = shared.repeat_interleave(whole)
            own = begins.repeat_interleave(whole) + inside - common
            keys = torch.where(inside < common, begins[head].repeat_interleave(whole) + inside, own).to(device)
        queries, seen = (nn.functional.pad(x.cumsum(0), (1, 0)).to(torch.int32).to(device) for x in (lengths, whole))
        return cls(tuple(lengths.tolist()), tuple(shared.tolist()), queries, seen, keys)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' ``sdpa``, and the same over segments where they are given.

    Args:
        module: the attention layer.
        query, key, value: [rows, heads, time, width]; of keys and values perhaps fewer heads. One row with segments.
        attention_mask: not read with segments, which say it all.
        segments: of the row.
        options: transformers' own; of them ``scaling`` is that of the scores.

    Returns:
        [rows, time, heads, width] and None.
    """
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    scale = options.get("scaling")
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    if query.is_cuda and dtype in (torch.bfloat16, torch.float16) and torch.cuda.get_device_capability() >= (8, 0):
        return _in_one_kernel(query.to(dtype), key.to(dtype), value.to(dtype), segments, scale), None
    return _one_by_one(query, key, value, segments, scale), None


def _one_by_one(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
    """A call of the kernel for each segment."""
    pieces = (x.split(segments.lengths, 2) for x in (query, key, value))
    grouped = query.shape[1] != key.shape[1]
    found = []
    for own, keys, values, shared in zip(*pieces, segments.shared, strict=True):
        if not shared:
            first = keys, values
            out = scaled_dot_product_attention(own, keys, values, is_causal=True, scale=scale, enable_gqa=grouped)
        else:
            keys, values = (torch.cat([x[:, :, :shared], y], 2) for x, y in zip(first, (keys, values), strict=True))
            size = own.shape[2], shared + own.shape[2]
            seen = torch.ones(size, dtype=torch.bool, device=own.device).tril(shared)
            out = scaled_dot_product_attention(own, keys, values, attn_mask=seen, scale=scale, enable_gqa=grouped)
        found.append(out.transpose(1, 2))
    return torch.cat(found, 1)


def _in_one_kernel(query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None) -> Tensor:
    """Flash attention of varying lengths (Dao 2023, arXiv 2307.08691), on GPUs in 16 bits. A segment's queries are the
    last of its keys, which is how the kernel aligns causal order."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    if segments.keys is not None:
        k, v = k[segments.keys], v[segments.keys]
    longest = max(segments.lengths), max(map(sum, zip(segments.lengths, segments.shared, strict=True)))
    # torch 2.11 takes fewer heads of keys without being told.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    bounds = segments.query_bounds, segments.key_bounds
    out = varlen_attn(q, k, v, *bounds, *longest, scale=scale, window_size=(-1, 0), **grouped)
    assert isinstance(out, Tensor)
    return out[None]


@cache
def register() -> None:
    """Make it transformers' ``sdpa``. It stays out of the graphs of compiled layers, which would be compiled anew for
    each batch's segments."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("sdpa", torch.compiler.disable(attention, reason="segments differ from batch to batch"))
