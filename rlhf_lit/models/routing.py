"""The routers of a mixture of experts: what they said of each sequence, for the loss that keeps experts evenly used.

Routers are heard by hooks on those modules whose logits transformers records as ``router_logits``. With gradient
checkpointing a hook runs at the first forward; what it keeps belongs to the graph that the backward pass recomputes.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.errors import UserError
from rlhf_lit.losses.balance import sequence_balance
from rlhf_lit.models.anatomy import body_of, unwrapped


class Collected:
    """What is collected inside ``collecting``.

    Attributes:
        chosen: the experts that a token is sent to.
        balance: for each pass with gradients, [rows] ``sequence_balance`` of its sequences.
    """

    def __init__(self, chosen: int) -> None:
        self.chosen = chosen
        self.balance: list[Tensor] = []


_COLLECTED: ContextVar[Collected | None] = ContextVar("collected", default=None)
_LOGITS: ContextVar[list[Tensor] | None] = ContextVar("logits", default=None)


@contextmanager
def collecting(chosen: int) -> Iterator[Collected]:
    """Collect what routers say in the passes inside the block that have gradients."""
    collected = Collected(chosen)
    token = _COLLECTED.set(collected)
    try:
        yield collected
    finally:
        _COLLECTED.reset(token)


@contextmanager
def uncollected() -> Iterator[None]:
    """Leave out the passes inside the block: a critic's, and a second one over the same sequences."""
    token = _COLLECTED.set(None)
    try:
        yield
    finally:
        _COLLECTED.reset(token)


@contextmanager
def recorded_routers() -> Iterator[list[Tensor]]:
    """The logits of the routers that are passed inside the block, where something collects; else nothing."""
    logits: list[Tensor] = []
    token = _LOGITS.set(logits if _COLLECTED.get() is not None and torch.is_grad_enabled() else None)
    try:
        yield logits
    finally:
        _LOGITS.reset(token)


def collect(routers: list[Tensor], place: Tensor, lengths: Tensor) -> None:
    """Add a pass to what is collected.

    Args:
        routers: of ``recorded_routers``.
        place: [rows, time] where each token of a sequence went through the model, counted over all rows of the pass.
        lengths: [rows] tokens of each sequence.
    """
    collected = _COLLECTED.get()
    assert collected is not None
    inside = torch.arange(place.shape[1], device=place.device) < lengths[:, None]
    row = torch.arange(len(lengths), device=place.device)[:, None].expand_as(place)[inside]
    collected.balance.append(sequence_balance(routers, collected.chosen, place[inside], row, lengths))


def own_coefficient(model: nn.Module) -> float:
    """What a model's config multiplies the loss of its routers with: ``router_aux_loss_coef`` where
    ``output_router_logits`` is true, as in transformers and TRL; else 0."""
    inner: Any = unwrapped(model)
    config: Any = inner.config.get_text_config()
    if not getattr(config, "output_router_logits", False):
        return 0.0
    # A language model keeps it under one name, whatever its config calls it.
    return float(getattr(inner, "router_aux_loss_coef", getattr(config, "router_aux_loss_coef", 0.0)) or 0.0)


def hear_routers(model: nn.Module) -> int:
    """Let the routers of a model be heard, from now on. → the experts that they send a token to.

    Raises:
        UserError: it has none, or transformers knows no such loss for them.
    """
    inner: Any = unwrapped(model)
    recorded = (getattr(inner, "_can_record_outputs", None) or {}).get("router_logits")
    body = body_of(inner)
    recorded = recorded or (getattr(body, "_can_record_outputs", None) or {}).get("router_logits")
    name = type(inner).__name__
    if recorded is None or isinstance(recorded, list) or not (routers := _matching(inner, recorded)):
        raise UserError(f"model.base.router_loss: {name} has no routers whose logits are known; set it to 0")
    if not hasattr(sys.modules[type(body).__module__], "load_balancing_loss_func"):
        raise UserError(
            f"model.base.router_loss: the experts of {name} are balanced by other means than this loss (a bias of the "
            "router); set it to 0"
        )
    hook = _Heard(recorded.index)
    for router in routers:
        router.register_forward_hook(hook)
    config = inner.config.get_text_config()
    return int(inner.num_experts_per_tok if hasattr(inner, "num_experts_per_tok") else config.num_experts_per_tok)


def _matching(inner: nn.Module, recorded: Any) -> list[nn.Module]:
    """The modules that transformers would record, by their class and, where it says one, the end of their name."""
    ending = recorded.layer_name
    return [
        part
        for name, part in inner.named_modules()
        if isinstance(part, recorded.target_class) and (ending is None or ending in name)
    ]


class _Heard:
    """A hook that keeps a router's logits."""

    def __init__(self, index: int) -> None:
        self.index = index

    @torch.compiler.disable(reason="what is collected leaves the graph")
    def __call__(self, module: nn.Module, given: Any, output: Any) -> None:
        if (logits := _LOGITS.get()) is not None:
            found = output[self.index] if isinstance(output, tuple) else output
            logits.append(found.reshape(-1, found.shape[-1]))
