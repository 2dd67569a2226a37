"""How far the reading of a file has come: a bar on a terminal, else a line now and then."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rlhf_lit.errors import is_live, printable, say

SECONDS = 15.0  # between two lines where there is no terminal


class Advance(Protocol):
    """To be told how many rows were read, and what fraction of the file that is."""

    def __call__(self, rows: int, done: float) -> None: ...


@contextmanager
def loading(name: str) -> Iterator[Advance]:
    """A bar with rows per second while rows are read and tokenised; of a pipe, a line every quarter of a minute.

    Args:
        name: of what is loaded.
    """
    if not is_live(sys.stderr):
        yield _lines(name)
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    started = time.monotonic()
    rate = TextColumn("{task.fields[rows]:,} rows, {task.fields[rate]:,.0f} rows/s")
    columns = (TextColumn("{task.description}"), BarColumn(), rate, TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task(escape(printable(f"{name}: reading")), total=1.0, rows=0, rate=0.0)

        def advance(rows: int, done: float) -> None:
            progress.update(task, completed=done, rows=rows, rate=rows / (time.monotonic() - started))

        yield advance


def _lines(name: str) -> Advance:
    started = said = time.monotonic()

    def advance(rows: int, done: float) -> None:
        nonlocal said
        now = time.monotonic()
        if now - said >= SECONDS:
            said = now
            say(f"{name}: {rows:,} rows read ({done:.0%}), {rows / (now - started):,.0f} rows/s")

    return advance
