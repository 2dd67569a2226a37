"""An arm as a process of its own: how it is started, watched and ended."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PATIENCE = 20.0  # seconds that interrupted processes have to end by themselves
_ERROR = re.compile(r"error: |[\w.]*(Error|Exception|Interrupt)\b")


@dataclass
class Process:
    """A running arm, with the processes that it starts (other ranks, data workers).

    Attributes:
        popen: its first process, the leader of their group.
        log: what they print, appended.
        offset: where in the log this attempt begins, in bytes.
        slot: which of the places for arms at a time it has.
        began: by the monotonic clock.
    """

    popen: subprocess.Popen[bytes]
    log: Path
    offset: int
    slot: int
    began: float

    @classmethod
    def start(cls, words: Sequence[str], environment: Mapping[str, str], log: Path, slot: int, lock: int) -> Process:
        """Start a command in a session of its own, which no Ctrl-C of the terminal reaches.

        Args:
            words: the command.
            environment: all of it.
            log: for standard output and standard error.
            slot: see above.
            lock: a descriptor that is to stay open as long as any of its processes lives.

        Raises:
            OSError: there is no such program.
        """
        with log.open("ab") as file:
            offset = file.tell()
            popen = subprocess.Popen(
                list(words),
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=(lock,),
            )
        return cls(popen, log, offset, slot, time.monotonic())

    def signal(self, number: int) -> None:
        """To all processes of the arm."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, number)

    def error(self) -> str:
        """The line this attempt failed with: the last that looks like an error, else the last."""
        with self.log.open("rb") as file:
            file.seek(self.offset)
            lines = file.read().decode(errors="replace").splitlines()
        lines = [line.strip() for line in lines if line.strip()]
        found = [line for line in lines if _ERROR.match(line)] or lines or ["it printed nothing"]
        return found[-1].removeprefix("error: ")


def end(processes: Sequence[Process]) -> None:
    """Interrupt them as Ctrl-C would, and kill what has not ended after a while or at a second Ctrl-C."""
    for process in processes:
        process.signal(signal.SIGINT)
    deadline = time.monotonic() + PATIENCE
    with contextlib.suppress(KeyboardInterrupt):
        while any(process.popen.poll() is None for process in processes) and time.monotonic() < deadline:
            time.sleep(0.05)
    for process in processes:  # what outlives the first process of its group is killed too
        process.signal(signal.SIGKILL)
        process.popen.wait()


def environment(slot: int, jobs: int, given: Mapping[str, str], cores: int, gpus: Sequence[str]) -> dict[str, str]:
    """The environment of an arm; what the user has set stays.

    Args:
        slot: of ``jobs`` places for arms at a time.
        jobs: how many there are.
        given: the environment of the sweep.
        cores: that the sweep may use; each arm gets its share as threads.
        gpus: their ids; arms at a time share them out, or share one where there are fewer.
    """
    share = max(1, len(gpus) // jobs)
    own = [gpus[(slot * share + i) % len(gpus)] for i in range(share)] if gpus and jobs > 1 else []
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // jobs)),
        "OMP_WAIT_POLICY": "PASSIVE",  # threads that spin while they wait take the other arms' time
        "PYTHONUNBUFFERED": "1",
        "WANDB_MODE": "disabled",
    }
    return {**defaults, **given, **({"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {})}


def visible_gpus(given: Mapping[str, str]) -> list[str]:
    """Ids of the GPUs that arms may use."""
    if "CUDA_VISIBLE_DEVICES" in given:
        return [gpu.strip() for gpu in given["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip()]
    import torch

    return [str(i) for i in range(torch.cuda.device_count())]
