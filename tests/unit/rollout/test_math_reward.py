"""Mathematics compared by math-verify, in processes that are killed in time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rlhf_lit.errors import UserError
from rlhf_lit.rollout.killable import Failure, KillablePool
from rlhf_lit.rollout.math_reward import MathReward


@pytest.fixture(scope="module")
def reward() -> MathReward:
    return MathReward(workers=1, seconds=30.0)


EQUAL = [
    (r"\frac12", "0.5"),
    (r"\frac{1}{2}", r"\boxed{0.5}"),
    ("1/2", r"so \boxed{\frac12}"),
    ("0.5", "#### 1/2"),
    ("0.5", r"it is $\dfrac{2}{4}$."),
    (r"3\sqrt{13}", r"\boxed{\sqrt{117}}"),
    (r"$3\sqrt{13}$", r"$3 \sqrt{13}$"),
    ("(3,4]", r"\boxed{(3, 4]}"),
    (r"\{1,2\}", r"\boxed{\{2, 1\}}"),
    ("{1,2}", r"\boxed{2, 1}"),
    ("x=5 or x=6", r"\boxed{6, 5}"),
    ("so $x=5$", "5"),
    ("1,080", "1080"),
    (r"10\%", "0.1"),
    (r"10\%", r"\boxed{10\%}"),
    ("10%", r"so $\frac{1}{10}$"),
    ("2^{10}", "1024"),
    (r"\text{Evelyn}", r"\boxed{\text{Evelyn}}"),
    ("Two and two.\n#### 4", r"\boxed{4}"),
]
UNEQUAL = [
    (r"3\sqrt{13}", "13"),
    (r"3\sqrt{13}", r"\boxed{13}"),
    ("(3,4]", r"\boxed{(3,4)}"),
    ("(3,4]", "4"),
    (r"\{1,2\}", r"\boxed{\{1,2,3\}}"),
    ("x=5 or x=6", r"\boxed{6}"),
    ("5", r"\boxed{5, 6}"),
    ("5", r"\boxed{5} or \boxed{6}"),
    ("5", "#### 5 or 6"),
    ("1/3", r"\boxed{0.3}"),
    ("72", ""),
    ("72", "I cannot say"),
]


def test_what_is_equal_and_what_is_not(reward: MathReward) -> None:
    for pairs, verdict in ((EQUAL, True), (UNEQUAL, False)):
        golds, responses = [gold for gold, _ in pairs], [response for _, response in pairs]
        found = reward.agree(responses, golds)
        assert [pair for pair, right in zip(pairs, found, strict=True) if right is not verdict] == []


def test_gold_answers_that_hold_no_mathematics(reward: MathReward) -> None:
    golds = [*(gold for gold, _ in EQUAL), 5, 0.5, "none", "Evelyn", "", True, None, float("nan"), ["5"]]
    assert reward.all_unreadable([{"answer": gold} for gold in golds]) == [
        *[None] * (len(EQUAL) + 2),
        *["no mathematics in answer"] * 4,
        "null answer",
        *["no mathematics in answer"] * 2,
    ]
    assert reward.unreadable({"gold": 5}) == "no column 'answer'"


def test_a_comparison_that_takes_too_long_is_wrong_and_said(capfd: pytest.CaptureFixture[str]) -> None:
    """From a thread, where SIGALRM would not do; the next comparison has a new process."""
    reward = MathReward(workers=1, seconds=2.0)
    tower = r"\boxed{9^{9^{9^{9^9}}}}"
    found: list[list[bool]] = []
    before = signal.getsignal(signal.SIGALRM)
    thread = threading.Thread(
        target=lambda: found.append(reward.agree(["1", tower, r"\boxed{9}"], ["1", r"9^{9^{9^{9}}}", "9"]))
    )
    thread.start()
    thread.join()
    assert found == [[True, False, True]]
    assert signal.getsignal(signal.SIGALRM) is before
    assert reward.judges.lost == 1
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("note:")]
    assert "MathReward: judging the response" in line
    assert "it took longer than 2 s; it counts as wrong (1 so far)" in line


@pytest.mark.parametrize(("seconds", "workers"), [(0.0, 1), (float("inf"), 1), (1.0, 0)])
def test_limits_are_positive(seconds: float, workers: int) -> None:
    with pytest.raises(UserError, match=r"^reward\.(seconds|workers) must be"):
        MathReward(seconds=seconds, workers=workers)


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> KillablePool:
    (tmp_path / "calls.py").write_text(
        "import os, sys, time\n"
        "def call(what, value):\n"
        "    print('no answer')\n"
        "    if what == 'sleep': time.sleep(value)\n"
        "    if what == 'die': os._exit(3)\n"
        "    if what == 'raise': raise ValueError(value)\n"
        "    if what == 'modules': return sorted(set(sys.modules) & set(value))\n"
        "    return [value, os.getpid()]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return KillablePool("calls:call", 2)


def test_results_come_in_order_and_lost_workers_are_replaced(pool: KillablePool) -> None:
    jobs = [("echo", i) for i in range(10)]
    jobs[2], jobs[4], jobs[5] = ("sleep", 600), ("die", 0), ("raise", 7)
    results = pool.map(jobs, 2.0)
    assert results[2] == Failure("it took longer than 2 s", lost=True)
    assert results[4] == Failure("its process died", lost=True)
    assert results[5] == Failure("ValueError: 7")
    rest = [result for i, result in enumerate(results) if i not in (2, 4, 5)]
    assert [value for value, _ in rest] == [0, 1, 3, 6, 7, 8, 9]
    assert pool.map([("echo", "x" * 10**6)], 10.0)[0][0] == "x" * 10**6
    assert pool.map([], 1.0) == []


def test_a_worker_has_no_torch_and_survives_the_signals_that_stop_a_run(pool: KillablePool) -> None:
    ((_, pid),) = pool.map([("echo", 1)], 10.0)
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(pid, name)
    (again,) = pool.map([("echo", 2)], 10.0)
    assert again == [2, pid]
    assert pool.map([("modules", ["torch", "transformers"])], 10.0) == [[]]


def test_workers_end_with_their_pool_and_with_a_parent_that_is_killed(pool: KillablePool, tmp_path: Path) -> None:
    ((_, pid),) = pool.map([("echo", 1)], 10.0)
    pool.close()
    assert not alive(pid)
    script = (
        "import sys, os, signal\n"
        "from rlhf_lit.rollout.killable import KillablePool\n"
        "pool = KillablePool('calls:call', 1)\n"
        "print(pool.map([('echo', 1)], 20.0)[0][1], flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    ended = subprocess.run([sys.executable, "-c", script], env={**os.environ, "PYTHONPATH": path}, capture_output=True)
    pid = int(ended.stdout)
    for _ in range(3000):
        if not alive(pid):
            return
        time.sleep(0.1)
    pytest.fail("the worker outlived its parent")


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_function_that_cannot_be_imported_is_one_line() -> None:
    with pytest.raises(UserError, match=r"^no process could be started for nowhere:at_all"):
        KillablePool("nowhere:at_all", 1).map([[1]], 1.0)
