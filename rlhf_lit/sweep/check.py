"""Resolved configurations of a sweep's arms: as plain values that a file can hold, and the first difference of two."""

from __future__ import annotations

from typing import Any

from jsonargparse import Namespace

ITS_OWN = ("name", "runs", "ckpt_path", "config")
"""Keys that say where an arm's run and its configs stand, not what it computes."""

Resolved = dict[str, Any]


def as_plain(config: Namespace) -> Resolved:
    """A resolved configuration as JSON could hold it, without the keys that tell where it stands."""
    return {key: _plain(value) for key, value in config.as_dict().items() if key not in ITS_OWN}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def difference(before: Any, after: Any, path: str = "") -> str | None:
    """The first dotted key at which two resolved configurations differ, with both values; None where they agree."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            inner = path if key == "init_args" else f"{path}.{key}".lstrip(".")
            if found := difference(before.get(key), after.get(key), inner):
                return found
        return None
    return None if before == after else f"{path}: {before!r} → {after!r}"
