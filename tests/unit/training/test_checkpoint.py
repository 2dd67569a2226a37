"""Checkpoints that are whole or not there."""

import os
from pathlib import Path

import pytest
import torch

from rlhf_lit.training import checkpoint as checkpoint_io
from rlhf_lit.training.checkpoint import WholeFiles


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    """And nothing of its own."""
    path = tmp_path / "checkpoints" / "step.ckpt"
    WholeFiles().save_checkpoint({"step": torch.tensor(1)}, path)

    def half(state, file):
        file.write(b"PK half of it")
        raise OSError("no space left on device")

    with monkeypatch.context() as broken:
        broken.setattr(checkpoint_io.torch, "save", half)
        with pytest.raises(OSError, match="no space"):
            WholeFiles().save_checkpoint({"step": torch.tensor(2)}, path)
    assert torch.load(path, weights_only=True) == {"step": torch.tensor(1)}
    assert [file.name for file in path.parent.iterdir()] == ["step.ckpt"]


def test_the_next_write_clears_away_what_a_kill_left(tmp_path):
    path = tmp_path / "checkpoints" / "step.ckpt"
    WholeFiles().save_checkpoint({"step": torch.tensor(1)}, path)
    path.with_name("step_killed.ckpt.partial").write_bytes(b"PK half of it")
    other = path.with_name("other.ckpt")
    WholeFiles().save_checkpoint({"step": torch.tensor(3)}, str(other))
    assert torch.load(other, weights_only=True) == {"step": torch.tensor(3)}
    assert sorted(file.name for file in path.parent.iterdir()) == ["other.ckpt", "step.ckpt"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (done.append("fsync"), sync(handle)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append(Path(b).name), replace(a, b)))
    WholeFiles().save_checkpoint({}, tmp_path / "a.ckpt")
    assert done == ["fsync", "a.ckpt", "fsync"], "the file, its name, and the folder that holds the name"
