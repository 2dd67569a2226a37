"""The watch over the other ranks, and the check that they are set up alike, as one callback."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException

from rlhf_lit.data.text_module import TextDataModule
from rlhf_lit.errors import UserError, say
from rlhf_lit.parallel.faults import RANK_LOST, how_to_go_on, is_lost_connection
from rlhf_lit.parallel.same_setup import Facts, difference, facts_of
from rlhf_lit.parallel.watch import GRACE, Loss, Watch


class Ranks(Callback):
    """Nothing on one rank. On several: a rank that is killed or fails ends the others, with one line; ranks that were
    given different configurations, rows or packages end with one line before the models are built.

    Args:
        config: of the command, resolved, as plain values.

    Raises:
        UserError: ranks differ (on rank zero; the others end with the same status and say nothing).
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = config
        self._watch: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """After the data module has read its rows, and before models are built."""
        if trainer.world_size == 1:
            return
        self._start_watch(trainer)
        datamodule: Any = getattr(trainer, "datamodule", None)
        rows = datamodule.identities if isinstance(datamodule, TextDataModule) else {}
        ranks: list[Facts] = [{}] * trainer.world_size
        torch.distributed.all_gather_object(ranks, facts_of(self.config, rows))
        if line := difference(ranks):
            raise UserError(line) if trainer.is_global_zero else SystemExit(2)

    def _start_watch(self, trainer: Trainer) -> None:
        rank, world = trainer.global_rank, trainer.world_size
        folder = Path(trainer.strategy.broadcast(trainer.default_root_dir))
        fitting = trainer.state.fn == TrainerFn.FITTING

        def end(loss: Loss) -> None:
            """Without unwinding: the main thread may sit in a collective that never ends."""
            if loss.rank is not None:
                words = {"killed": "was killed or lost its machine", "failed": "ended with an error, which it reported"}
                rest = f"; {how_to_go_on(folder)}" if fitting else ""
                os.write(2, f"error: rank {loss.rank} of {world} {words[loss.how]}{rest}\n".encode())
            os._exit(RANK_LOST)

        self._watch = Watch(rank, world, trainer.strategy.broadcast, end)
        if self._watch.unwatched:
            say(
                f"warning: rank {rank} has no connection to watch rank(s) {self._watch.unwatched} by; a rank that dies "
                "shows in the next collective alone",
                every_rank=True,
            )
        for thread in threading.enumerate():
            # Lightning's own watch kills the main process, without a word, when another one ends with an error.
            if isinstance(thread, _ChildProcessObserver):
                thread._child_processes = []

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """The first that hears of an error; it may come from a lost rank, which the watch knows better."""
        if self._watch is None:
            return
        if is_lost_connection(exception):
            self._watch.wait_for_verdict(2 * GRACE)
        self._watch.leave(failed=not isinstance(exception, SIGTERMException))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """This rank is done."""
        if self._watch is not None:
            self._watch.leave(failed=False)
