"""What lies in a cache folder: a folder for each reference, ``<cache>/reference/<digest>/``."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lit.reference_cache import segments

ROOM = "reference"
DESCRIPTION = "reference.json"
LOCK = "building.lock"
# Age in seconds at which an unfinished file has nobody any more who would finish it.
ABANDONED = 3600.0
# What is written (a segment, a tokenised file, a description), and a name of the writer's own. Earlier versions left
# the first part or its suffix out.
_UNFINISHED = re.compile(r"([0-9a-f]{32}(\.arrow)?\.|reference\.json\.)?[0-9a-f]{32}\.partial")
_DIGEST = re.compile(r"[0-9a-f]{32}")


def folder_of(cache: Path, digest: str) -> Path:
    """Where the rows of a reference stand."""
    return cache / ROOM / digest


def segment_files(folder: Path) -> list[Path]:
    """The finished segments of a reference's folder, by name."""
    try:
        return sorted(file for file in folder.iterdir() if segments.NAME.fullmatch(file.name))
    except FileNotFoundError:
        return []


def unfinished(folder: Path) -> list[Path]:
    """Files that somebody writes, or wrote until a kill: segments, and in the cache itself tokenised files."""
    return sorted(file for file in folder.glob("*.partial") if _UNFINISHED.fullmatch(file.name))


def abandoned(folder: Path) -> Iterator[Path]:
    """Those that nobody writes any more."""
    for file in unfinished(folder):
        with suppress(FileNotFoundError):
            if time.time() - file.stat().st_mtime > ABANDONED:
                yield file


def description(folder: Path) -> dict[str, Any]:
    """What ``reference.json`` says; empty where it says nothing."""
    try:
        found = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@dataclass(frozen=True)
class StoredReference:
    """A reference with rows in a cache folder.

    Attributes:
        folder: its own, named by its digest.
        description: for people (see ``ReferenceIdentity``); empty where it cannot be read.
        rows: by the files' own account.
        size: bytes of its files.
        used: when a run last found it, in seconds since 1970.
    """

    folder: Path
    description: dict[str, Any]
    rows: int
    size: int
    used: float


def stored_references(cache: Path) -> Iterator[StoredReference]:
    """Every reference of a cache folder, by digest."""
    room = cache / ROOM
    if not room.is_dir():
        return
    for folder in sorted(room.iterdir()):
        if _DIGEST.fullmatch(folder.name) and folder.is_dir():
            files = segment_files(folder)
            marks = [file.stat() for file in (*files, folder / DESCRIPTION) if file.exists()]
            yield StoredReference(
                folder,
                description(folder),
                sum(map(segments.count_rows, files)),
                sum(mark.st_size for mark in marks),
                max((mark.st_mtime for mark in marks), default=folder.stat().st_mtime),
            )
