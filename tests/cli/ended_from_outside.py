"""Callbacks by which a run is ended at a step that the environment names: its command stays as it is."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class StallAt(Callback):
    """Leaves a note in its run folder after step $STALL_AT and waits to be ended."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == int(os.environ["STALL_AT"]):
            Path(trainer.default_root_dir, "stalled").touch()
            time.sleep(600)


class TerminateItself(Callback):
    """SIGTERM, as from a scheduler, after the first step."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
