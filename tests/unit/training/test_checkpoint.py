"""Checkpoints that are whole or not there."""

from pathlib import Path

import pytest
import torch

from rlhf_lit.training import checkpoint as checkpoint_io
from rlhf_lit.training.checkpoint import WholeFiles


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path, monkeypatch):
    """And the next one clears away what it left."""
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
    assert len(list(path.parent.iterdir())) == 2
    other = path.with_name("other.ckpt")
    WholeFiles().save_checkpoint({"step": torch.tensor(3)}, str(other))
    assert torch.load(other, weights_only=True) == {"step": torch.tensor(3)}
    assert sorted(file.name for file in path.parent.iterdir()) == ["other.ckpt", "step.ckpt"]


def test_the_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done: list[str] = []
    sync, replace = checkpoint_io.os.fsync, checkpoint_io.os.replace
    monkeypatch.setattr(checkpoint_io.os, "fsync", lambda handle: (done.append("fsync"), sync(handle)))
    monkeypatch.setattr(checkpoint_io.os, "replace", lambda a, b: (done.append(Path(b).name), replace(a, b)))
    WholeFiles().save_checkpoint({}, tmp_path / "a.ckpt")
    assert done == ["fsync", "a.ckpt", "fsync"], "the file, its name, and the folder that holds the name"
