"""``--model.base.compile=true``: the same run, with the layers compiled; and where they cannot be."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_folders import metrics, timeless
from torch._dynamo.utils import counters


def test_a_compiled_run_is_the_same_run(run: Callable, place: Path) -> None:
    counters.clear()
    for name, options in (("plain", []), ("compiled", ["--model.base.compile=true"])):
        assert run("fit", "--config", "dpo.yaml", "--preflight=false", f"--name={name}", *options).status == 0
        assert (counters["stats"]["unique_graphs"] > 0) == bool(options)
    torch.compiler.reset()
    rows = [
        [{k: float(v) for k, v in timeless(row).items() if v} for row in metrics(place / "runs" / name / "version_0")]
        for name in ("plain", "compiled")
    ]
    assert len(rows[0]) == len(rows[1]) > 4
    for plain, compiled in zip(*rows, strict=True):
        assert compiled == pytest.approx(plain, rel=1e-4, abs=1e-5)


def test_without_a_compiler_one_line_says_so(place: Path) -> None:
    """As a process of its own: this one may have found the compiler already."""
    empty = place / "empty"
    empty.mkdir()
    nothing_found = {**os.environ, "PATH": str(empty), "TORCHINDUCTOR_CACHE_DIR": str(place / "graphs")}
    argv = ["fit", "--config", "dpo.yaml", "--model.base.compile=true"]
    ended = subprocess.run(
        [sys.executable, "-m", "rlhf_lit", *argv], cwd=place, env=nothing_found, capture_output=True, text=True
    )
    assert ended.returncode == 2
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: base.compile: torch.compile could not compile the layers; without base.compile")
    assert "No working C++ compiler found" in line
    assert "Traceback" not in ended.stderr
