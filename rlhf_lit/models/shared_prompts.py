"""The hidden states of preference pairs, each prompt computed once for both sides.

The two answers to a prompt stand behind it in one row, ``[prompt | rest of the chosen | rest of the rejected]``, with
positions that begin anew for the second and an attention mask under which neither answer sees the other. Every state is
the one that the two rows apart would have, up to rounding; what is saved is the trunk's work on the second prompt.
(Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing", arXiv 2410.20305.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences
from rlhf_lit.models.loading import attends_to_everything, unwrapped
from rlhf_lit.models.logprobs import hidden_states

# What must be saved, of the tokens of both sides: a mask costs the fast causal kernel.
LEAST_SAVED = 0.2


def pair_states(model: nn.Module, chosen: Sequences, rejected: Sequences) -> Tensor:
    """The hidden states of ``chosen.join(rejected)``: [2·pairs, time, width].

    Prompts are computed once where that saves enough, and the model's attention takes a mask; otherwise twice.
    """
    shared = _common_prefix(chosen, rejected)
    total = chosen.lengths.sum() + rejected.lengths.sum()
    if not _takes_masks(model) or float(shared.sum()) < LEAST_SAVED * float(total):
        return hidden_states(model, chosen.join(rejected).tokens)
    device = shared.device
    first, second = chosen.lengths, rejected.lengths - shared
    index = torch.arange(int((first + second).max()), device=device)[None]
    begun = index >= first[:, None]  # the second answer's places, and the padding
    # Where in the rejected side a place of the second answer comes from: behind the prompt that both have.
    source = (index - first[:, None] + shared[:, None]).clamp(min=0, max=rejected.tokens.shape[1] - 1)
    own = chosen.tokens.gather(1, index.clamp(max=chosen.tokens.shape[1] - 1).expand(len(chosen), -1))
    tokens = torch.where(begun, rejected.tokens.gather(1, source), own)
    positions = torch.where(begun, source, index)
    apart = begun[:, :, None] & ((index >= shared[:, None]) & ~begun)[:, None, :]
    seen = (index[0][:, None] >= index[0][None]) & ~apart
    width = max(chosen.tokens.shape[1], rejected.tokens.shape[1])
    states = hidden_states(model, tokens, positions, seen[:, None], longest=width)
    # Back to rows of their own: the chosen side as it stands, the rejected one from the prompt and the second answer.
    place = torch.arange(width, device=device)[None]
    last = states.shape[1] - 1
    second_place = torch.where(place < shared[:, None], place, place - shared[:, None] + first[:, None])
    places = torch.cat([place.expand(len(chosen), -1), second_place]).clamp(max=last)
    rows = torch.arange(len(chosen), device=device).repeat(2)[:, None]
    return states[rows, places]


def _common_prefix(chosen: Sequences, rejected: Sequences) -> Tensor:
    """[pairs] how many tokens both sides begin with."""
    width = min(chosen.tokens.shape[1], rejected.tokens.shape[1])
    equal = chosen.tokens[:, :width] == rejected.tokens[:, :width]
    length = torch.minimum(chosen.lengths, rejected.lengths)
    real = torch.arange(width, device=equal.device)[None] < length[:, None]
    return (equal & real).long().cumprod(-1).sum(-1)


def _takes_masks(model: nn.Module) -> bool:
    """Whether attention is by the kernel that takes a mask, over everything before, at positions that may be told."""
    inner: Any = unwrapped(model)
    config = inner.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) and not getattr(config, "alibi", False)
    return bool(rotary) and config._attn_implementation == "sdpa" and attends_to_everything(inner)
