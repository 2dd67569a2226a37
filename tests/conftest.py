"""What all tests share: one thread, no network, where the real data stands, and the command line in a process."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Before torch and the hub clients are imported: tests run side by side, and never download.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import pytest
import torch

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("RLHF_LIT_DATA", ROOT.parent / "shared" / "data"))


def pytest_configure(config: pytest.Config) -> None:
    """As many threads in this process as in those that the tests start: sums come out the same to the bit. And signals
    that end processes, also where the suite runs under nohup or in the background of a shell, which ignore some."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data files; a test that asks for it is skipped where there is none."""
    if not DATA.is_dir():
        pytest.skip(f"no real data at {DATA} (set RLHF_LIT_DATA)")
    return DATA


@dataclass
class Answer:
    """What the command line said."""

    status: int
    out: str
    err: str


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Callable]:
    """``command("fit", "--config", …)``: the command line inside this process, working in the test's own folder."""
    from rlhf_lit.__main__ import main

    monkeypatch.chdir(tmp_path)

    def call(*argv: object) -> Answer:
        capsys.readouterr()
        with warnings.catch_warnings():
            status = main([str(word) for word in argv])
        said = capsys.readouterr()
        return Answer(status, said.out, said.err)

    yield call
    torch.set_grad_enabled(True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """``start("fit", …)``: the command line in a process of its own, working in the test's own folder.

    The folders given as ``path`` can be imported from there. What is left of it after the test, the processes of its
    other ranks included, is killed.
    """
    started: list[subprocess.Popen[str]] = []

    def call(*argv: object, path: tuple[Path, ...] = ()) -> subprocess.Popen[str]:
        places = [str(ROOT), *map(str, path)]
        process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_lit", *map(str, argv)],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(places)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield call
    for process in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
