"""Attention over a row of several sequences, each of which attends to itself alone, or to a prompt before it too.

It takes the place of transformers' ``sdpa``, which it is where no segments are given.
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

# The kernel of varying lengths takes heads up to this width, a multiple of 8.
WIDEST_HEAD = 256


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


@dataclass(frozen=True)
class Call:
    """What a layer told ``attention``.

    Attributes:
        layer: the attention layer.
        segmented: whether the segments reached it.
        masked: whether it made a mask of its own, which segments take the place of.
    """

    layer: nn.Module
    segmented: bool
    masked: bool


_CALLS: ContextVar[list[Call] | None] = ContextVar("calls", default=None)


@contextmanager
def recorded_calls() -> Iterator[list[Call]]:
    """The calls of ``attention`` inside the block, in a list that fills as they are made."""
    calls: list[Call] = []
    token = _CALLS.set(calls)
    try:
        yield calls
    finally:
        _CALLS.reset(token)


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
    if (calls := _CALLS.get()) is not None:
        masked = attention_mask is not None and attention_mask.numel() > 1
        calls.append(Call(module, segments is not None, masked))
    if segments is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    assert not options.get("dropout"), "attention's dropout was not seen by anatomy.drops_out_attention"
    scale = options.get("scaling")
    dtype = torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else value.dtype
    narrow = dtype in (torch.bfloat16, torch.float16) and max(query.shape[-1], value.shape[-1]) <= WIDEST_HEAD
    if query.is_cuda and narrow and torch.cuda.get_device_capability() >= (8, 0):
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
    last of its keys, which is how the kernel aligns causal order.

    The kernel knows one width of heads, a multiple of 8. Zeros at the end of a query or a key change no score, and of a
    value none of the columns that are kept (the latent attention of DeepSeek-V2, arXiv 2405.04434, has wider keys).
    """
    from torch.nn.attention.varlen import varlen_attn

    widths = query.shape[-1], value.shape[-1]
    wide = -(-max(widths) // 8) * 8
    scale = widths[0] ** -0.5 if scale is None else scale
    q, k, v = (nn.functional.pad(x[0].transpose(0, 1), (0, wide - x.shape[-1])) for x in (query, key, value))
    if segments.keys is not None:
        k, v = k[segments.keys], v[segments.keys]
    longest = max(segments.lengths), max(map(sum, zip(segments.lengths, segments.shared, strict=True)))
    # torch 2.11 takes fewer heads of keys without being told.
    grouped: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    bounds = segments.query_bounds, segments.key_bounds
    out = varlen_attn(q, k, v, *bounds, *longest, scale=scale, window_size=(-1, 0), **grouped)
    assert isinstance(out, Tensor)
    return out[None, ..., : widths[1]]


@cache
def register() -> None:
    """Make it transformers' ``sdpa``. It stays out of the graphs of compiled layers, which would be compiled anew for
    each batch's segments."""
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register("sdpa", torch.compiler.disable(attention, reason="segments differ from batch to batch"))
