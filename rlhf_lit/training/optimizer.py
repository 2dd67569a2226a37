"""The optimizer, and its learning rate over the steps of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from rlhf_lit.errors import UserError


@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), in float32 or with 8-bit state through bitsandbytes.

    Args:
        name: adamw, adamw_8bit, or paged_adamw_8bit (state that moves to the host when the device is full).
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled decay per step, times the learning rate.
        max_grad_norm: clip the gradient's global L2 norm to this; null only measures it.
    """

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over groups of parameters (``params``), each with its learning rate (``lr``)."""
        options: dict[str, Any] = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        if self.name == "adamw":
            return torch.optim.AdamW(groups, fused=True, **options)  # one pass over weight, gradient and moments
        import bitsandbytes

        kinds = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
        return getattr(bitsandbytes.optim, kinds[self.name])(groups, **options)


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the steps of the run.

    Args:
        name: constant; or linear or cosine decay to 0 at the run's last step.
        warmup: steps of linear rise from 0; below 1, a fraction of the run's steps.
    """

    name: Literal["constant", "linear", "cosine"] = "linear"
    warmup: float = 0.0

    def build(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """The scheduler, stepped once per optimizer step."""
        from transformers import get_scheduler

        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        name = "constant_with_warmup" if self.name == "constant" else self.name
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


def configure(algorithm: Any) -> Any:
    """Optimizer and scheduler of an algorithm, in the form that Lightning's ``configure_optimizers`` returns.

    Raises:
        UserError: nothing is trainable, or the run has no end.
    """
    settings: Optimizer = algorithm.optimizer_settings
    if not algorithm.trainable_parameters():
        raise UserError(f"base.name: nothing of {algorithm.base.name} is trainable")
    steps = algorithm.trainer.estimated_stepping_batches
    if steps == float("inf"):
        raise UserError("trainer.max_epochs, trainer.max_steps: one of them must say how long the run is")
    optimizer = settings.build(algorithm.parameter_groups())
    return {"optimizer": optimizer, "lr_scheduler": algorithm.schedule_settings.build(optimizer, int(steps))}


def apply_settings(algorithm: Any) -> None:
    """Give a restored optimizer and scheduler this run's settings; they come with those they were saved with."""
    optimizer, scheduler = algorithm.optimizers(), algorithm.lr_schedulers()
    settings: Optimizer = algorithm.optimizer_settings
    scheduler.base_lrs = [group["lr"] for group in algorithm.parameter_groups()]
    factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
    scheduler._last_lr = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
    for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
        group.update(lr=rate, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
