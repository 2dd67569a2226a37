"""A callback that counts what goes through the collectives of each optimizer step, and what a rank holds for it."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Collectives(TorchDispatchMode):
    """Sees each collective as the dispatcher does; the largest buffer it is given is its payload."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "barrier" not in func.__name__:
            buffers: Counter[int] = Counter()
            for place, argument in enumerate(args):
                buffers[place] = sum(t.numel() * t.element_size() for t in tree_leaves(argument)
                                     if isinstance(t, torch.Tensor))  # fmt: skip
            self.bytes[func.__name__.split(".")[0].strip("_")] += max(buffers.values())
        return func(*args, **(kwargs or {}))


class CommunicationBytes(Callback):
    """Writes what rank zero counted from the end of one step to the end of the next, the rollout included.

    Args:
        file: a JSON file: collective → bytes, for each step; how many bytes the trainable weights are, over all ranks;
            and how many this rank holds between gradients and update: its weights, gradients and optimizer state.
    """

    def __init__(self, file: str) -> None:
        self.file = Path(file)
        self._mode = _Collectives()
        self._steps: list[dict[str, int]] = []
        self._held = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on."""
        self._mode.__enter__()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """All of a step's gradients are there."""
        weights = list(pl_module.parameters())
        moments = [value for state in optimizer.state.values() for value in state.values()]
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        self._held = sum(_own_bytes(x) for x in (*weights, *gradients, *moments))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """A step is done."""
        self._steps.append(dict(self._mode.bytes))
        self._mode.bytes.clear()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it down."""
        self._mode.__exit__(None, None, None)
        if trainer.is_global_zero:
            trained = sum(
                weight.numel() * weight.element_size() for weight in pl_module.parameters() if weight.requires_grad
            )
            self.file.write_text(json.dumps({"trained": trained, "held": self._held, "steps": self._steps}))


def _own_bytes(x: torch.Tensor) -> int:
    own = x.to_local() if isinstance(x, DTensor) else x
    return own.numel() * own.element_size()
