"""Measurements of memory: the peak of each phase, and the bytes that stay from step to step."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from rlhf_lit.memory.gauges import Gauge, tensors_of
from rlhf_lit.memory.phases import Phase


@dataclass(frozen=True)
class Held:
    """Bytes that stay from step to step.

    Attributes:
        weights: of all models: the base, and what stands beside it.
        adapters: LoRA matrices and scalar heads, of all roles.
        gradients: while a step accumulates; freed with it.
        optimizer: the optimizer's state.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.gradients + self.optimizer

    @classmethod
    def by(cls, module: nn.Module, optimizer: Optimizer) -> Held:
        """Count the bytes of a module and its optimizer; memory that two tensors share counts once."""
        seen: set[int] = set()

        def size(tensors: Iterable[Tensor]) -> int:
            storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
            fresh = storages.keys() - seen
            seen.update(fresh)
            return sum(storages[address] for address in fresh)

        state = [x for slot in optimizer.state.values() for x in tree_leaves(slot) if isinstance(x, Tensor)]
        return cls(
            weights=size(tensor for name, tensor in tensors_of(module) if not _is_added(name)),
            adapters=size(tensor for name, tensor in tensors_of(module) if _is_added(name)),
            gradients=size(p.grad for p in module.parameters() if p.grad is not None),
            optimizer=size(state),
        )


def _is_added(name: str) -> bool:
    """Whether a tensor came with LoRA or is a head."""
    return any(part.startswith("lora_") or part in ("heads", "modules_to_save") for part in name.split("."))


class Measurement:
    """The peaks of one worst-case run, phase by phase.

    Attributes:
        phase: the one that is under way.
        peaks: bytes at most, by phase, in the order in which they came.
        held: what stays; None until an optimizer step was reached.
        fits: whether memory sufficed; if not, ``phase`` is the one in which it ran out.
    """

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.phase: Phase = "load"
        self.peaks: dict[Phase, int] = {}
        self.held: Held | None = None
        self.fits = True
        gauge.reset()

    def enter(self, phase: Phase) -> None:
        """The phase under way ends, and another begins."""
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.gauge.peak)
        self.gauge.reset()
        self.phase = phase

    @property
    def peak(self) -> int:
        """Of all phases after loading."""
        return max(size for phase, size in self.peaks.items() if phase != "load")


class Watch(Callback):
    """Tells a measurement where the trainer stands."""

    def __init__(self, measurement: Measurement, limit: int) -> None:
        self.measurement = measurement
        self.limit = limit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The models are loaded: now they count, those that other threads read from disk too."""
        gauge = self.measurement.gauge
        gauge.restrict(self.limit)
        gauge.see(tensor for _, tensor in tensors_of(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """After a rollout, if there was one."""
        self.measurement.enter("update")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are complete; from the second step on there is state too."""
        self.measurement.held = Held.by(pl_module, optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last phase's peak."""
        self.measurement.enter(self.measurement.phase)
