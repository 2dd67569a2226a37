"""``cache``: what the cache folder holds, and clearing it."""

from __future__ import annotations

import re
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from filelock import FileLock, Timeout
from rich.filesize import decimal

from rlhf_lit.commands.training import Parser
from rlhf_lit.errors import UserError, printable, tell
from rlhf_lit.reference_cache import catalogue
from rlhf_lit.reference_cache.catalogue import StoredReference

DEFAULT = "~/.cache/rlhf_lit"
# Digits of a digest that are shown.
SHOWN = 12
_TOKENS = re.compile(r"[0-9a-f]{32}\.arrow")


def show(cache: str = DEFAULT) -> None:
    """Print what a cache folder holds.

    Args:
        cache: the folder, as in `data.cache`.

    Raises:
        UserError: it is no folder.
    """
    folder = _folder(cache)
    tokens = [file.stat() for file in _token_files(folder)]
    references = list(catalogue.stored_references(folder))
    if not tokens and not references:
        tell(f"nothing is cached in {folder}")
        return
    total = sum(file.st_size for file in tokens)
    if tokens:
        used = _date(max(file.st_mtime for file in tokens))
        tell(f"{_count(len(tokens), 'tokenised file')}, {decimal(total)}, the last of {used}")
    if references:
        _print_references(references)
        total += sum(stored.size for stored in references)
    tell(f"{decimal(total)} in {folder}")


def clear(
    reference: str | None = None, tokens: bool = False, references: bool = False, cache: str = DEFAULT
) -> tuple[int, int]:
    """Remove what is named, or everything where nothing is. Only files that this package writes are removed.

    Args:
        reference: the first digits of a reference's digest.
        tokens: the tokenised files.
        references: the log-probs of all references.
        cache: the folder.

    Returns:
        The number of files and of bytes that were removed.

    Raises:
        UserError: no reference, or more than one, whose digest starts so; or files that may not be removed.
    """
    folder = _folder(cache)
    everything = reference is None and not (tokens or references)
    chosen = list(catalogue.stored_references(folder))
    if reference is not None and not references:
        chosen = [_named(reference, chosen, folder)]
    elif not (references or everything):
        chosen = []
    files = size = 0
    try:
        if tokens or everything:
            files, size = _remove([*_token_files(folder), *catalogue.abandoned(folder)])
        for stored in chosen:
            removed = _remove_reference(stored.folder)
            files, size = files + removed[0], size + removed[1]
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be removed: {error.strerror}") from None
    tell(f"removed {_count(files, 'file')}, {decimal(size)}, from {folder}")
    return files, size


def _folder(cache: str) -> Path:
    folder = Path(cache).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--cache {cache}: not a folder")
    return folder


def _token_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.arrow") if _TOKENS.fullmatch(file.name))


def _named(prefix: str, stored: list[StoredReference], folder: Path) -> StoredReference:
    found = [one for one in stored if prefix and one.folder.name.startswith(prefix)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(one.folder.name[:SHOWN] for one in found or stored) or "none"
    if found:
        raise UserError(f"--reference {prefix}: {len(found)} references start so ({names}); give more digits")
    raise UserError(f"--reference {prefix}: no such reference in {folder}; there are: {names}")


def _remove_reference(folder: Path) -> tuple[int, int]:
    """A reference's own files, and its folder where nothing else is in it."""
    lock = FileLock(folder / catalogue.LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        tell(f"left alone: {folder}, another process is building in it")
        return 0, 0
    try:
        ours = [*catalogue.segment_files(folder), *catalogue.unfinished(folder), folder / catalogue.DESCRIPTION]
        removed = _remove(ours)
        (folder / catalogue.LOCK).unlink(missing_ok=True)
    finally:
        lock.release()
    if left := [file.name for file in folder.iterdir()]:
        tell(f"left in {folder}, not written by this cache: {', '.join(sorted(left))}")
    for emptied in (folder, folder.parent):
        with suppress(OSError):  # not empty
            emptied.rmdir()
    return removed


def _remove(files: list[Path]) -> tuple[int, int]:
    count = size = 0
    for file in files:
        with suppress(FileNotFoundError):
            bytes_of_file = file.stat().st_size
            file.unlink()
            count, size = count + 1, size + bytes_of_file
    return count, size


def _print_references(references: list[StoredReference]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False)
    for heading in ("reference", "model", "dtype", "quantization", "adapter", "compute"):
        table.add_column(heading, overflow="fold")
    for heading in ("rows", "size"):
        table.add_column(heading, justify="right")
    table.add_column("last used")
    for stored in references:
        facts = [stored.description.get(key) for key in ("model", "dtype", "quantization", "adapter", "compute")]
        words = ["–" if fact is None else printable(str(fact)) for fact in facts]
        table.add_row(stored.folder.name[:SHOWN], *words, str(stored.rows), decimal(stored.size), _date(stored.used))
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 200  # what reads a pipe has no use for wrapped lines
    console.print(table)


def _date(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M")


def _count(number: int, what: str) -> str:
    return f"{number} {what}" + ("" if number == 1 else "s")


def main(argv: list[str]) -> int:
    """Run ``cache`` or ``cache clear``."""
    if argv[:1] == ["clear"]:
        parser = Parser(
            prog="rlhf-lit cache clear",
            description="Remove what is named from the cache folder, or everything where nothing is.",
            allow_abbrev=False,
        )
        parser.add_argument(
            "--reference", type=str | None, default=None, metavar="DIGEST", help="One reference, by its first digits."
        )
        parser.add_argument("--tokens", action="store_true", help="The tokenised files.")
        parser.add_argument("--references", action="store_true", help="The log-probs of all references.")
        parser.add_argument("--cache", type=str, default=DEFAULT, metavar="DIR", help="The cache folder.")
        clear(**parser.parse_args(argv[1:]).as_dict())
        return 0
    parser = Parser(
        prog="rlhf-lit cache",
        description="What the cache folder holds: tokenised files, and log-probs of references. "
        "`rlhf-lit cache clear` removes it.",
        allow_abbrev=False,
    )
    parser.add_argument("--cache", type=str, default=DEFAULT, metavar="DIR", help="The cache folder.")
    show(**parser.parse_args(argv).as_dict())
    return 0
