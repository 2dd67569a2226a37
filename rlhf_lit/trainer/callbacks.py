"""The callbacks that put files into a run's folder: checkpoints, records, samples, predictions, the exported model.

Each finds the folder in ``trainer.default_root_dir``, so each works from Python too.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import BasePredictionWriter, Callback, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback

from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.algorithms.reward_model import RewardModel
from rlhf_lit.errors import UserError, tell
from rlhf_lit.files import append_rows, atomic, remove, replace_file, short_path
from rlhf_lit.models.readback import difference
from rlhf_lit.models.saving import save_hf
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.rollout.record import RolloutRecord
from rlhf_lit.runs import CHECKPOINTS, EXPORT
from rlhf_lit.trainer.loggers import MetricsFile, WandB

PACKAGES = (
    "rlhf_lit", "torch", "lightning", "transformers", "peft", "bitsandbytes", "datasets", "tokenizers", "wandb",
    "torchmetrics", "jsonargparse", "numpy",
)  # fmt: skip


class Checkpoint(ModelCheckpoint):
    """The state of a run in ``checkpoints/``, with ``last.ckpt`` as a link to the newest (for ``--ckpt_path last``).

    To keep the best by a metric as well, add Lightning's ``ModelCheckpoint`` to ``trainer.callbacks``.

    Args:
        every_n_train_steps: save after this many optimizer steps (null: by epochs).
        every_n_epochs: save after this many epochs (null: each one, unless saving by steps).
        keep_all: keep every checkpoint instead of the newest alone.
    """

    def __init__(
        self, every_n_train_steps: int | None = None, every_n_epochs: int | None = None, keep_all: bool = False
    ) -> None:
        super().__init__(
            filename="step_{step:07.0f}",
            auto_insert_metric_name=False,
            save_last="link",  # a copy would double what each save costs
            save_top_k=-1 if keep_all else 1,
            every_n_train_steps=every_n_train_steps,
            every_n_epochs=every_n_epochs,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Save into the run's folder, wherever the loggers write."""
        self.dirpath = os.path.realpath(os.path.join(trainer.default_root_dir, CHECKPOINTS))
        super().setup(trainer, pl_module, stage)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last step is always saved, whatever the interval; again where training ended with more than that step."""
        if isinstance(pl_module, RewardModel) and pl_module.normalisation is not None:
            self._last_global_step_saved = -1
        self.save_now(trainer)

    def save_now(self, trainer: Trainer) -> None:
        """Save the step that was just made, unless that is done. On all ranks, or on none."""
        if not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)


class RunRecord(SaveConfigCallback):
    """The record of a run: ``config.yaml`` (resolved, runnable as it is) and ``versions.json``; never overwritten.

    Args:
        parser: of the subcommand.
        config: resolved.
        resumed: the run continues in its folder, whose records stay and get a numbered neighbour.
    """

    def __init__(self, parser: Any, config: Any, resumed: bool = False) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.resumed = resumed

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Called once, on rank zero, when the trainer is set up."""
        folder = Path(trainer.default_root_dir)
        suffix = ""
        if self.resumed:
            suffix = f"_resumed_{1 + len(list(folder.glob('config_resumed_*.yaml')))}"
        text = self.parser.dump(self.config, skip_none=False)
        with (folder / f"config{suffix}.yaml").open("x", encoding="utf-8") as file:
            file.write(text)
        with (folder / f"versions{suffix}.json").open("x", encoding="utf-8") as file:
            json.dump(environment(), file, indent=2)
        for logger in trainer.loggers:
            if not isinstance(logger, MetricsFile):
                logger.log_hyperparams(yaml.safe_load(text))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run repeats what came after its checkpoint: forget that part, so that each step stands once."""
        if not self.resumed:
            return
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.rewind(trainer.global_step)


def environment() -> dict[str, Any]:
    """Package versions, Python, hardware, the command, and the git commit where there is one."""
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = None
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "packages": packages,
        "hardware": {"platform": platform.platform(), "cpus": os.cpu_count(), "gpus": gpus, "cuda": torch.version.cuda},
        "commit": _commit(),
        "command": sys.argv,
    }


def _commit() -> str | None:
    """The commit of the source tree this package runs from; None for an installed copy or without git."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _trial(trainer: Trainer) -> bool:
    """``fast_dev_run``, which leaves no files."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]


class RolloutDump(Callback):
    """``rollouts/``: everything that PPO's, RLOO's and GRPO's rollouts were made of, to look at or to recompute from.

    Args:
        dump_rollouts: write one file per rollout and rank, which ``torch.load`` opens: tokens, masks, log-probs,
            scores, rewards, values, advantages and texts, by name.
    """

    def __init__(self, dump_rollouts: bool = False) -> None:
        self.dump_rollouts = dump_rollouts
        self._folder = Path()
        self._suffix = ""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All ranks write into rank zero's folder."""
        if not self.dump_rollouts or _trial(trainer):
            return
        if not isinstance(pl_module, OnPolicy):
            raise UserError(f"debug.dump_rollouts: {type(pl_module).__name__} makes no rollouts; leave it false")
        self._folder = Path(trainer.strategy.broadcast(trainer.default_root_dir), "rollouts")
        self._folder.mkdir(exist_ok=True)
        self._suffix = f".rank{trainer.global_rank}" if trainer.world_size > 1 else ""
        pl_module.on_rollout = self._write

    def _write(self, number: int, record: RolloutRecord) -> None:
        torch.save(record.contents(), self._folder / f"{number:06d}{self._suffix}.pt")


class SampleWriter(Callback):
    """``samples.jsonl``: what the model answers, after each validation and at the end of training."""

    def __init__(self) -> None:
        self._written: int | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A resumed run forgets the samples of the steps it repeats."""
        path = Path(trainer.default_root_dir, "samples.jsonl")
        if not trainer.is_global_zero or not trainer.ckpt_path or not path.is_file():
            return
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= trainer.global_step]
        replace_file(path, lambda file: file.writelines(kept))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After each validation."""
        self._write(trainer, pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a test."""
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """At the end of training, unless a validation has just shown this step."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        if trainer.sanity_checking or _trial(trainer) or self._written == trainer.global_step:
            return
        self._written = trainer.global_step
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            assert isinstance(module, Algorithm)
            samples = module.sample_completions()
        if not samples or not trainer.is_global_zero:
            return
        rows = [{"step": trainer.global_step, **sample} for sample in samples]
        append_rows(Path(trainer.default_root_dir, "samples.jsonl"), rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandB):
                logger.log_samples(rows, trainer.global_step)


class PredictionWriter(BasePredictionWriter):
    """``predictions.jsonl``: the rows that ``predict_step`` returns, one line each (a file per rank where several)."""

    def __init__(self) -> None:
        super().__init__(write_interval="batch")
        self.path: Path | None = None
        self.rows = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """All ranks write into rank zero's folder."""
        super().setup(trainer, pl_module, stage)
        if stage == "predict":
            folder = trainer.strategy.broadcast(trainer.default_root_dir)
            rank = "" if trainer.is_global_zero else f".rank{trainer.global_rank}"
            self.path = Path(folder, f"predictions{rank}.jsonl")

    def write_on_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Lightning calls this with what ``predict_step`` returned."""
        assert self.path is not None
        append_rows(self.path, prediction)
        self.rows += len(prediction)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say where they are."""
        if trainer.is_global_zero and self.path is not None:
            others = f", and a file for each of {trainer.world_size - 1} other ranks" if trainer.world_size > 1 else ""
            tell(f"{self.rows} predictions in {short_path(self.path)}{others}")


class HFExport(Callback):
    """``hf/`` at the end of ``fit``: what plain transformers or peft load, and what the next stage takes."""

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Not reached when training was interrupted by an exception.

        Raises:
            UserError: what was written is not the model in memory. It then lies in ``hf.refused``, and no ``hf`` is
                there for a later stage to take for it.
        """
        if not _trial(trainer):
            assert isinstance(pl_module, Algorithm)
            self._export(trainer, pl_module, Path(trainer.default_root_dir, EXPORT))
        trainer.strategy.barrier("hf export")

    def _export(self, trainer: Trainer, module: Algorithm, folder: Path) -> None:
        weights = sharding_of(module.trained_model).whole_weights(keep=trainer.is_global_zero)
        # A kill leaves no half model where later runs look.
        with atomic(folder) if trainer.is_global_zero else nullcontext() as partial:
            if partial is not None:
                save_hf(module, partial, weights)
            fault = trainer.strategy.broadcast(difference(module.trained_model, partial))
            if fault is None:
                return
            refused = folder.with_name(f"{folder.name}.refused")
            if partial is not None:
                remove(refused)
                partial.rename(refused)
            raise UserError(
                f"{short_path(refused)}: what was saved is not the model that was trained: {fault}. The checkpoint "
                "holds the trained weights; please report this"
            )
