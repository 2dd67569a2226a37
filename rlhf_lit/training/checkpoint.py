"""Checkpoints: files that are whole or not there at all, and what one must hold to be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from rlhf_lit.errors import UserError
from rlhf_lit.files import atomic


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
        for left in target.parent.glob("*.ckpt.partial"):  # by a process that was killed here, under any step's name
            left.unlink()
        with atomic(target, durable=True) as partial, partial.open("wb") as file:
            torch.save(checkpoint, file)


def keep_trained(checkpoint: dict[str, Any], names: set[str]) -> None:
    """Keep the named weights only: those that move in training, so that a LoRA run's checkpoint is megabytes."""
    checkpoint["state_dict"] = {name: value for name, value in checkpoint["state_dict"].items() if name in names}


def require_fitting(checkpoint: dict[str, Any], names: set[str]) -> None:
    """Refuse what ``strict_loading=False`` would take for a checkpoint and load nothing, or a part, of.

    Args:
        checkpoint: as it was read.
        names: of the weights that this model's checkpoints hold.

    Raises:
        UserError: it holds other weights.
    """
    saved = set(checkpoint["state_dict"])
    if saved != names:
        missing, strange = sorted(names - saved), sorted(saved - names)
        found = f"it lacks {missing[0]}" if missing else f"it holds {strange[0]}"
        raise UserError(
            f"--ckpt_path: the checkpoint is of another model or another base.lora: {found}, and "
            f"{len(missing) + len(strange) - 1} more names differ"
        )


def require_same_base(checkpoint: dict[str, Any], address: str) -> None:
    """Refuse to continue a run from another version of its base.

    A run name means its newest version, which would change the frozen weights and the reference.

    Args:
        checkpoint: as it was read.
        address: of this run's base.

    Raises:
        UserError: the checkpoint's run began from another one.
    """
    if checkpoint["base"] != address:
        raise UserError(
            f"--ckpt_path: this run began from {checkpoint['base']}, but model.base.name now means {address}; name the "
            "first one to continue it"
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
