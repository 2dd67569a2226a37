"""Starting, ending, recording and resuming arms, with a program that stands in for `rlhf-lit fit` (see stand_in.py).

What the real program makes of it is in tests/cli/test_sweep_command.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lit.__main__ import main
from rlhf_lit.errors import UserError
from rlhf_lit.sweep import check, processes
from rlhf_lit.sweep.processes import environment
from rlhf_lit.sweep.records import Arm, Folder, arm_name, label, last_value, read_arms

HERE = Path(__file__).parent
FOLDER = Path("runs/sweeps/s")
PATIENCE = 120.0  # seconds, by which a machine that is busy is told from one where nothing will come


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable:
    """``sweep(values, *options)`` → (status, out, err); the arms' parameter `do` has these values."""
    program = tmp_path / "rlhf-lit"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -S {HERE / "stand_in.py"} "$@"\n')
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    for name in ("OMP_NUM_THREADS", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)

    def resolve(commands: Mapping[str, Sequence[str]]) -> Iterator[dict[str, Any]]:
        """The stand-in's configuration is its options, and those in base.json."""
        base = json.loads(Path("base.json").read_text()) if Path("base.json").exists() else {}
        for argv in commands.values():
            options = dict(word[2:].split("=", 1) for word in argv[1:] if "=" in word)
            yield {**base, **{key: value for key, value in options.items() if key not in check.ITS_OWN}}

    monkeypatch.setattr("rlhf_lit.commands.sweep.resolve", resolve)

    def call(values: list[Any], *options: str, more: dict[str, Any] | None = None, **top: Any) -> tuple[int, str, str]:
        content = {
            "method": "grid",
            "command": [str(program), "fit", "${args}"],
            "metric": {"name": "val/accuracy", "goal": "maximize"},
            "parameters": {"do": {"values": values}, **(more or {})},
            **top,
        }
        Path("s.yaml").write_text(yaml.safe_dump(content))
        capsys.readouterr()
        status = main(["sweep", "s.yaml", *options])
        said = capsys.readouterr()
        return status, said.out, said.err

    return call


def statuses() -> dict[str, str]:
    return {arm.name: arm.status for arm in read_arms(FOLDER)}


def all_gone(pids: Sequence[str]) -> bool:
    """Whether these processes end: they were killed, and would sleep for ten minutes."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if not any(map(alive, pids)):
            return True
        time.sleep(0.02)
    return False


def alive(pid: str) -> bool:
    """Running; a process that has ended and was not waited for yet does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_all_arms_are_run_and_recorded(sweep):
    status, out, _ = sweep(["finish"], more={"seed_everything": {"values": [7, 8]}})
    assert status == 0
    first, second = read_arms(FOLDER)
    assert first.name == "000-seed=7"
    assert first.parameters == {"do": "finish", "seed_everything": 7}
    assert first.arguments == ["--do=finish", "--seed_everything=7"]
    assert (first.status, first.exit_status, first.attempts, first.run) == ("finished", 0, 1, "version_0")
    assert (first.metric, second.metric) == (0.7, 0.8)
    assert first.started <= first.ended <= second.started
    assert first.seconds > 0
    assert first.error is None
    assert first.process is None
    log = (FOLDER / first.name / "log.txt").read_text()
    assert log.startswith("$ ")
    assert f"--do=finish --seed_everything=7 --runs={FOLDER} --name=000-seed=7\n" in log
    assert "WANDB_MODE disabled" in log
    assert json.loads((FOLDER / first.name / "config.json").read_text()) == {"do": "finish", "seed_everything": "7"}
    assert (FOLDER / "sweep.yaml").read_text() == Path("s.yaml").read_text()
    assert json.loads((FOLDER / "sweep.json").read_text()) == {
        "method": "grid", "seed": 0, "count": None, "metric": "val/accuracy"
    }  # fmt: skip
    assert out.splitlines()[0] == "2 arms in runs/sweeps/s · 1 at a time"
    assert re.search(r"done   000-seed=7 · \d+:\d\d · val/accuracy 0.7 · 1 left, about \d+:\d\d", out)
    assert out.splitlines()[-1].startswith("2 of 2 arms finished · ")


def test_a_failed_arm_is_one_line_and_the_others_finish(sweep):
    status, out, err = sweep(["fail", "finish", "recover"])
    assert status == 1
    assert err.splitlines() == ["checking 3 arms"]
    assert list(statuses().values()) == ["failed", "finished", "failed"]
    (line,) = [line for line in out.splitlines() if line.startswith("FAILED 000-do=fail")]
    assert "· no such file: pairs.jsonl · log runs/sweeps/s/000-do=fail/log.txt" in line
    assert "2 failed (000-do=fail, 002-do=recover): --resume tries them again" in out.splitlines()[-1]
    failed = read_arms(FOLDER)[0]
    assert (failed.exit_status, failed.error) == (2, "no such file: pairs.jsonl")

    status, out, _ = sweep(["fail", "finish", "recover"], "--resume")
    assert status == 1
    assert "1 finished before" in out
    assert list(statuses().values()) == ["failed", "finished", "finished"]
    assert [arm.attempts for arm in read_arms(FOLDER)] == [2, 1, 2]
    assert "start  001" not in out


def test_a_program_that_is_not_there_fails_the_arm(sweep):
    status, out, _ = sweep(["finish"], command=["./nowhere/rlhf-lit", "fit", "${args}"])
    assert status == 1
    assert re.search(r"FAILED 000 · \d+:\d\d · ./nowhere/rlhf-lit: No such file or directory", out)


def test_an_arm_that_is_killed_says_by_what(sweep):
    def kill() -> None:
        pid = int(wait_for(FOLDER / "000" / "hanging").split()[0])
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=kill).start()
    status, out, _ = sweep(["hang"])
    assert status == 1
    assert "ended by SIGKILL; before it: OMP_NUM_THREADS" in out
    assert read_arms(FOLDER)[0].exit_status == -signal.SIGKILL
    assert all_gone((FOLDER / "000" / "hanging").read_text().split()), "what it has left behind is ended too"


def wait_for(file: Path) -> str:
    deadline = time.monotonic() + PATIENCE
    while not file.exists() or not file.read_text():
        assert time.monotonic() < deadline, f"{file} never came"
        time.sleep(0.02)
    return file.read_text()


def signal_when(number: int, *notes: Path) -> threading.Thread:
    """Send this process a signal as soon as the notes are there."""

    def send() -> None:
        for note in notes:
            wait_for(note)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=send)
    thread.start()
    return thread


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_processes_and_leaves_a_sweep_that_resumes(sweep, number):
    values = ["finish", "hang", "hang_early", "recover"]
    hung = [FOLDER / "001-do=hang" / "hanging", FOLDER / "002-do=hang_early" / "hanging"]
    signal_when(number, *hung)
    before = signal.signal(number, signal.SIG_DFL)  # under nohup these tests would find SIGHUP ignored
    try:
        status, out, err = sweep(values, "--jobs=2")
        assert signal.getsignal(number) == signal.SIG_DFL, "as it was found"
    finally:
        signal.signal(number, before)
    assert status == 130
    assert err.splitlines()[-1] == "interrupted"
    assert all_gone([pid for note in hung for pid in note.read_text().split()])
    assert list(statuses().values()) == ["finished", "interrupted", "interrupted", "waiting"]
    assert "3 of 4 arms left; --resume goes on with them" in out
    assert all(arm.process is None and arm.error is None for arm in read_arms(FOLDER))

    assert sweep(values, "--jobs=2")[0] == 2, "not without --resume"
    status, out, _ = sweep(values, "--jobs=2", "--resume")
    assert status == 1, "recover fails at its first attempt"
    assert "start  001-do=hang, from its last checkpoint" in out
    assert "start  002-do=hang_early\n" in out
    attempts = {arm.name: (FOLDER / arm.name / "attempt_1") for arm in read_arms(FOLDER)}
    assert attempts["001-do=hang"].read_text().endswith("--name=001-do=hang --ckpt_path=last")
    assert attempts["002-do=hang_early"].read_text().endswith("--name=002-do=hang_early")
    assert [arm.run for arm in read_arms(FOLDER)] == ["version_0", "version_0", "version_1", "version_0"]
    assert sweep(values, "--resume")[0] == 0
    assert set(statuses().values()) == {"finished"}


def test_a_sweep_under_nohup_outlives_its_terminal(sweep):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        sent = signal_when(signal.SIGHUP, FOLDER / "000" / "log.txt")
        assert sweep(["finish"], more={"seconds": {"value": 0.5}})[0] == 0
        sent.join()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_arm_that_does_not_end_is_killed(sweep, monkeypatch):
    monkeypatch.setattr(processes, "PATIENCE", 0.3)
    note = FOLDER / "000" / "hanging"
    signal_when(signal.SIGTERM, note)
    assert sweep(["stubborn"])[0] == 130
    assert all_gone(note.read_text().split())


def test_jobs_are_how_many_arms_run_at_a_time(sweep):
    status, _, _ = sweep(["finish"], "--jobs=2", more={"seed_everything": {"values": [1, 2, 3, 4]},
                                                       "together": {"value": 2}})  # fmt: skip
    assert status == 0
    spans = [tuple(map(float, file.read_text().split())) for file in FOLDER.glob("*/times")]
    at_once = [sum(began <= moment < ended for began, ended in spans) for moment, _ in spans]
    assert max(at_once) == 2


def test_a_sweep_at_work_is_left_alone_until_its_last_process_ends(sweep):
    """Even if the sweep's own process was killed and its arms were not."""
    sweep(["finish", "recover"])
    with Folder(FOLDER).lock() as descriptor:
        orphan = subprocess.Popen(["sleep", "600"], pass_fds=(descriptor,))
    arm = read_arms(FOLDER)[1]
    arm.status, arm.process = "running", orphan.pid
    Folder(FOLDER).save(arm)
    status, _, err = sweep(["finish", "recover"], "--resume")
    assert status == 2
    assert f"this sweep is at work (processes {orphan.pid})" in err
    orphan.kill()
    orphan.wait()
    assert sweep(["finish", "recover"], "--resume")[0] == 0
    assert set(statuses().values()) == {"finished"}


def test_the_lock_passes_to_the_arms(tmp_path):
    folder = Folder(tmp_path)
    with folder.lock() as descriptor:
        process = processes.Process.start(["sleep", "600"], os.environ, tmp_path / "log.txt", 0, descriptor)
    with pytest.raises(UserError, match="at work"), folder.lock():
        pass
    processes.end([process])
    with folder.lock():
        pass


def test_two_sweeps_share_no_folder(sweep):
    assert sweep(["finish"])[0] == 0
    before = {file: file.read_bytes() for file in FOLDER.rglob("*") if file.is_file()}
    status, _, err = sweep(["finish"])
    assert status == 2
    assert "runs/sweeps/s is a sweep already: --resume goes on with it, --to names another folder" in err
    assert {file: file.read_bytes() for file in FOLDER.rglob("*") if file.is_file()} == before
    assert sweep(["finish"], "--to=elsewhere")[0] == 0
    assert read_arms(Path("elsewhere"))[0].status == "finished"


def test_new_arms_are_added_and_the_old_ones_stay(sweep):
    assert sweep(["recover", "finish"], "--count=1")[0] == 1
    assert sweep(["recover", "finish"], "--resume")[0] == 0, "the number of arms is the sweep's: still one"
    assert list(statuses()) == ["000-do=recover"]
    assert sweep(["recover", "finish"], "--resume", "--count=2")[0] == 0
    assert sweep([1.5, "recover", "finish"], "--resume", "--count=3", "--dry-run")[0] == 0
    assert list(statuses()) == ["000-do=recover", "001-do=finish"]
    sweep(["hang_late", "recover", "finish"], "--resume", "--count=3")
    assert list(statuses()) == ["000-do=recover", "001-do=finish", "002-do=hang_late"]


@pytest.mark.parametrize(
    ("values", "options", "top", "complaint"),
    [
        (["finish"], [], {}, "arm 001-do=recover of runs/sweeps/s is not among its arms any more"),
        (["finish", "recover"], ["--count=1"], {}, "--count 1: runs/sweeps/s has 2 arms already"),
        (["finish", "recover"], ["--seed=4"], {}, "--seed 4: runs/sweeps/s began with 0"),
        (["finish", "recover"], [], {"method": "random", "run_cap": 2}, "began as a grid search"),
    ],
)
def test_a_changed_sweep_is_not_resumed(sweep, values, options, top, complaint):
    sweep(["finish", "recover"])
    before = (FOLDER / "sweep.yaml").read_text()
    status, out, err = sweep(values, "--resume", *options, **top)
    assert (status, out) == (2, "")
    assert complaint in err.splitlines()[-1]
    assert (FOLDER / "sweep.yaml").read_text() == before


def test_a_base_that_was_changed_is_told_by_its_key(sweep):
    Path("base.json").write_text('{"model": {"init_args": {"learning_rate": 0.1}}}')
    sweep(["recover"])
    Path("base.json").write_text('{"model": {"init_args": {"learning_rate": 0.2}}}')
    status, _, err = sweep(["recover"], "--resume")
    assert status == 2
    assert "arm 000 would not be what it was when the sweep began: model.learning_rate: 0.1 → 0.2" in err
    assert read_arms(FOLDER)[0].attempts == 1


def test_a_parameter_without_effect_is_refused(sweep, monkeypatch):
    monkeypatch.setattr("rlhf_lit.commands.sweep.resolve", lambda commands: ({"a": 1} for _ in commands))
    status, _, err = sweep(["finish", "recover"])
    assert status == 2
    assert "arms 000-do=finish and 001-do=recover are the same run: a parameter of the sweep changes nothing" in err
    assert not FOLDER.exists()


def test_a_random_search_is_repeated_by_its_seed(sweep):
    search = {"method": "random", "more": {"seconds": {"min": 0.0, "max": 0.001}}}
    assert sweep(["finish"], "--count=2", "--seed=3", **search)[0] == 0
    first = [arm.parameters["seconds"] for arm in read_arms(FOLDER)]
    assert sweep(["finish"], "--count=3", "--resume", **search)[0] == 0
    more = [arm.parameters["seconds"] for arm in read_arms(FOLDER)]
    assert more[:2] == first
    assert len(set(more)) == 3
    assert sweep(["finish"], "--count=2", "--seed=4", "--to=other", **search)[0] == 0
    assert not {arm.parameters["seconds"] for arm in read_arms(Path("other"))} & set(more)


def test_a_dry_run_prints_what_would_be_started_and_writes_nothing(sweep):
    status, out, _ = sweep(["finish", "recover"], "--dry-run")
    assert status == 0
    assert not Path("runs").exists()
    assert [line.split(" fit ")[1] for line in out.splitlines()] == [
        f"--do={what} --runs=runs/sweeps/s --name=00{i}-do={what}" for i, what in enumerate(("finish", "recover"))
    ]
    sweep(["finish", "recover"])
    _, out, _ = sweep(["finish", "recover"], "--dry-run", "--resume")
    assert [line.split(" fit ")[1] for line in out.splitlines()] == [
        "--do=recover --runs=runs/sweeps/s --name=001-do=recover"
    ], "what has finished is not started again"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--jobs=0"], "--jobs: at least one"), (["--count=0"], "--count: at least one"), (["--resume"], "no sweep in")],
)
def test_bad_options(sweep, options, complaint):
    status, out, err = sweep(["finish"], *options)
    assert (status, out) == (2, "")
    assert complaint in err
    assert not FOLDER.exists()


def test_a_record_that_was_cut_short_is_named(sweep):
    sweep(["finish"])
    (FOLDER / "000" / "arm.json").write_text('{"name": "0')
    status, _, err = sweep(["finish"], "--resume")
    assert status == 2
    assert "runs/sweeps/s/000/arm.json: not the record of an arm" in err


# --- small things ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("slot", "jobs", "given", "gpus", "expected"),
    [
        (0, 1, {}, [], {"OMP_NUM_THREADS": "8", "WANDB_MODE": "disabled"}),
        (2, 3, {}, [], {"OMP_NUM_THREADS": "2"}),
        (8, 9, {}, [], {"OMP_NUM_THREADS": "1"}),
        (0, 2, {"OMP_NUM_THREADS": "6", "WANDB_MODE": "online"}, [], {"OMP_NUM_THREADS": "6", "WANDB_MODE": "online"}),
        (1, 2, {}, ["0", "1", "2", "3"], {"CUDA_VISIBLE_DEVICES": "2,3"}),
        (2, 3, {}, ["0", "1", "2", "3"], {"CUDA_VISIBLE_DEVICES": "2"}),
        (3, 4, {}, ["0", "1"], {"CUDA_VISIBLE_DEVICES": "1"}),
        (1, 2, {"CUDA_VISIBLE_DEVICES": "5,7"}, ["5", "7"], {"CUDA_VISIBLE_DEVICES": "7"}),
        (0, 1, {"CUDA_VISIBLE_DEVICES": "5,7"}, ["5", "7"], {"CUDA_VISIBLE_DEVICES": "5,7"}),
    ],
)
def test_arms_share_the_machine(slot, jobs, given, gpus, expected):
    found = environment(slot, jobs, given, cores=8, gpus=gpus)
    assert {key: found[key] for key in expected} == expected
    assert ("CUDA_VISIBLE_DEVICES" in found) == ("CUDA_VISIBLE_DEVICES" in expected)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, "0.1"),
        (0.123456789, "0.1235"),
        (1e-05, "1e-05"),
        ("null", "null"),
        ("{class_path: a.b.DPOLoss, init_args: {beta: 0.1, gamma: 1.0}}", "DPOLoss+beta=0.1+gamma=1"),
        ({"class_path": "FixedKL"}, "FixedKL"),
        ("{broken", "{broken"),
    ],
)
def test_labels(value, expected):
    assert label(value) == expected


def test_names_of_arms():
    parameters = {"model.kl": "FixedKL", "model.learning_rate": 1e-4, "seed_everything": 2}
    assert arm_name(7, parameters, set(parameters)) == "007-kl=FixedKL-learning_rate=0.0001-seed=2"
    assert arm_name(7, parameters, {"seed_everything"}) == "007-seed=2"
    two = {"model.learning_rate": 0.1, "model.critic.learning_rate": 0.2}
    assert arm_name(0, two, set(two)) == "000-model.learning_rate=0.1-model.critic.learning_rate=0.2"
    assert arm_name(0, {"a": "x/../{y} z"}, {"a"}) == "000-a=x_.._y_z"
    assert len(arm_name(0, {"a": "x" * 500}, {"a"})) == 100


def test_arms_are_read_in_the_order_of_their_numbers(tmp_path):
    for name in ("0999-a=1", "1000-a=2", "002-a=3"):
        Folder(tmp_path).save(Arm(name, {}, []))
    assert [arm.name for arm in read_arms(tmp_path)] == ["002-a=3", "0999-a=1", "1000-a=2"]


def test_the_last_value_of_a_metric(tmp_path):
    assert last_value(tmp_path, "val/loss") is None
    (tmp_path / "metrics.csv").write_text("step,val/loss\n0,0.5\n1,0.25\n2,\n")
    assert last_value(tmp_path, "val/loss") == 0.25
    assert last_value(tmp_path, "val/accuracy") is None


def test_differences_are_named_by_their_key():
    one = {"model": {"init_args": {"loss": {"init_args": {"beta": 0.1}}, "a": [1]}}, "x": None}
    assert check.difference(one, one) is None
    other = {"model": {"init_args": {"loss": {"init_args": {"beta": 0.2}}, "a": [1]}}, "x": None}
    assert check.difference(one, other) == "model.loss.beta: 0.1 → 0.2"
    assert check.difference({"a": 1}, {"a": 1, "b": 2}) == "b: None → 2"
