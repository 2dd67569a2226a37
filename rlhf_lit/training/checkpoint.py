"""Checkpoints: files that are whole or not there at all, and what one must hold to be continued."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn

from rlhf_lit.errors import UserError


class WholeFiles(TorchCheckpointIO):
    """Writes beside a checkpoint's place, waits for the disk, and renames.

    Lightning's own writer fills the system's temporary folder, from where a file comes to a run's by being copied
    wherever that is another file system, and a kill leaves the copy cut short under the checkpoint's name. It also
    holds a second copy of the state in memory meanwhile.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        """A kill, or a machine that stops, leaves the files that were there before, or this one as well.

        Args:
            checkpoint: the state.
            path: where to; on another machine (``s3://…``) Lightning's own writer is right.
            storage_options: see Lightning's.
        """
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for partial in target.parent.glob("*.ckpt.partial"):  # of a process that was killed here
            partial.unlink()
        partial = target.with_name(f"{target.name}.partial")
        with partial.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, target)
        _settle(target.parent)


def _settle(folder: Path) -> None:
    """Wait until the disk knows the name too, where a folder can be asked for that."""
    if hasattr(os, "O_DIRECTORY"):
        handle = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def keep_trained(algorithm: Any, checkpoint: dict[str, Any]) -> None:
    """Keep what moves in training (a LoRA run's checkpoint is megabytes), and what the run began from."""
    names = algorithm.saved_names()
    checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in names}
    checkpoint["base"] = algorithm.base.address


def require_fitting(algorithm: Any, checkpoint: dict[str, Any]) -> None:
    """Refuse what ``strict_loading=False`` would take for a checkpoint and load nothing, or a part, of.

    Args:
        algorithm: with its models built.
        checkpoint: as it was read.

    Raises:
        UserError: other trainable weights than this model's; or a run to be continued began from another version of its
            base (a run name means its newest), which would change the frozen weights and the reference.
    """
    fitting = algorithm._trainer is not None and algorithm.trainer.state.fn == TrainerFn.FITTING
    if fitting and checkpoint["base"] != algorithm.base.address:
        raise UserError(
            f"--ckpt_path: this run began from {checkpoint['base']}, but model.base.name now means "
            f"{algorithm.base.address}; name the first one to continue it"
        )
    saved, names = set(checkpoint["state_dict"]), algorithm.saved_names()
    if saved != names:
        missing, strange = sorted(names - saved), sorted(saved - names)
        found = f"it lacks {missing[0]}" if missing else f"it holds {strange[0]}"
        raise UserError(
            f"--ckpt_path: the checkpoint is of another model or another base.lora: {found}, and "
            f"{len(missing) + len(strange) - 1} more names differ"
        )


def restore_loader(fit_loop: Any) -> None:
    """Hand the training loader the state that a checkpoint holds.

    `configure_optimizers` asks for the number of steps, which makes Lightning set the training loader up before it
    reads the checkpoint; it then never hands the loader its state, and mid-epoch batches would be repeated. Nor does it
    after a whole epoch, which is no restart to it: a longer run would begin with the first epoch's.
    """
    if fit_loop._combined_loader is not None and fit_loop._combined_loader_states_to_load:
        fit_loop._combined_loader._load_state_dicts(fit_loop._combined_loader_states_to_load)
        fit_loop._combined_loader_states_to_load = []
