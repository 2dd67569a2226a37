"""``configs``: the configs and sweeps that come with the package, and a copy of one to edit."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import NoReturn

from rlhf_lit.commands import shipped
from rlhf_lit.errors import UserError, tell
from rlhf_lit.files import atomic, short_path

HEADINGS = {
    "sft": "rlhf-lit fit --config NAME",
    "reward": "rlhf-lit fit --config NAME",
    "dpo": "rlhf-lit fit --config NAME",
    "ppo": "rlhf-lit fit --config NAME",
    "rloo": "rlhf-lit fit --config NAME",
    "grpo": "rlhf-lit fit --config NAME",
    "overlays": "over a config: rlhf-lit fit --config NAME --config OVERLAY",
    "evaluate": "rlhf-lit evaluate MODEL --config NAME",
    "sweeps": "rlhf-lit sweep NAME",
}
"""Groups in the order in which they are listed, and how one of each is used."""


def listing() -> str:
    """All names with the first sentence of each, by groups."""
    groups: dict[str, list[tuple[str, str]]] = {group: [] for group in HEADINGS}
    for kind in shipped.KINDS:
        for name in shipped.names(kind):
            line = shipped.summary(shipped.folder(kind) / f"{name}{shipped.SUFFIX}")
            groups[name.split("/")[0] if "/" in name else kind].append((name, line))
    width = max(len(name) for group in groups.values() for name, _ in group)
    lines = []
    for group, entries in groups.items():
        lines += [f"{group}  ({HEADINGS[group]})", *(f"  {name:<{width}}  {line}" for name, line in entries), ""]
    return "\n".join([*lines, "rlhf-lit configs copy NAME writes one here, to edit; a file of that name comes first"])


def copy(name: str, to: Path | None = None) -> Path:
    """Write a shipped file to edit.

    Args:
        name: of a config or a sweep.
        to: the file to write, or a folder for it; None is its name, in the working folder.

    Returns:
        The file that was written.

    Raises:
        UserError: no such name; a file that is there already, or a place where none can be written.
    """
    source = next((found for kind in shipped.KINDS if (found := shipped.shipped(name, kind))), None)
    if source is None:
        raise UserError(f"configs copy {name}: {shipped.missing(name, *shipped.KINDS)}")
    if to is None:
        kind = next(kind for kind in shipped.KINDS if source.is_relative_to(shipped.folder(kind)))
        to = source.relative_to(shipped.folder(kind))
    elif to.is_dir():
        to = to / source.name
    if to.exists():
        raise UserError(f"configs copy {name}: {to} is there already; name another file, or remove it first")
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
        with atomic(to) as partial:
            shutil.copyfile(source, partial)
    except OSError as error:
        raise UserError(f"configs copy {name}: {to} cannot be written: {error.strerror}") from error
    return to


class _Parser(argparse.ArgumentParser):
    """The standard library's, since a list of names shall not wait for torch; its complaints in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"configs: {message}")


def main(argv: list[str]) -> int:
    """Run ``configs`` or ``configs copy``."""
    if argv[:1] != ["copy"]:
        about = (
            "The configs and sweeps that come with the package; `rlhf-lit configs copy NAME [TO]` writes one to edit."
        )
        _Parser(prog="rlhf-lit configs", usage="rlhf-lit configs [copy NAME [TO]]", description=about).parse_args(argv)
        tell(listing())
        return 0
    parser = _Parser(prog="rlhf-lit configs copy", description="Write a config or a sweep that is shipped, to edit.")
    parser.add_argument("name", metavar="NAME", help="one of those that `rlhf-lit configs` lists")
    parser.add_argument("to", metavar="TO", nargs="?", type=Path, help="a file or a folder (default: NAME.yaml, here)")
    given = parser.parse_args(argv[1:])
    tell(short_path(copy(given.name, given.to).absolute()))
    return 0
