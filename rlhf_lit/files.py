"""Files and folders that a kill leaves whole, YAML that says one thing only, and paths as one would type them."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import yaml
from yaml import MappingNode, Node, ScalarNode, SequenceNode
from yaml.constructor import ConstructorError

from rlhf_lit.errors import UserError

MOST_VALUES = 100_000  # that the aliases of a YAML text may stand for


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


def write_json(path: Path, settings: Mapping[str, Any]) -> None:
    """Write settings as transformers writes its own: sorted, and indented by two."""
    text = json.dumps(settings, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")


def load_yaml(text: str, name: str) -> Any:
    """What a YAML text holds.

    Args:
        text: the text.
        name: what complaints begin with.

    Raises:
        UserError: no YAML, or what ``check_yaml`` refuses.
    """
    try:
        check_yaml(text)
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        what = getattr(error, "problem", None) or " ".join(str(error).split())
        no_yaml = "" if isinstance(error, Ambiguous) else "not YAML: "
        raise UserError(f"{name}{line}: {no_yaml}{what}") from error


class Ambiguous(ConstructorError):
    """YAML by its grammar that cannot be meant: a key twice, an alias inside of what it stands for."""


def check_yaml(text: str) -> None:
    """Refuse what PyYAML lets pass: of two equal keys it forgets one, and aliases may have no end.

    Raises:
        YAMLError: no YAML (by PyYAML), a key that is there twice, an alias that holds itself, aliases that stand for
            more than ``MOST_VALUES`` values, or lists nested without end.
    """
    try:
        # In Python: the composer in C is ended by the operating system where lists are nested too deep.
        root = yaml.compose(text, yaml.SafeLoader)
        if root is not None:
            _values(root, {}, set())
    except RecursionError as error:
        raise Ambiguous(None, None, "nested too deep", None) from error


def _values(node: Node, known: dict[int, int], above: set[int]) -> int:
    """How many values a node stands for, its aliases written out."""
    if isinstance(node, ScalarNode):
        return 1
    if id(node) in above:
        raise Ambiguous(None, None, "a value has an alias of itself inside of it", node.start_mark)
    if id(node) not in known:
        inner: list[Node] = []
        if isinstance(node, MappingNode):
            _check_keys(node)
            inner = [part for pair in node.value for part in pair]
        elif isinstance(node, SequenceNode):
            inner = node.value
        known[id(node)] = 1 + sum(_values(part, known, above | {id(node)}) for part in inner)
        if known[id(node)] > MOST_VALUES:
            what = f"its aliases stand for more than {MOST_VALUES} values"
            raise Ambiguous(None, None, what, node.start_mark)
    return known[id(node)]


def _check_keys(node: MappingNode) -> None:
    lines: dict[tuple[str, str], int] = {}
    for key, _ in node.value:
        if isinstance(key, ScalarNode):
            found = (key.tag, key.value)
            if found in lines:
                what = f"the key '{key.value}' is there twice, first in line {lines[found] + 1}; keep one"
                raise Ambiguous(None, None, what, key.start_mark)
            lines[found] = key.start_mark.line


def plain(value: Any) -> Any:
    """Tensors and the like as JSON numbers or lists; text for what is neither."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def short_path(path: Path) -> str:
    """Relative where that is how one would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
