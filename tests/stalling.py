"""A callback that holds a run still, so that it can be killed at a known step, whatever the machine's speed."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StallAfter(Callback):
    """Each rank leaves a note, ``note`` with its number added, and waits to be killed once a step is done.

    Lightning calls it before the callback that saves: a checkpoint due after this very step is not written.
    """

    def __init__(self, step: int, note: str) -> None:
        self.step = step
        self.note = note

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            Path(f"{self.note}.{trainer.global_rank}").touch()
            time.sleep(600)
