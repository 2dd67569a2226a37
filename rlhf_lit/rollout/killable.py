"""Worker processes that are killed where a call takes too long.

A library's own time limits are no use here: math-verify's rests on SIGALRM, which works in the main thread alone and is
in the way of the signals that end a run; a thread cannot be stopped. So calls are made in processes of their own. They
are started as fresh interpreters, never forked (CUDA does not survive a fork), import neither torch nor the main
module, ignore the signals by which a run is stopped, and end when the pipe from their parent closes, however the
parent ended.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lit.errors import UserError

MEMORY = 4 * 2**30
"""Bytes of address space a worker may ask for; beyond it a call fails with a MemoryError."""
START_SECONDS = 120.0
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")


@dataclass(frozen=True)
class Failure:
    """Stands in the place of a result.

    Attributes:
        reason: what happened.
        lost: the call took too long and its process was killed, or the process died.
    """

    reason: str
    lost: bool = False


class KillablePool:
    """A function, called in worker processes that are started at the first call and again after they were killed.

    Args:
        function: `module:name` of a function of JSON values, which returns one. Its module is imported by the workers.
        workers: processes; no more are started than a call has jobs for.
    """

    def __init__(self, function: str, workers: int) -> None:
        self.function = function
        self.size = workers
        self._workers: list[_Worker] = []

    def map(self, jobs: Sequence[Sequence[Any]], seconds: float) -> list[Any | Failure]:
        """The function's results, in the order of the jobs.

        Args:
            jobs: the arguments of each call.
            seconds: how long one call may take.

        Raises:
            UserError: no worker process can be started.
        """
        results: list[Any | Failure] = [None] * len(jobs)
        waiting = deque(range(len(jobs)))
        with selectors.DefaultSelector() as selector:
            while len(self._workers) < min(self.size, len(jobs)):
                self._workers.append(_Worker(self.function))
            running: dict[_Worker, tuple[int, float]] = {}

            def begin(worker: _Worker) -> None:
                if waiting:
                    i = waiting.popleft()
                    running[worker] = i, time.monotonic() + seconds
                    selector.register(worker.results, selectors.EVENT_READ, worker)
                    worker.send(jobs[i])

            def end(worker: _Worker, result: Any | Failure) -> None:
                results[running.pop(worker)[0]] = result
                selector.unregister(worker.results)
                if isinstance(result, Failure) and result.lost:
                    worker.end()
                    self._workers.remove(worker)
                    if not waiting:
                        return
                    worker = _Worker(self.function)
                    self._workers.append(worker)
                begin(worker)

            for worker in self._workers[: len(jobs)]:
                begin(worker)
            while running:
                first = min(deadline for _, deadline in running.values())
                for key, _ in selector.select(max(0.0, first - time.monotonic())):
                    worker = key.data
                    if (result := worker.receive()) is not _UNFINISHED:
                        end(worker, result)
                now = time.monotonic()
                for worker in [worker for worker, (_, deadline) in running.items() if deadline <= now]:
                    end(worker, Failure(f"it took longer than {seconds:g} s", lost=True))
        return results

    def close(self) -> None:
        """End the workers; the next call starts new ones."""
        while self._workers:
            self._workers.pop().end()


_UNFINISHED = object()
_DIED = Failure("its process died", lost=True)


class _Worker:
    """One process, and the line it is writing."""

    def __init__(self, function: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_lit.rollout.killable", function],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._jobs = self._process.stdin
        self.results = self._process.stdout
        self._line = b""
        self.end = weakref.finalize(self, _end, self._process, os.getpid())
        with selectors.DefaultSelector() as selector:
            selector.register(self.results, selectors.EVENT_READ)
            if not selector.select(START_SECONDS) or self.receive() != "ready":
                self.end()
                raise UserError(f"no process could be started for {function}; what it printed stands above")

    def send(self, job: Sequence[Any]) -> None:
        with contextlib.suppress(BrokenPipeError):  # it has ended; `receive` says so
            self._jobs.write(json.dumps(list(job)).encode() + b"\n")
            self._jobs.flush()

    def receive(self) -> Any:
        """A result, or ``_UNFINISHED`` where only a part of it has come. Called when there is something to read."""
        piece = os.read(self.results.fileno(), 1 << 16)
        if not piece:
            return _DIED
        self._line += piece
        if not self._line.endswith(b"\n"):
            return _UNFINISHED
        answer, self._line = json.loads(self._line), b""
        return answer["result"] if "result" in answer else Failure(answer["error"])


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() != owner:  # in a fork of the parent, which has the object but not the child
        return
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        with contextlib.suppress(BrokenPipeError):
            pipe.close()


def _serve(function: Callable[..., Any]) -> None:
    """Answer the lines of standard input until it closes, whatever the function is doing then."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what the function prints is no answer
    jobs: deque[str] = deque()
    come = threading.Semaphore(0)

    def read() -> None:
        for line in sys.stdin:
            jobs.append(line)
            come.release()
        os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    answers.write('{"result": "ready"}\n')
    answers.flush()
    while True:
        come.acquire()
        try:
            answer = {"result": function(*json.loads(jobs.popleft()))}
        except Exception as error:
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:500]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def main(path: str) -> None:
    """A worker process: `python -m rlhf_lit.rollout.killable module:name`."""
    for name in STOPPING:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    module, _, name = path.partition(":")
    _serve(getattr(importlib.import_module(module), name))


if __name__ == "__main__":
    main(sys.argv[1])
