"""Sequences → log-probs, with the LM head applied only where a log-prob is needed, in chunks.

The hidden states come from ``models.packing``: without padding, and common prompts computed once, where the model
allows it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_lit.batches import Sequences
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.flops import count_head
from rlhf_lit.models.heads import values_of_states
from rlhf_lit.models.lm_head import logits
from rlhf_lit.models.packing import sequence_states

# Logits held at once: 2^24 floats are 64 MiB, 110 positions of a 150 000-token vocabulary.
CHUNK_LOGITS = 2**24


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


def predicting_states(model: nn.Module, states: Tensor, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """The hidden states that predict the masked tokens, and those tokens: [n, width], [n], row by row. The model's LM
    head is counted at them (``models.flops``).

    Args:
        model: the model whose LM head they are for.
        states: [rows, time, width] hidden states of the sequences.
        sequences: rows, the mask on the tokens that are predicted.
    """
    predicted = sequences.mask[:, 1:]
    targets = sequences.tokens[:, 1:][predicted]
    count_head(model, len(targets))
    return states[:, :-1][predicted], targets


def scatter(values: Tensor, mask: Tensor) -> Tensor:
    """[n] values of the masked tokens → [rows, time] aligned to them, 0 elsewhere."""
    placed = torch.zeros(mask[:, 1:].shape, dtype=values.dtype, device=values.device)
    return nn.functional.pad(placed.masked_scatter(mask[:, 1:], values), (1, 0))


@dataclass(frozen=True)
class PolicyOutputs:
    """Per-token numbers of one forward pass, [rows, time], 0 off the mask.

    Attributes:
        logprobs: log π(token_t | tokens before t)/T, in nats.
        entropy: −Σ_v π(v)·log π(v) of the distribution each token was drawn from, in nats; None unless asked for.
        values: V of the state in which each token was chosen; None without a value head.
    """

    logprobs: Tensor
    entropy: Tensor | None
    values: Tensor | None


def policy_outputs(
    model: nn.Module,
    sequences: Sequences,
    temperature: float = 1.0,
    *,
    entropy: bool = False,
    value_head: nn.Module | None = None,
) -> PolicyOutputs:
    """Log-probs of the masked tokens, and what else can be read from the same hidden states.

    More than one chunk of logits is recomputed in the backward pass, so that they never stand in memory together.

    Args:
        model: a causal language model.
        sequences: rows, the mask on the tokens whose log-prob counts.
        temperature: T, divides the logits.
        entropy: whether to compute the entropy, which goes through the whole vocabulary once more.
        value_head: a critic on the model's own hidden states.
    """
    hidden = sequence_states(model, sequences)
    states, targets = predicting_states(model, hidden, sequences)
    function, columns = (target_logprobs_and_entropy, 2) if entropy else (target_logprobs, 1)
    pieces = list(chunks(model, len(targets)))
    recompute = torch.is_grad_enabled() and len(pieces) > 1
    parts = [
        checkpoint(function, model, states[piece], targets[piece], temperature, use_reentrant=False)
        if recompute
        else function(model, states[piece], targets[piece], temperature)
        for piece in pieces
    ]
    joined = torch.cat(parts) if parts else states.new_zeros(0, columns, dtype=torch.float32)
    logprobs, *more = (scatter(column, sequences.mask) for column in joined.unbind(-1))
    values = None if value_head is None else values_of_states(value_head, hidden, sequences)
    return PolicyOutputs(logprobs, more[0] if entropy else None, values)


def token_logprobs(model: nn.Module, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """log π(token_t | tokens before t)/T of the masked tokens. → [rows, time], 0 off the mask, in nats."""
    return policy_outputs(model, sequences, temperature).logprobs
