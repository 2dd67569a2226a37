"""Steps that experiments have in common: a sweep that goes on where it was, and a report of what it left.

They call the package's own commands, as a user would: what an experiment prints first is what can be typed.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path


def jobs(what: str | None) -> int:
    """How many arms at a time, from the command line of an experiment that is described in so many words."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--jobs", type=int, default=2, help="arms at a time (2)")
    return int(parser.parse_args().jobs)


def sweep(file: Path | str, jobs: int) -> Path:
    """Run a sweep file, or go on with it where it was begun.

    Returns:
        The sweep's folder.
    """
    folder = Path("runs/sweeps", Path(file).stem)
    going_on = ["--resume"] if (folder / "sweep.json").exists() else []
    call("sweep", str(file), f"--jobs={jobs}", *going_on)
    return folder


def report(name: str, *words: str) -> Path:
    """Make the page ``reports/<name>`` of the runs and with the options given.

    Returns:
        The report's folder.
    """
    out = Path("reports", name)
    call("report", *words, f"--out={out}")
    return out


def call(*words: str) -> None:
    """Run a command of ``rlhf_lit``; what ends it ends the experiment, with its status."""
    print(f"$ python -m rlhf_lit {shlex.join(words)}", flush=True)
    status = subprocess.run([sys.executable, "-m", "rlhf_lit", *words]).returncode
    if status:
        raise SystemExit(status)


def keep(report: Path, folder: Path, *names: str) -> None:
    """Copy files of a report into an experiment's folder."""
    for name in names:
        shutil.copyfile(report / name, folder / Path(name).name)


@dataclass(frozen=True)
class Step:
    """A command of an experiment.

    Attributes:
        words: after `python -m rlhf_lit`.
        done: a pattern under the working directory; where a file or a folder matches it, the command has run.
        log: what it prints goes there.
    """

    words: tuple[str, ...]
    done: str
    log: Path

    def run(self) -> None:
        """Run it, unless it has run. Raises RuntimeError, with the last line it printed, where it fails."""
        if any(Path().glob(self.done)):
            return
        print(f"$ python -m rlhf_lit {shlex.join(self.words)}", flush=True)
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("w") as log:
            threads = os.environ.get("OMP_NUM_THREADS", "1")
            command = [sys.executable, "-m", "rlhf_lit", *self.words]
            ended = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": threads})
        if ended.returncode:
            last = self.log.read_text().strip().rpartition("\n")[2]
            raise RuntimeError(f"{self.log}: ended with status {ended.returncode}: {last}")


def every(steps: Sequence[Step], jobs: int) -> None:
    """Run the steps that have not run, so many at a time; the others are run where one fails, which is then raised."""
    with ThreadPoolExecutor(jobs) as pool:
        runs = [pool.submit(step.run) for step in steps]
    for run in runs:
        run.result()
