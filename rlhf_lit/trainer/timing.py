"""Where a run's time goes: seconds of each phase, beside each step."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.data.loader import BatchLoader
from rlhf_lit.rollout.loop import RolloutLoader


class Phases(Callback):
    """Logs ``time/data``, ``time/update`` and ``time/other``; with a rollout's ``time/sampling`` and ``time/scoring``,
    which are none of theirs, they add up to the run until its last step. Of loaders that are not this package's it
    cannot tell loading from the rest: it then stands in ``time/other``."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on."""
        self._ended = time.perf_counter()
        self._loading, self._rollouts = _spent(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """The batch is there; the step begins."""
        self._began = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The step is made."""
        now = time.perf_counter()
        loading, rollouts = _spent(trainer, pl_module)
        data, rollout = loading - self._loading, rollouts - self._rollouts
        pl_module.log("time/data", data)
        pl_module.log("time/update", now - self._began)
        # Between this step and the one before: validation, samples, checkpoints, loggers, a rollout's own records.
        pl_module.log("time/other", self._began - self._ended - data - rollout)
        self._ended, self._loading, self._rollouts = now, loading, rollouts


def _spent(trainer: Trainer, module: LightningModule) -> tuple[float, float]:
    """Seconds spent on batches, and on sampling and scoring rollouts."""
    loader = trainer.train_dataloader
    loading = loader.seconds if isinstance(loader, BatchLoader | RolloutLoader) else 0.0
    return loading, module.rollout_seconds if isinstance(module, OnPolicy) else 0.0
