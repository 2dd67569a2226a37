"""Hidden states → log-probs, with the LM head applied only where a log-prob is needed, in chunks.

The hidden states are those of ``states``: without padding where the model can do without.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_lit.batches import Sequences
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.packing import sequence_states

# Logits held at once: 2^24 floats are 64 MiB, 110 positions of a 150 000-token vocabulary.
CHUNK_LOGITS = 2**24


def logits(model: nn.Module, states: Tensor) -> Tensor:
    """[..., width] hidden states → [..., vocabulary] logits, in the width of float32 or more."""
    inner = unwrapped(model)
    raw = inner.get_output_embeddings()(states)
    config: Any = inner.config
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    if (scale := getattr(config, "logit_scale", None)) is not None:  # Cohere
        raw = raw * scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:  # Granite
        raw = raw / scaling
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:  # Gemma 2 and 3
        raw = cap * torch.tanh(raw / cap)
    return raw


def tempered(raw: Tensor, temperature: float) -> Tensor:
    """logits/T; as they are for T = 1, where a copy of the vocabulary's width would be all that is gained."""
    return raw if temperature == 1 else raw / temperature


def target_logprobs(model: nn.Module, states: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits/T) at the targets. [n, width], [n] → [n, 1], in nats."""
    scaled = tempered(logits(model, states), temperature)
    return scaled.gather(-1, targets[:, None]) - scaled.logsumexp(-1, keepdim=True)


def target_logprobs_and_entropy(model: nn.Module, states: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """The same, and −Σ_v π(v)·log π(v) of the distribution. [n, width], [n] → [n, 2], in nats."""
    scaled = tempered(logits(model, states), temperature)
    normaliser = scaled.logsumexp(-1, keepdim=True)
    everything = scaled - normaliser
    entropy = -(everything.exp() * everything).sum(-1, keepdim=True)
    return torch.cat([scaled.gather(-1, targets[:, None]) - normaliser, entropy], -1)


def chunks(model: nn.Module, positions: int) -> Iterator[slice]:
    """Slices of ``range(positions)`` whose logits fit ``CHUNK_LOGITS``."""
    step = max(1, CHUNK_LOGITS // unwrapped(model).config.get_text_config().vocab_size)
    for start in range(0, positions, step):
        yield slice(start, min(start + step, positions))


def predicting_states(model: nn.Module, sequences: Sequences, states: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The hidden states that predict the masked tokens, and those tokens: [n, width], [n], row by row.

    Args:
        model: what gives the hidden states.
        sequences: rows, the mask on the tokens that are predicted.
        states: [rows, time, width] the hidden states, where they are at hand.
    """
    predicted = sequences.mask[:, 1:]
    states = sequence_states(model, sequences) if states is None else states
    return states[:, :-1][predicted], sequences.tokens[:, 1:][predicted]


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """[n] values of the masked tokens → [rows, time] aligned to them, 0 elsewhere."""
    placed = torch.zeros(mask[:, 1:].shape, dtype=values.dtype, device=values.device)
    return nn.functional.pad(placed.masked_scatter(mask[:, 1:], values), (1, 0))


def token_logprobs(
    model: nn.Module, sequences: Sequences, temperature: float = 1.0, states: Tensor | None = None
) -> Tensor:
    """log π(token_t | tokens before t)/T of the masked tokens. → [rows, time], 0 off the mask, in nats.

    More than one chunk of logits is recomputed in the backward pass, so that they never stand in memory together.
    ``states``: see ``predicting_states``.
    """
    return _per_token(target_logprobs, 1, model, sequences, temperature, states)[0]


def token_logprobs_and_entropy(
    model: nn.Module, sequences: Sequences, temperature: float = 1.0, states: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same, and the entropy of the distribution each masked token was drawn from. → 2 × [rows, time]."""
    logprobs, entropy = _per_token(target_logprobs_and_entropy, 2, model, sequences, temperature, states)
    return logprobs, entropy


def _per_token(
    function: Callable[..., Tensor],
    columns: int,
    model: nn.Module,
    sequences: Sequences,
    temperature: float,
    given: Tensor | None,
) -> list[Tensor]:
    """A function of (states, targets) at the masked tokens, chunk by chunk. → ``columns`` × [rows, time]."""
    states, targets = predicting_states(model, sequences, given)
    pieces = list(chunks(model, len(targets)))
    recompute = torch.is_grad_enabled() and len(pieces) > 1
    parts = [
        checkpoint(function, model, states[piece], targets[piece], temperature, use_reentrant=False)
        if recompute
        else function(model, states[piece], targets[piece], temperature)
        for piece in pieces
    ]
    joined = torch.cat(parts) if parts else states.new_zeros(0, columns, dtype=torch.float32)
    return [scatter(column, sequences.mask) for column in joined.unbind(-1)]


from dataclasses import dataclass  # noqa: E402


@dataclass(frozen=True)
class PolicyOutputs:
    logprobs: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None


def policy_outputs(model, sequences, temperature=1.0, *, entropy=False, value_head=None):  # type: ignore
    from rlhf_lit.models.heads import token_values
    from rlhf_lit.models.packing import response_states

    states = response_states(model, sequences)
    if entropy:
        lp, ent = token_logprobs_and_entropy(model, sequences, temperature, states)
    else:
        lp, ent = token_logprobs(model, sequences, temperature, states), None
    return PolicyOutputs(
        lp, ent, token_values(model, value_head, sequences, states) if value_head is not None else None
    )
