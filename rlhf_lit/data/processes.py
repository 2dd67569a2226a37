"""A function of many things, called in several processes, with its results in order."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait
from typing import Any, TypeVar

from rlhf_lit.errors import UserError

Given = TypeVar("Given")
Result = TypeVar("Result")

# By these a run is stopped; the main process decides then what becomes of the others.
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_order(function: Callable[[Given], Result], given: Iterable[Given], processes: int) -> Iterator[Result]:
    """The function of each thing given, in order; a few are under way at a time.

    Args:
        function: anything; the processes are forked with it.
        given: what it is called with; sent to the processes, as results are sent back.
        processes: how many; one is this one, where forking is not known as well.

    Raises:
        UserError: a process was killed.
    """
    if processes == 1 or "fork" not in multiprocessing.get_all_start_methods():
        for one in given:
            # What stands in memory already is not looked through for garbage each time that results fill some of it,
            # which takes a fifth of the time.
            gc.freeze()
            try:
                result = function(one)
            finally:
                gc.unfreeze()
            yield result
        return
    with ProcessPoolExecutor(processes, _context(), _start, (function,)) as pool:
        waiting: deque[Any] = deque()
        try:
            for one in given:
                waiting.append(pool.submit(_call, one))
                if len(waiting) > 2 * processes:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "data.workers: a process that tokenises rows was killed, as the system does where memory runs out; set "
                f"a number below {processes}"
            ) from error
        finally:
            for future in waiting:
                future.cancel()


def _context() -> Any:
    """Forks whose processes can be ended although they ignore SIGTERM."""
    fork: Any = multiprocessing.get_context("fork")

    class Process(fork.Process):
        terminate = fork.Process.kill

    return type("Context", (type(fork),), {"Process": Process})()


_function: Callable[[Any], Any] | None = None


def _start(function: Callable[[Any], Any]) -> None:
    """What a process begins with; it is forked, so that nothing of the function is pickled."""
    global _function
    _function = function
    gc.freeze()
    for name in STOPPING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes are what is parallel, and threads do not survive it


def _end_with_parent() -> None:
    """A parent that is killed takes its processes with it, which would else wait for work without end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _call(given: Any) -> Any:
    assert _function is not None
    return _function(given)
