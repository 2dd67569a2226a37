"""Processes that tokenise: results in order, and an end that leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf_lit.data.processes import in_order
from rlhf_lit.errors import UserError


@pytest.mark.parametrize("processes", [1, 3])
def test_results_come_in_order(processes: int) -> None:
    def slow_at_first(number: int) -> int:
        time.sleep(0.05 if number < 3 else 0)
        return number * number

    assert list(in_order(slow_at_first, range(20), processes)) == [number * number for number in range(20)]


def test_what_stops_a_run_is_for_the_main_process() -> None:
    """A scheduler tells all processes of a run; the step at hand is finished all the same."""

    def asked_to_stop(number: int) -> int:
        for name in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), name)
        return number

    assert list(in_order(asked_to_stop, range(3), 2)) == [0, 1, 2]


def test_a_process_that_is_killed_is_one_line() -> None:
    def killed(number: int) -> int:
        if number == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return number

    with pytest.raises(UserError, match=r"data\.workers: a process that tokenises rows was killed"):
        list(in_order(killed, range(20), 2))


def test_a_parent_that_is_killed_takes_its_processes_with_it(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from rlhf_lit.data.processes import in_order\n"
        "def name(number):\n"
        "    open(sys.argv[1], 'a').write(f'{os.getpid()}\\n')\n"
        "    time.sleep(0.2)\n"
        "list(in_order(name, range(10_000), 2))\n"
    )
    names = tmp_path / "names"
    parent = subprocess.Popen([sys.executable, "-c", script, str(names)], cwd=Path(__file__).parents[3])
    deadline = time.monotonic() + 300
    while not (names.exists() and len(set(names.read_text().split())) == 2):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    parent.kill()
    parent.wait()
    while any(map(running, set(names.read_text().split()))):
        assert time.monotonic() < deadline, "they would work for a quarter of an hour"
        time.sleep(0.1)


def running(process: str) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False
