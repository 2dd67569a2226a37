"""Files that a kill leaves whole, and paths as one would type them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def replace_file(path: Path, write: Callable[[Any], None]) -> None:
    """Rewrite a text file so that a kill leaves either the old one or the new one, never half of it."""
    temporary = path.with_name(path.name + ".new")
    with temporary.open("w", encoding="utf-8", newline="") as file:
        write(file)
    os.replace(temporary, path)


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
