"""The command line in processes that start at once: forked from a server that has imported everything.

A kill test starts a dozen of them, and Python needs longer to import torch than a tiny run to train.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from uuid import uuid4

TESTS = Path(__file__).parent
PATIENCE = 300.0  # seconds that a process may take to reach what it is waited for

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["rlhf_lit.commands.training", "rlhf_lit.algorithms", "peft", "datasets",
     "transformers.models.llama.modeling_llama", "transformers.generation.utils"]
)  # fmt: skip


# The server tells how a process ended once. Starting one asks after all others too, so that of two threads that ask at
# the same time one would hear nothing, and take it for status 255.
_asking = threading.Lock()


def _status(process: ForkServerProcess, deadline: float) -> int | None:
    """How a process ended; None where it has not at the deadline (by ``time.monotonic``)."""
    while True:
        with _asking:
            status = process.exitcode
        if status is not None or time.monotonic() >= deadline:
            return status
        time.sleep(0.02)


class Run:
    """One command, by one process or by several that are its ranks.

    Args:
        argv: of the command.
        folder: where it works.
        path: folders to import from, beside this one.
        ranks: processes; from two on each is told its rank by the environment, as torchrun does it.
        last: what the last rank is given otherwise: the folder where it works, and words that are added for it.
    """

    def __init__(
        self,
        *argv: object,
        folder: Path,
        path: Sequence[Path] = (),
        ranks: int = 1,
        last: tuple[Path, Sequence[str]] | None = None,
    ) -> None:
        name = uuid4().hex
        places = [str(place) for place in (TESTS, *path)]
        port = str(_free_port())
        self._said = [folder / f"said_{name}.{rank}.txt" for rank in range(ranks)]
        self._processes: list[ForkServerProcess] = []
        for rank, said in enumerate(self._said):
            roles = {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(ranks), "MASTER_PORT": port}
            environment = roles if ranks > 1 else {}
            here, more = last if last and rank == ranks - 1 else (folder, ())
            words = [*map(str, argv), *more]
            process = _server.Process(target=_work, args=(words, here, places, environment, said), daemon=True)
            with _asking:
                process.start()
            self._processes.append(process)

    def wait(self) -> None:
        """Until it has ended, with status 0."""
        deadline = time.monotonic() + PATIENCE
        assert [_status(process, deadline) for process in self._processes] == [0] * len(self._processes), self.said()

    def statuses(self, patience: float = PATIENCE) -> list[int]:
        """How its processes have ended, which must be within so many seconds."""
        deadline = time.monotonic() + patience
        statuses = [_status(process, deadline) for process in self._processes]
        for process in self._processes:
            process.kill()
        assert None not in statuses, f"not ended after {patience} s: {statuses}\n{self.said()}"
        return [int(status) for status in statuses if status is not None]

    def kill_at(self, note: Path) -> None:
        """SIGKILL, as soon as each rank has left its note (see ``stalling``)."""
        deadline = time.monotonic() + PATIENCE
        while not all(Path(f"{note}.{rank}").exists() for rank in range(len(self._processes))):
            assert all(_status(process, 0.0) is None for process in self._processes), self.said()
            assert time.monotonic() < deadline, f"the step it was to be killed at never came\n{self.said()}"
            time.sleep(0.02)
        for process in self._processes:
            process.kill()
        codes = [_status(process, time.monotonic() + PATIENCE) for process in self._processes]
        assert codes == [-signal.SIGKILL] * len(self._processes), codes

    def said(self) -> str:
        """What it wrote to the terminal."""
        return "\n".join(said.read_text(errors="replace") for said in self._said if said.exists())


def _work(argv: list[str], folder: Path, places: list[str], environment: dict[str, str], said: Path) -> None:
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:0] = places
    sys.argv = ["rlhf_lit", *argv]
    with said.open("wb", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from rlhf_lit.__main__ import main

    sys.exit(main(argv))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
