"""Lines for the person at the terminal: ``UserError`` ends a command with one, ``say`` and ``tell`` print one.

What a model says and what a row holds may be anything. Nothing of it acts on a terminal: see ``printable``.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from typing import TextIO

# C0 but for tab and newline, DEL, C1, what turns the direction of writing around, and what no encoding has.
_ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class UserError(ValueError):
    """Bad input, in one line: the file, row or key, what is wrong with it, and what to do.

    The command line prints it and exits with status 2.
    """


def is_live(stream: TextIO) -> bool:
    """Whether a person watches a stream, so that a bar may move on it: a terminal, and not CI's."""
    return os.environ.get("CI", "").lower() in ("", "0", "false") and stream.isatty()


def printable(text: str) -> str:
    """A text with what would act on a terminal written out, as JSON has it: `\\u001b` for an escape."""
    return _ACTING.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))


def tell(line: str) -> None:
    """Print a line on standard output at once."""
    print(printable(line), flush=True)


def hand_over(text: str, end: str = "\n") -> None:
    """Write what a command was asked for to standard output: as it is for a program, printable at a terminal."""
    print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def say(line: str, every_rank: bool = False) -> None:
    """Print a line on standard error at once, once for all ranks.

    Args:
        line: as it is to stand there, with ``note:`` or ``warning:`` before it where it is one.
        every_rank: print it on this rank, whichever it is.
    """
    # Lightning knows the rank as soon as it is imported; a process without it is the only one.
    ranks = sys.modules.get("lightning.fabric.utilities.rank_zero")
    if every_rank or ranks is None or not ranks.rank_zero_only.rank:
        print(printable(line), file=sys.stderr, flush=True)


def and_more(items: Iterable[str], shown: int = 1) -> str:
    """The first of some names, in their order, and how many more there are."""
    names = list(items)
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


def first_line(reason: object) -> str:
    """The first line of what a library says, or the kind of error where it says nothing."""
    return (str(reason).strip().splitlines() or [type(reason).__name__])[0]
