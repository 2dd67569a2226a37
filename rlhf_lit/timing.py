"""Where a run's time goes: seconds of each phase, beside each step."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rlhf_lit.data.batching import BatchLoader, RolloutLoader


class Phases(Callback):
    """Logs ``time/data``, ``time/update`` and ``time/other``; with a rollout's ``time/sampling`` and ``time/scoring``,
    which are none of theirs, they add up to the run. Of loaders that are not this package's it cannot tell loading from
    the rest: it then stands in ``time/other``."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on."""
        self._ended = time.perf_counter()
        self._loading, self._collecting = _spent(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there; the step begins."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is made."""
        now = time.perf_counter()
        loading, collecting = _spent(trainer)
        data, rollout = loading - self._loading, collecting - self._collecting
        pl_module.log("time/data", data)
        pl_module.log("time/update", now - self._began)
        # Between this step and the one before: validation, samples, checkpoints, loggers.
        pl_module.log("time/other", self._began - self._ended - data - rollout)
        self._ended, self._loading, self._collecting = now, loading, collecting


def _spent(trainer: Trainer) -> tuple[float, float]:
    """Seconds that the training loader has spent on batches, and on rollouts."""
    loader = trainer.train_dataloader
    if isinstance(loader, RolloutLoader):
        return loader.seconds, loader.collecting
    return (loader.seconds, 0.0) if isinstance(loader, BatchLoader) else (0.0, 0.0)
