"""Which files of a folder are rows, and of which split."""

from __future__ import annotations

import re
from pathlib import Path

from rlhf_lit.data.formats import READERS, kind_of
from rlhf_lit.errors import UserError

SAVED = ("state.json", "dataset_dict.json")  # one of them is in what `save_to_disk` of `datasets` wrote
# What stands beside the rows and is none of them.
_BESIDE = re.compile(r"(?:readme|licen[cs]e|notice|citation|source)(?:\.\w+)?|dataset_infos?\.json", re.IGNORECASE)
_NAMES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_SHARD = re.compile(r"(?P<split>\w+)-\d{5}-of-\d{5}\.")
_SPLIT = re.compile(r"(?P<name>[^\[\]]+)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?")


def part_of(split: str | None, path: str) -> tuple[str | None, int, int | None]:
    """(name, first row, row after the last) of ``train[10:20]``.

    Raises:
        UserError: another way to say which rows.
    """
    if split is None:
        return None, 0, None
    match = _SPLIT.fullmatch(split)
    if match is None:
        raise UserError(f"{path}: split '{split}': of a folder, rows are named as in 'train[10:20]'")
    return match["name"], int(match["start"] or 0), int(match["stop"]) if match["stop"] else None


def files_of(folder: Path, split: str | None) -> list[Path]:
    """The files of a split by name, those of folders inside included; all files where ``split`` is None.

    A file belongs to the split that its name (or its folder's) has in it, as `datasets` takes it; where no name has
    one, all of them are ``train``. Hidden files and what stands beside the rows, such as a README, are passed over.

    Raises:
        UserError: a file of a kind that we cannot read, or of no split beside others that have one; no such split; no
            file.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file() and not _is_beside(path, folder))
    if not found:
        raise UserError(f"{folder} has no files with rows; known are {', '.join(READERS)}")
    for path in found:
        if kind_of(path.name) not in READERS:
            raise UserError(
                f"{folder}: {path.relative_to(folder)} is of no kind that can be read ({', '.join(READERS)}); move it "
                "elsewhere"
            )
    if split is None:
        return found
    splits = {path: split_of(path.relative_to(folder)) for path in found}
    if not any(splits.values()):
        splits = dict.fromkeys(found, "train")
    for path, own in splits.items():
        if own is None:
            raise UserError(
                f"{folder}: {path.relative_to(folder)} says no split by its name, and other files do; rename it, or "
                "set split: null to read all of them"
            )
    chosen = [path for path in found if splits[path] == split]
    if not chosen:
        raise UserError(
            f"{folder} has no split '{split}'; its files are {', '.join(sorted(set(map(str, splits.values()))))}"
        )
    return chosen


def split_of(path: Path) -> str | None:
    """The split that a file's name says, else that of its folder; None where neither does."""
    if match := _SHARD.match(path.name):
        return match["split"]
    for name in reversed(path.parts):
        words = set(re.split(r"[ ._/\-\d]+", name.lower()))
        for split, known in _NAMES.items():
            if words & set(known):
                return split
    return None


def _is_beside(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    return any(part.startswith((".", "_")) for part in parts) or _BESIDE.fullmatch(path.name) is not None
