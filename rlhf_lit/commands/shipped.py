"""The configs and sweeps that come with the package, found by their short names: `dpo/qwen_0.5b`, `dpo_beta`.

Where a name may be a file's too, the working folder comes first. Light on purpose (the standard library alone).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from rlhf_lit.errors import UserError, say

FLAGS = ("--config", "-c")
KINDS = ("configs", "sweeps")
SUFFIX = ".yaml"
PACKAGE = Path(__file__).parents[1]
# Ends of a sentence, not of an abbreviation (et al. 2024, Eq. 1).
_SENTENCE = re.compile(r"(?<=[.?!])\s+(?!\d)")
LONGEST = 110  # characters of a summary that stays a whole sentence


def folder(kind: str) -> Path:
    """Where the shipped files of a kind stand: inside an installed package; in a checkout, beside it."""
    inside = PACKAGE / kind
    return inside if inside.is_dir() else PACKAGE.parent / kind


def names(kind: str) -> list[str]:
    """The short names of a kind, sorted: `dpo/qwen_0.5b` of a config, `dpo_beta` of a sweep."""
    root = folder(kind)
    return sorted(path.relative_to(root).with_suffix("").as_posix() for path in root.rglob(f"*{SUFFIX}"))


def shipped(name: str, kind: str) -> Path | None:
    """The shipped file of a name, which may have the kind's folder before it and `.yaml` after it, or None."""
    short = name.removeprefix("./").removeprefix(f"{kind}/").removesuffix(SUFFIX)
    return folder(kind) / f"{short}{SUFFIX}" if short in names(kind) else None


def find(name: str, kind: str, option: str) -> Path:
    """The file that a name on the command line means: one of the working folder, else a shipped one.

    Args:
        name: a path, with or without `.yaml`, or a short name.
        kind: `configs` or `sweeps`.
        option: what complaints begin with, such as `--config`.

    Raises:
        UserError: there is none.
    """
    for path in (Path(name), Path(f"{name}{SUFFIX}")):
        if path.is_file():
            known = shipped(name, kind)
            # Who types a suffix means a file; who types a short name may not know that a file has it.
            if known and not name.endswith(SUFFIX) and not path.samefile(known):
                say(f"note: {option} {name} is {path} of this folder, not the shipped one of that name")
            return path
    if known := shipped(name, kind):
        return known
    raise UserError(f"{option} {name}: {missing(name, kind)}")


def missing(name: str, *kinds: str) -> str:
    """What is said of a name that means no file of the working folder and no shipped one of some kinds."""
    path = Path(name)
    if path.is_dir():
        return "is a folder"
    if path.is_absolute() or name.startswith((".", "~")):
        return "no such file"
    known = [one for kind in kinds for one in names(kind)]
    short = name.removesuffix(SUFFIX)
    for kind in kinds:
        short = short.removeprefix(f"{kind}/")
    near = get_close_matches(short, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else "`rlhf-lit configs` lists what is shipped"
    return f"no such file, and none of that name is shipped; {hint}"


def with_files(argv: Sequence[str]) -> list[str]:
    """A command line with the file that each `--config` means in the place of its name.

    Raises:
        UserError: there is none.
    """
    words = list(argv)
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in FLAGS and equals:
            words[i] = f"{flag}={find(value, 'configs', '--config')}"
        elif i and words[i - 1] in FLAGS:
            words[i] = str(find(word, "configs", "--config"))
    return words


def summary(path: Path) -> str:
    """The first sentence of the comment at a file's head, or its first clause where that is long."""
    prose = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("# ") or line.startswith("#  "):  # the end of the comment, or a command
            break
        prose.append(line.removeprefix("# ").strip())
    short = _SENTENCE.split(" ".join(prose))[0]
    for end in ("; ", ": "):
        if len(short) > LONGEST:
            short = short.split(end)[0]
    return short.rstrip(".:")
