"""Run folders: ``runs/<name>/version_<n>/``, how one is made, and how a name on the command line finds one again.

Light on purpose (the standard library alone): model loading, the chat and the command line all ask here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from zipfile import is_zipfile

from rlhf_lit.errors import UserError

PLAYGROUND = "playground"
CHECKPOINTS = "checkpoints"
EXPORT = "hf"
_NAME = re.compile(r"[A-Za-z0-9][\w.+=-]*(/[A-Za-z0-9][\w.+=-]*)*")


def versions(parent: Path) -> Iterator[Path]:
    """The ``version_<n>`` folders of one run name, newest (highest number) first."""
    if not parent.is_dir():
        return
    numbered = [
        (int(entry.name.removeprefix("version_")), entry)
        for entry in parent.iterdir()
        if entry.is_dir() and entry.name.removeprefix("version_").isdecimal() and entry.name.startswith("version_")
    ]
    for _, entry in sorted(numbered, reverse=True):
        yield entry


def run_parent(root: str | os.PathLike[str], name: str) -> Path:
    """``root/name``; ``name`` may hold slashes (``quickstart/sft``) but cannot leave ``root``.

    Raises:
        UserError: a name that is empty, absolute, or has parts that are not plain words.
    """
    if not _NAME.fullmatch(name):
        raise UserError(f"name: {name!r} is no run name: use letters, digits and . _ - + =, with / between folders")
    return Path(root) / name


def new_run(root: str | os.PathLike[str], name: str) -> Path:
    """Make the next ``version_<n>`` folder of a run; two processes that ask at once get two folders.

    Raises:
        UserError: a bad name, or a place where no folder can be made.
    """
    parent = run_parent(root, name)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        number = max((int(v.name.removeprefix("version_")) for v in versions(parent)), default=-1) + 1
        while True:
            folder = parent / f"version_{number}"
            try:
                folder.mkdir()
            except FileExistsError:  # another process was faster
                number += 1
            else:
                return folder
    except OSError as error:
        raise UserError(f"runs: cannot make a run folder in {parent}: {error.strerror or error}") from error


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint to continue a run from: ``last.ckpt`` where it stands, else the youngest one, else None.

    ``last.ckpt`` is a link that a kill can leave pointing at a file just removed, hence the second choice.
    """
    folder = run / CHECKPOINTS
    last = folder / "last.ckpt"
    if last.exists() and _is_whole(last):
        return last.resolve()
    found = [path for path in folder.glob("*.ckpt") if path.exists() and _is_whole(path)]
    return max(found, key=lambda path: (path.stat().st_mtime_ns, path.name), default=None)


def _is_whole(checkpoint: Path) -> bool:
    """A checkpoint file is a zip archive whose end is written last; a sharded one is a folder with its own index."""
    return (checkpoint / ".metadata").is_file() if checkpoint.is_dir() else is_zipfile(checkpoint)


def has_checkpoint(parent: Path) -> bool:
    """Whether ``last`` finds one among the versions of a run name."""
    return any(newest_checkpoint(run) for run in versions(parent))


def resolve_checkpoint(ckpt_path: str, root: str | os.PathLike[str], name: str) -> Path:
    """The checkpoint that ``--ckpt_path`` names: ``last`` (of this run name), a file, a run folder, or all
    versions of a run, of which it is the newest that has one.

    Raises:
        UserError: no such checkpoint.
    """
    if ckpt_path == "last":
        parent = run_parent(root, name)
        for run in versions(parent):
            if checkpoint := newest_checkpoint(run):
                return checkpoint
        raise UserError(f"--ckpt_path last: no run under {parent} has a checkpoint; leave it out to start afresh")
    path = Path(ckpt_path)
    if not path.exists():
        raise UserError(f"--ckpt_path {ckpt_path}: no such checkpoint")
    runs = [path] if (path / CHECKPOINTS).is_dir() else list(versions(path))
    if runs:
        found = next((checkpoint for run in runs if (checkpoint := newest_checkpoint(run))), None)
        if found is None:
            raise UserError(f"--ckpt_path {ckpt_path}: this run folder has no checkpoint")
        return found
    if not _is_whole(path):
        raise UserError(f"--ckpt_path {ckpt_path}: not a checkpoint, or cut short")
    return path


def resolve_model(name: str) -> str:
    """What a model's name means, as something ``from_pretrained`` takes.

    ``playground`` stays as it is; a run folder gives its ``hf/``; ``runs/<name>`` gives the newest version that has
    one; a folder with a model or an adapter gives itself; whatever else does not look like a path is a hub name.

    Raises:
        UserError: a path that does not exist, or a folder without a model in it.
    """
    if name == PLAYGROUND:
        return name
    if not name.strip():
        raise UserError("base.name is empty: give a hub name, a folder, or an earlier run")
    path = Path(name).expanduser()
    if path.is_dir():
        if _holds_model(path):
            return str(path)
        for run in (path, *versions(path)):
            if _holds_model(run / EXPORT):
                return str(run / EXPORT)
        raise UserError(f"{name}: no model in this folder (no config.json or adapter_config.json, no run with an hf/)")
    if path.is_file():
        raise UserError(f"{name} is a file: a model is a folder (a run, or its hf/) or a hub name")
    if _looks_like_path(name, path):
        raise UserError(f"{name}: no such model folder")
    return name


def _holds_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()


def _looks_like_path(name: str, path: Path) -> bool:
    """A hub name has at most one slash, and its first half is no folder here."""
    if name.startswith((".", "/", "~", "runs/")) or name.count("/") > 1 or "\\" in name:
        return True
    return "/" in name and path.parent.is_dir()
