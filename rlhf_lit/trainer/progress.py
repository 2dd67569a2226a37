"""Progress of a run on the terminal, and the line it ends with."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar, RichProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.markup import escape

from rlhf_lit.errors import is_live, printable, tell
from rlhf_lit.files import short_path
from rlhf_lit.runs import EXPORT


def progress_bar() -> ProgressBar:
    """A live bar on a terminal; a line now and then in CI, in a file or in a pipe."""
    return LiveProgress() if is_live(sys.stdout) else PlainProgress()


def _number(value: Any) -> str:
    """In few characters."""
    number = float(value)
    return f"{number:.4g}" if abs(number) < 1e4 else f"{number:,.0f}"


class LiveProgress(RichProgressBar):
    """Rich's bar with what the algorithm marked for it (loss, reward, KL, tokens per second)."""

    def __init__(self) -> None:
        super().__init__(refresh_rate=1, leave=False)

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """The step's own, in few characters; what validation found is printed when it is found."""
        metrics = training_metrics(trainer)
        return {name.rsplit("/", 1)[-1]: _number(value) for name, value in metrics.items()}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Above the bar, a line that stays."""
        super().on_validation_end(trainer, pl_module)
        if trainer.state.fn == TrainerFn.FITTING and self.is_enabled and not trainer.sanity_checking:
            self.print(escape(printable(progress_line(trainer, validation_metrics(trainer)))))


class PlainProgress(ProgressBar):
    """A line of text every ``seconds`` and after each validation.

    Args:
        seconds: least time between two lines of training.
    """

    def __init__(self, seconds: float = 15.0) -> None:
        super().__init__()
        self.seconds = seconds
        self._enabled = True
        self._said = 0.0

    def disable(self) -> None:
        """What Lightning calls on the ranks that stay silent."""
        self._enabled = False

    def enable(self) -> None:
        """Speak (again)."""
        self._enabled = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first line is due after ``seconds``, not at once."""
        self._said = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Say where training stands, if it is time."""
        now = time.monotonic()
        if now - self._said >= self.seconds:
            self._said = now
            self._say(trainer, training_metrics(trainer))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what validation found; the commands other than ``fit`` print a table of their own."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._say(trainer, validation_metrics(trainer))

    def _say(self, trainer: Trainer, metrics: Mapping[str, Any]) -> None:
        if self._enabled and not trainer.sanity_checking:
            tell(progress_line(trainer, metrics))


def progress_line(trainer: Trainer, metrics: Mapping[str, Any]) -> str:
    """Where training stands, and some numbers."""
    total = trainer.estimated_stepping_batches
    steps = f"{trainer.global_step}/{total:.0f}" if total != float("inf") else f"{trainer.global_step}"
    parts = [f"{name} {_number(value)}" for name, value in metrics.items()]
    return " · ".join([f"epoch {trainer.current_epoch}", f"step {steps}", *parts])


def note_on_length(trainer: Mapping[str, Any], data: Mapping[str, Any]) -> str | None:
    """What to say where nobody said how long the run is, and Lightning makes it a thousand epochs.

    Args:
        trainer: the trainer's settings.
        data: the data module's arguments.
    """
    named = (trainer["max_epochs"], trainer["max_time"], data.get("episodes"))
    if any(value is not None for value in named) or trainer["max_steps"] != -1:
        return None
    return "neither trainer.max_epochs nor trainer.max_steps is set: the run has 1000 epochs, unless it is ended before"


def training_metrics(trainer: Trainer) -> dict[str, Any]:
    """What the last step logged and the algorithm marked for people to see (loss, reward, KL, tokens per second)."""
    return {name: value for name, value in trainer.progress_bar_metrics.items() if not name.startswith("val/")}


def validation_metrics(trainer: Trainer) -> dict[str, Any]:
    """What the last validation found and the algorithm marked for people to see."""
    return {name: value for name, value in trainer.progress_bar_metrics.items() if name.startswith("val/")}


def closing_line(trainer: Trainer) -> str:
    """Where a finished run stands, and the last value of what it validated (or trained) by."""
    folder = Path(trainer.default_root_dir)
    shown = validation_metrics(trainer) or training_metrics(trainer)
    parts = [f"run {short_path(folder)}"]
    if (folder / EXPORT).is_dir():
        parts.append(f"model {short_path(folder / EXPORT)}")
    parts += [f"{name} {_number(value)}" for name, value in sorted(shown.items())]
    return " · ".join(parts)
