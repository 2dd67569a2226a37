"""SIGTERM and SIGUSR1 end a run where it can be continued: after the current step, with a checkpoint of it."""

from __future__ import annotations

import signal
import threading
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback

from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.trainer.callbacks import Checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Preemption(Callback):
    """Ends ``fit`` on a scheduler's notice: the current step is finished and saved, the same one on all ranks.

    A signal reaches ranks in different steps, or one of them alone, so they agree after each step. Lightning's own
    handlers, which this replaces while a run trains, call a collective from within the handler, in the middle of
    whatever the rank was doing; and its SLURM handler saves in the middle of a step, beside our checkpoints.
    """

    def __init__(self) -> None:
        self._asked = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning puts the handlers back that were there before it, when it ends."""
        if threading.current_thread() is threading.main_thread():  # the only one that Python lets set a handler
            for number in SIGNALS:
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Stop here, if any rank was asked to. A run that has just made its last step ends by itself."""
        assert isinstance(pl_module, Algorithm)
        asked = torch.tensor(float(self._asked), device=pl_module.device)
        if not bool(pl_module.max_over_ranks(asked)) or trainer.global_step >= trainer.estimated_stepping_batches:
            return
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, Checkpoint):
                callback.save_now(trainer)
        # Lightning then logs the step, and ends all ranks at the same place.
        trainer._signal_connector.received_sigterm = True
