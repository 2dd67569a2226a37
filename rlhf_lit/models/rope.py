"""Rotary positions whose frequencies depend on the longest position of a call.

LongRoPE (Ding et al. 2024, arXiv 2402.13753; Phi-3 and Phi-4 models of 128k) has two sets of them: one for sequences
within the context the model was first trained on, one for longer ones. transformers chooses by the call's longest
position, for all of its rows. Here each sequence gets its own, so that its states are those of a row of its own.

The dynamic NTK scaling changes them beyond the config's context alone, where every sequence is refused
(``packing.hidden_states``). All other kinds are the same for every call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.models.anatomy import context_length, unwrapped


def first_context(model: Any) -> int | None:
    """The tokens of the context that a transformers model with two sets of frequencies was first trained on; None of
    a model with one."""
    found = _contexts(model.config.get_text_config()).values()
    return min(found, default=None)


def room(model: nn.Module, prompt: int) -> int | None:
    """Tokens that a model's context leaves after a prompt of so many, 0 or less where it leaves none; None without end.

    Where there are two contexts, prompt and response stay on one side of the first: beyond it all tokens get other
    frequencies, those too that were written with the first.
    """
    context, first = context_length(model), first_context(unwrapped(model))
    ends = [end for end in (context, first if first and prompt <= first else None) if end is not None]
    return min(ends) - prompt if ends else None


def leaves_room(model: nn.Module, prompt: int, new_tokens: int) -> bool:
    """Whether a prompt of so many tokens leaves room for a response of so many."""
    left = room(model, prompt)
    return left is None or new_tokens <= left


def _contexts(config: Any) -> dict[str | None, int]:
    """The same for each kind of layers that has frequencies of its own; None where all layers share them."""
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {None: parameters} if "rope_type" in parameters else parameters
    return {
        name: int(kind["original_max_position_embeddings"])
        for name, kind in kinds.items()
        if isinstance(kind, dict) and kind.get("rope_type") == "longrope"
    }


@contextmanager
def frequencies_by_sequence(model: Any, long: Tensor | None) -> Iterator[None]:
    """Inside the block each token's frequencies are those of its own sequence.

    Args:
        model: a transformers model.
        long: [rows, time] or [rows, 1] bool, whether a token is of a sequence longer than the first context; None where
            the sequences do not differ in that.
    """
    if long is None:
        yield
        return
    hooks = []
    for part in model.modules():
        kinds = getattr(part, "rope_type", None)
        if kinds == "longrope" or (isinstance(kinds, dict) and "longrope" in kinds.values()):
            hooks.append(part.register_forward_hook(_Chosen(long), with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _Chosen:
    """A hook of a rotary embedding: each token's factors from the set that its sequence uses."""

    def __init__(self, long: Tensor) -> None:
        self.long = long[..., None]

    def __call__(self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any], factors: Any) -> Any:
        arguments = dict(zip(("x", "position_ids", "layer_type"), given, strict=False)) | named
        config: Any = module.config
        context = _contexts(config).get(arguments.get("layer_type"))
        if context is None:  # layers of another kind
            return factors
        positions = arguments.pop("position_ids")
        # The call's longest position decides: none beyond the first context, or one column more that is.
        beyond = nn.functional.pad(positions, (0, 1), value=context)
        short = module.forward(position_ids=positions.clamp(max=context - 1), **arguments)
        longer = module.forward(position_ids=beyond, **arguments)
        return tuple(torch.where(self.long, b[:, :-1], a) for a, b in zip(short, longer, strict=True))
