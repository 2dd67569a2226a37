"""Checkpoint files that are whole or not there at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO


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
