"""The report's folder: made beside its place, then put there as a whole."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlhf_lit.errors import UserError
from rlhf_lit.files import atomic, short_path

PAGE = "report.html"
FIGURES = "figures"
OURS = (PAGE, "report.csv", "arms.csv", FIGURES)


def check_place(folder: Path) -> None:
    """Refuse a place whose contents are not a report's, since they would be gone.

    Raises:
        UserError: such a place.
    """
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--out {short_path(folder)}: is a file; name a folder")
    others = [entry.name for entry in folder.iterdir() if entry.name not in OURS]
    pictures = folder / FIGURES
    if pictures.is_dir():
        others += [f"{FIGURES}/{entry.name}" for entry in pictures.iterdir() if entry.suffix not in (".png", ".svg")]
    if others:
        raise UserError(
            f"--out {short_path(folder)}: {sorted(others)[0]} in it is not a report's; name a new folder, or that of "
            "an earlier report"
        )


def write(folder: Path, contents: Mapping[str, bytes]) -> None:
    """Put a report in its place; an earlier one stays whole until then.

    Args:
        folder: absolute.
        contents: by path within the folder.

    Raises:
        UserError: it cannot be written there.
    """
    check_place(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with atomic(folder, shared=True) as fresh:
            fresh.mkdir()
            for name, content in contents.items():
                file = fresh / name
                file.parent.mkdir(exist_ok=True)
                file.write_bytes(content)
    except OSError as error:
        raise UserError(f"--out {short_path(folder)}: cannot be written: {error.strerror or error}") from error
