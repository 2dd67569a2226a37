"""Tokens → hidden states, without padding and with common prompts computed once.

The sequences of a micro-batch stand behind one another in one row. Each has positions that begin at 0 and attends to
itself alone, so every state is the one that a row of its own would have, up to rounding; what is saved is the work on
padding, and small matrix products. (Packing without cross-contamination: Krell et al. 2021, arXiv 2107.02027.)

Two answers to one prompt may stand behind it: ``[prompt | rest of the chosen | rest of the rejected]``, where neither
answer sees the other. (Wang and Hegde 2024, "Accelerating Direct Preference Optimization with Prefix Sharing", arXiv
2410.20305.)

Models whose attention cannot be told of segments are given rows padded on the right, and no attention mask: causal
order already hides the pads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences, common_prefix, same_prompts
from rlhf_lit.errors import UserError
from rlhf_lit.models.loading import attends_to_everything, unwrapped
from rlhf_lit.models.segments import Segments, register


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
    body = getattr(inner, inner.base_model_prefix)
    if segments is None:
        return body(input_ids=tokens, use_cache=False).last_hidden_state
    register()
    # A mask of four dimensions is handed on as it is; without one, transformers would make one of time × time.
    unread = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=tokens.device)
    options = {"position_ids": positions, "attention_mask": unread, "segments": segments}
    return body(input_ids=tokens, use_cache=False, **options).last_hidden_state


def packs(model: nn.Module) -> bool:
    """Whether several sequences may stand in one row: attention is by ``sdpa`` over everything before, the layers hand
    on what it is told, and positions are those that are given."""
    inner: Any = unwrapped(model)
    config = inner.config.get_text_config()
    rotary = getattr(config, "rope_parameters", None) and not getattr(config, "alibi", False)
    takes = inner._supports_attention_backend and config._attn_implementation == "sdpa"
    quiet = not (inner.training and getattr(config, "attention_dropout", 0))
    return bool(rotary) and takes and quiet and attends_to_everything(inner)


def sequence_states(
    model: nn.Module, sequences: Sequences, leader: Tensor | None = None, shared: Tensor | None = None
) -> Tensor:
    """The hidden states of sequences: [rows, time, width]; off a sequence they are any.

    Args:
        model: a causal language model, or one with a scalar head.
        sequences: rows.
        leader: [rows] int64, the row whose first tokens a row has too; its own number where it shares none.
        shared: [rows] int64, how many these are. A leader shares none itself.
    """
    lengths = sequences.lengths.cpu()
    nothing = torch.zeros_like(lengths)
    shared = nothing if shared is None else shared.cpu()
    alone = torch.arange(len(lengths))
    leader = alone if leader is None else torch.where(shared == 0, alone, leader.cpu())
    full = sequences.tokens.numel() == int(lengths.sum()) and not shared.any()
    if full or not packs(model):
        return hidden_states(model, sequences.tokens)
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
    kept = order[own[order] > 0]  # a row that is all shared stands nowhere
    segments = Segments.of(own[kept], shared[kept], device)
    tokens = sequences.tokens.reshape(-1)[source]
    states = hidden_states(model, tokens[None], positions[None], segments, longest=int(lengths.max()))
    return states[0][torch.where(inside, place, 0).to(device)]


def response_states(model: nn.Module, sequences: Sequences) -> Tensor:
    """The hidden states of responses, a prompt that several of them answer computed once: [rows, time, width].

    Args:
        model: a causal language model, or one with a scalar head.
        sequences: prompt + response, the mask on the response.
    """
    leader, prompt = same_prompts(sequences)
    return sequence_states(model, sequences, leader, torch.where(leader == torch.arange(len(leader)), 0, prompt))


def pair_states(model: nn.Module, chosen: Sequences, rejected: Sequences) -> Tensor:
    """The hidden states of ``chosen.join(rejected)``, what both sides of a pair begin with computed once: [2·pairs,
    time, width]."""
    pair = torch.arange(len(chosen))
    prompts = common_prefix(chosen, rejected).cpu()
    shared = torch.cat([torch.zeros_like(prompts), prompts])
    return sequence_states(model, chosen.join(rejected), pair.repeat(2), shared)
