"""Scalar heads: one number from a hidden state, always in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences
from rlhf_lit.models.packing import sequence_states


def scalar_head(width: int) -> nn.Linear:
    """A head drawn normal with standard deviation 1/√(d+1), bias 0 (Ziegler et al. 2019, §2.1)."""
    head = nn.Linear(width, 1)
    nn.init.normal_(head.weight, std=(width + 1) ** -0.5)
    nn.init.zeros_(head.bias)
    return head


def apply_head(head: nn.Module, states: Tensor) -> Tensor:
    """[..., width] → [...]; outside autocast, since a score in bf16 has two digits."""
    weight = next(head.parameters())
    with torch.autocast(states.device.type, enabled=False):
        return head(states.to(weight.dtype)).squeeze(-1)


def sequence_scores(model: nn.Module, head: nn.Module, sequences: Sequences) -> Tensor:
    """The head on the hidden state of each row's last real token, found from its length. → [rows]."""
    states = sequence_states(model, sequences)
    rows = torch.arange(len(sequences), device=states.device)
    return apply_head(head, states[rows, sequences.lengths - 1])


def token_values(model: nn.Module, head: nn.Module, sequences: Sequences) -> Tensor:
    """V of the state in which each token was chosen: the head on the hidden state before it. → [rows, time], 0 off the
    mask."""
    return values_of_states(head, sequence_states(model, sequences), sequences)


def values_of_states(head: nn.Module, states: Tensor, sequences: Sequences) -> Tensor:
    """``token_values`` from the [rows, time, width] hidden states of the sequences."""
    values = nn.functional.pad(apply_head(head, states[:, :-1]), (1, 0))
    return torch.where(sequences.mask, values, torch.zeros_like(values))


def reward_bias(inner: Any) -> float:
    """The constant added to every score of a reward model, so that reference responses score 0 on average."""
    return float(getattr(inner.config, "reward_bias", 0.0))
