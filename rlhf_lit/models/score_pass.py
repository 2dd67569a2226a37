"""The score pass: policy and reference on the same tokens, with the exact KL between them."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rlhf_lit.batches import Sequences
from rlhf_lit.losses.kl import exact_kl
from rlhf_lit.models.heads import values_of_states
from rlhf_lit.models.lm_head import logits
from rlhf_lit.models.logprobs import chunks, predicting_states, scatter, tempered
from rlhf_lit.models.packing import sequence_states
from rlhf_lit.models.roles import Roles
from rlhf_lit.models.routing import uncollected


@dataclass
class Comparison:
    """Per-token numbers in nats, [rows, time], 0 off the mask.

    Attributes:
        policy, reference: log-probs of the tokens under each.
        exact_kl: Σ_v π(v)·(log π(v) − log π₀(v)) of the distribution each token was drawn from.
        entropy: −Σ_v π(v)·log π(v) of the same.
        values: the critic's, if it is a head on the policy's hidden states; else None.
    """

    policy: Tensor
    reference: Tensor
    exact_kl: Tensor
    entropy: Tensor
    values: Tensor | None = None

    @classmethod
    def empty(cls, sequences: Sequences, values: bool = False) -> Comparison:
        """Zeros to be filled with ``put``; with the critic's values or without."""
        shape, device = sequences.tokens.shape, sequences.tokens.device
        return cls(*(torch.zeros(shape, device=device) for _ in range(5 if values else 4)))

    def put(self, rows: Tensor, part: Comparison) -> None:
        """Fill the given rows with those of a narrower comparison."""
        width = part.policy.shape[1]
        for field in fields(self):
            if (whole := getattr(self, field.name)) is not None:
                whole[rows, :width] = getattr(part, field.name).to(whole.dtype)

    @property
    def logratio(self) -> Tensor:
        """l_t = log π(token_t) − log π₀(token_t)."""
        return self.policy - self.reference


def exact_kl_to_reference(roles: Roles, sequences: Sequences, temperature: float = 1.0) -> Tensor:
    """Σ_v π(v)·(log π(v) − log π₀(v)) at each masked token, with the policy's gradient. → [rows, time], in nats.

    Logits are made one chunk at a time, and again in the backward pass where there is more than one. Call it, and run
    its backward pass, with the policy's role in force.
    """
    with torch.no_grad(), roles.acting("reference") as model:
        reference_states, _ = predicting_states(model, sequence_states(model, sequences), sequences)
    with roles.acting("policy") as model, uncollected():  # its routers were heard in the pass of the policy's loss
        policy_states, _ = predicting_states(model, sequence_states(model, sequences), sequences)

    def piece_kl(policy_piece: Tensor, reference_piece: Tensor) -> Tensor:
        with torch.no_grad(), roles.acting("reference") as model:
            reference = tempered(logits(model, reference_piece), temperature).log_softmax(-1)
        with roles.acting("policy") as model:
            policy = tempered(logits(model, policy_piece), temperature).log_softmax(-1)
        return exact_kl(policy, reference)

    pieces = list(chunks(roles.policy, len(policy_states)))
    recompute = torch.is_grad_enabled() and len(pieces) > 1
    kl = [
        checkpoint(piece_kl, policy_states[piece], reference_states[piece], use_reentrant=False)
        if recompute
        else piece_kl(policy_states[piece], reference_states[piece])
        for piece in pieces
    ]
    return scatter(torch.cat(kl) if kl else policy_states.new_zeros(0, dtype=torch.float32), sequences.mask)


@torch.no_grad()
def compare_with_reference(roles: Roles, sequences: Sequences, temperature: float = 1.0) -> Comparison:
    """Both models through the training forward, their logits side by side one chunk at a time.

    Args:
        roles: a policy with a reference.
        sequences: rows, the mask on the tokens to be compared.
        temperature: T, divides the logits of both.
    """
    with roles.acting("policy") as model:
        states = sequence_states(model, sequences)
        policy_states, targets = predicting_states(model, states, sequences)
        values = values_of_states(roles.heads["value"], states, sequences) if roles.value_on_trunk else None
    del states
    with roles.acting("reference") as model:
        reference_states, _ = predicting_states(model, sequence_states(model, sequences), sequences)
    columns: list[list[Tensor]] = [[], [], [], []]
    for piece in chunks(roles.policy, len(targets)):
        with roles.acting("policy") as model:
            policy_logits = tempered(logits(model, policy_states[piece]), temperature)
        with roles.acting("reference") as model:
            reference_logits = tempered(logits(model, reference_states[piece]), temperature)
        index = targets[piece][:, None]
        # log softmax as logit − logsumexp, the very arithmetic of the update, so that the first ratio is exactly 1.
        policy = policy_logits - policy_logits.logsumexp(-1, keepdim=True)
        reference = reference_logits - reference_logits.logsumexp(-1, keepdim=True)
        numbers = (
            policy.gather(-1, index).squeeze(-1),
            reference.gather(-1, index).squeeze(-1),
            exact_kl(policy, reference),
            -(policy.exp() * policy).sum(-1),
        )
        for column, number in zip(columns, numbers, strict=True):
            column.append(number)
    empty = policy_states.new_zeros(0, dtype=torch.float32)
    logprobs, reference_logprobs, kl, entropy = (
        scatter(torch.cat(column) if column else empty, sequences.mask) for column in columns
    )
    return Comparison(logprobs, reference_logprobs, kl, entropy, values)
