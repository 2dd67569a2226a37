"""What is computed from a model's hidden states must be what the model itself computes: found out when it is loaded.

Three tokens go through the model's own forward and through ours. No random number is drawn.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.heads import apply_head
from rlhf_lit.models.lm_head import logits
from rlhf_lit.models.packing import hidden_states

# Raw logits that are put in place of the LM head's, where a cap or a factor shows: fresh weights have logits near 0,
# which a cap leaves as they are. The caps in use are 15 to 50.
LARGEST_LOGIT = 64.0
TOKENS = ((1, 2, 3), (1, 2, 4))  # they differ in the last alone
# Of the largest number: what rounding may make of equal rows of a batch. Threads share it out, and thirty layers in
# float32 make 6e-6 of that, TensorFloat-32 a hundred times more; a token that sees the next is moved by tenths.
ROUNDED_ROWS = 1e-2


@torch.no_grad()
def check_language_model(model: nn.Module) -> None:
    """Our path from hidden states to logits must give the model's own, or log-probs would be silently wrong.

    Raises:
        UserError: it does not, or a token sees those after it.
    """
    inner = unwrapped(model)
    name, head = type(inner).__name__, inner.get_output_embeddings()
    if head is None:
        raise UserError(f"base.name: {name} has no LM head; a decoder-only language model is needed")
    tokens = _tokens(inner)

    def own() -> Tensor:
        return inner(input_ids=tokens, use_cache=False).logits

    plain = own()
    _require_causal(name, plain)
    states = hidden_states(model, tokens)
    same = _agree(plain, logits(model, states))
    hook = head.register_forward_hook(_ramp)
    try:
        same = same and _agree(own(), logits(model, states))
    finally:
        hook.remove()
    if not same:
        raise UserError(f"base.name: {name} changes its logits around the LM head in a way not supported")


@torch.no_grad()
def check_scorer(model: Any) -> None:
    """The `score` head on the last token's hidden state must give the model's own score, or scores would be others
    elsewhere.

    Args:
        model: a sequence classifier, its head in float32.

    Raises:
        UserError: it does not, or a token sees those after it.
    """
    name, tokens = type(model).__name__, _tokens(model)
    states = hidden_states(model, tokens)
    _require_causal(name, states)
    pad = getattr(model.config.get_text_config(), "pad_token_id", None)
    row = next(i for i, last in enumerate(tokens[:, -1].tolist()) if last != pad)
    # In a batch of its own, as below: among others its states are rounded otherwise.
    last, head = hidden_states(model, tokens[row : row + 1])[0, -1:], model.score
    whole = {key: value.clone() for key, value in head.state_dict().items()}
    head.to(states.dtype)  # the model's own forward pass casts nothing
    try:
        own = model(input_ids=tokens[row : row + 1], use_cache=False).logits
        ours = apply_head(head, last)
        size = (last.abs().float() @ head.weight.abs().float().T).max()  # of the products, which may cancel
    finally:
        head.float().load_state_dict(whole)
    if not _agree(own[0], ours, size):
        raise UserError(f"base.name: {name} does not read its score at the last token by its `score` head alone")


def _tokens(inner: Any) -> Tensor:
    """[2, 3] tokens that differ in the last alone, of a vocabulary of any size."""
    embeddings = inner.get_input_embeddings().weight
    return torch.tensor(TOKENS, device=embeddings.device) % len(embeddings)


def _require_causal(name: str, of_tokens: Tensor) -> None:
    """[2, time, …] numbers of ``TOKENS`` must agree up to the last token."""
    one, other = of_tokens[:, :-1]
    if not _agree(one, other, least=ROUNDED_ROWS):
        raise UserError(f"base.name: {name} lets a token see those after it; a decoder-only model is needed")


def _ramp(_head: nn.Module, _states: Any, raw: Tensor) -> Tensor:
    """Known logits from −``LARGEST_LOGIT`` to ``LARGEST_LOGIT`` in the place of the head's."""
    ramp = torch.linspace(-LARGEST_LOGIT, LARGEST_LOGIT, raw.shape[-1], device=raw.device)
    return ramp.to(raw.dtype).expand_as(raw)


def _agree(own: Tensor, ours: Tensor, size: Tensor | None = None, least: float = 0.0) -> bool:
    """Whether two tensors are the same up to what the narrower's dtype loses in a few operations on numbers of a size
    (the largest of the tensor's own by default), or up to ``least`` of that size."""
    if own.shape != ours.shape:
        return False
    allowed = max(least, 16 * torch.finfo(own.dtype).eps, 16 * torch.finfo(ours.dtype).eps)
    own, ours = own.double(), ours.double()
    return bool((own - ours).abs().max() <= allowed * (own.abs().max() if size is None else size))
