"""Lines for the person at the terminal: ``UserError`` ends a command with one, ``say`` prints one."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TextIO


class UserError(ValueError):
    """Bad input, in one line: the file, row or key, what is wrong with it, and what to do.

    The command line prints it and exits with status 2.
    """


def is_live(stream: TextIO) -> bool:
    """Whether a person watches a stream, so that a bar may move on it: a terminal, and not CI's."""
    return os.environ.get("CI", "").lower() in ("", "0", "false") and stream.isatty()


def say(line: str, every_rank: bool = False) -> None:
    """Print a line on standard error at once, once for all ranks.

    Args:
        line: as it is to stand there, with ``note:`` or ``warning:`` before it where it is one.
        every_rank: print it on this rank, whichever it is.
    """
    # Lightning knows the rank as soon as it is imported; a process without it is the only one.
    ranks = sys.modules.get("lightning.fabric.utilities.rank_zero")
    if every_rank or ranks is None or not ranks.rank_zero_only.rank:
        print(line, file=sys.stderr, flush=True)


def and_more(items: Iterable[str], shown: int = 1) -> str:
    """The first of some names, in their order, and how many more there are."""
    names = list(items)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def first_line(reason: object) -> str:
    """The first line of what a library says, or the kind of error where it says nothing."""
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0]
