"""Sums over the ranks: of numbers, of a step's metrics, and of its gradients."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn

from rlhf_lit.parallel.sharding import sharding_of


@dataclass(frozen=True)
class StepLoss:
    """What a micro-batch adds to the loss of a step: over all micro-batches and ranks these sum up to the batch's own.

    Attributes:
        loss: scalar with a gradient, already divided by the whole batch's denominator.
        metrics: scalars without one, divided likewise.
    """

    loss: Tensor
    metrics: dict[str, Tensor]

    def add_to(self, totals: dict[str, Tensor]) -> None:
        """Add the loss and the metrics to sums by name."""
        for name, value in {"loss": self.loss.detach(), **self.metrics}.items():
            totals[name] = totals[name] + value if name in totals else value


def sum_over_ranks(module: LightningModule, value: Tensor) -> Tensor:
    """Σ over ranks of a scalar; itself on one rank, and outside a trainer."""
    return _over_ranks(module, value, "sum")


def max_over_ranks(module: LightningModule, value: Tensor) -> Tensor:
    """The largest of the ranks' scalars; itself on one rank, and outside a trainer."""
    return _over_ranks(module, value, "max")


def _over_ranks(module: LightningModule, value: Tensor, how: Literal["sum", "max"]) -> Tensor:
    if module._trainer is None or module.trainer.world_size == 1:
        return value
    reduced = module.trainer.strategy.reduce(value.clone(), reduce_op=how)
    assert isinstance(reduced, Tensor)
    return reduced


def sum_metrics(module: LightningModule, totals: dict[str, Tensor]) -> dict[str, Tensor]:
    """Σ over ranks of a step's metrics. A rank whose part of the batch is empty has none, and adds zeros."""
    if module.trainer.world_size == 1:
        return totals
    names: list[list[str]] = [[] for _ in range(module.trainer.world_size)]
    torch.distributed.all_gather_object(names, list(totals))
    every = max(names, key=len)
    zero = torch.zeros((), device=module.device)
    sums = sum_over_ranks(module, torch.stack([totals.get(name, zero).float() for name in every]))
    return dict(zip(every, sums, strict=True))


def local_gradients(trainer: Any) -> AbstractContextManager[None]:
    """No gradient synchronisation inside: ranks may hold different numbers of micro-batches."""
    block = getattr(trainer.strategy, "block_backward_sync", None)
    return block() if trainer.world_size > 1 and block else nullcontext()


def reduce_and_clip(module: LightningModule, moving: list[nn.Parameter], limit: float | None) -> Tensor:
    """Sum the gradients over the ranks (denominators are global already) and clip them.

    Args:
        module: with gradients from this rank's micro-batches.
        moving: the parameters that this step moves; the other gradients are dropped, so that the optimizer passes over
            those parameters: no decay, no moments, no count of steps.
        limit: of the global L2 norm; None only measures it.

    Returns:
        The norm before clipping.
    """
    kept = set(moving)
    for parameter in module.parameters():
        if parameter.requires_grad and parameter not in kept:
            parameter.grad = None
    sharding = sharding_of(module)
    sharding.sum_gradients(moving)
    return sharding.clip_grad_norm(moving, float("inf") if limit is None else limit)
