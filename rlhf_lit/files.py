"""Files and folders that a kill leaves whole, and paths as one would type them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4


@contextmanager
def atomic(path: Path, durable: bool = False, shared: bool = False) -> Iterator[Path]:
    """A place beside ``path`` to write a file or a folder to, which takes ``path``'s name once it is whole.

    A kill, or an error inside the block, leaves ``path`` as it was; an error removes the unfinished ``*.partial``, and
    what a kill left of it goes when the same path is next written. A folder that stands at ``path`` is replaced.

    Args:
        path: the file or folder to be.
        durable: wait for the disk, so that this holds for a machine that stops as well (files alone).
        shared: other processes may write the same path at the same time: each writes under a name of its own, and the
            last one to finish stays.

    Raises:
        OSError: it cannot be written there.
    """
    # Not a name by torch's or Python's generator: writing a file changes no random number.
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial" if shared else f"{path.name}.partial")
    remove(partial)
    try:
        yield partial
        if durable:
            _sync(partial, os.O_RDONLY)
        _put(partial, path)
        if durable and hasattr(os, "O_DIRECTORY"):
            _sync(path.parent, os.O_DIRECTORY)  # the folder holds the name
    finally:
        remove(partial)


def _put(partial: Path, path: Path) -> None:
    """Rename, also over a folder with something in it, which the system refuses."""
    if not (path.is_dir() and partial.is_dir() and any(path.iterdir())):
        os.replace(partial, path)
        return
    earlier = path.with_name(f"{path.name}.{uuid4().hex}.earlier.partial")
    os.replace(path, earlier)
    try:
        os.replace(partial, path)
    except BaseException:
        os.replace(earlier, path)
        raise
    remove(earlier)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: Path, write: Callable[[Any], None]) -> None:
    """Rewrite a text file so that a kill leaves either the old one or the new one, never half of it."""
    with atomic(path) as partial, partial.open("w", encoding="utf-8", newline="") as file:
        write(file)


def append_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a JSON Lines file."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False, default=plain) + "\n" for row in rows)


def plain(value: Any) -> Any:
    """Tensors and the like as JSON numbers or lists; text for what is neither."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def short_path(path: Path) -> str:
    """Relative where that is how one would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
