"""Callbacks that kill a rank with SIGKILL in the middle of something, or send it a signal, at a known step."""

from __future__ import annotations

import io
import os
import signal
import time
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from rlhf_lit.training import checkpoint as checkpoint_io


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DieIn(Callback):
    """Rank ``rank`` dies in its step, in its rollout, or as a checkpoint is written, once ``step`` steps are done.

    Rank zero dies with half a checkpoint written; another rank, while rank zero writes it. Where it dies in a rollout,
    the others stay in theirs for two minutes, in no collective.
    """

    def __init__(self, place: str, step: int, rank: int) -> None:
        self.place = place
        self.step = step
        self.rank = rank

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.place == "rollout":
            respond = pl_module.respond

            def respond_or_die(*arguments: Any, **options: Any) -> Any:
                answers = respond(*arguments, **options)
                if trainer.global_step >= self.step and trainer.training:
                    if trainer.global_rank == self.rank:
                        die()
                    time.sleep(120)
                return answers

            pl_module.respond = respond_or_die
        elif self.place == "checkpoint" and trainer.is_global_zero:
            checkpoint_io.torch = _HalfSaving(self, trainer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if (self.place, self.rank) == ("step", trainer.global_rank) and trainer.global_step == self.step:
            die()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        mine = (self.place, self.rank) == ("checkpoint", trainer.global_rank)
        if mine and trainer.global_rank and trainer.global_step >= self.step:
            die()


class _HalfSaving:
    """``torch`` as the writer of checkpoints sees it: what it saves comes to a halt half-way."""

    def __init__(self, fault: DieIn, trainer: Trainer) -> None:
        self.fault = fault
        self.trainer = trainer

    def save(self, state: Any, file: Any) -> None:
        if self.trainer.global_step < self.fault.step:
            torch.save(state, file)
            return
        whole = io.BytesIO()
        torch.save(state, whole)
        file.write(whole.getvalue()[: len(whole.getvalue()) // 2])
        file.flush()
        if not self.fault.rank:
            die()
        time.sleep(120)


class SignalIn(Callback):
    """These ranks send themselves a signal in the middle of a step, once ``step`` steps are done."""

    def __init__(self, number: int, step: int, ranks: list[int]) -> None:
        self.number = number
        self.step = step
        self.ranks = ranks

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if trainer.global_step == self.step and trainer.global_rank in self.ranks:
            os.kill(os.getpid(), self.number)
