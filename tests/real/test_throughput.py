"""The benchmark against TRL, as it is typed: both sides must have learned the same from the same batches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.soak
@pytest.mark.parametrize("task", ["sft", "reward", "dpo"])
def test_both_sides_have_the_losses_of_the_same_mathematics(task, real_data, tmp_path):
    """Four steps of AdamW with clipped gradients in float32: 4e-6 at most apart, when this was written."""
    words = [f"--task={task}", "--pairs=1", "--steps=2", f"--folder={tmp_path}"]
    file = real_data / "hh_harmless_test" / "test.jsonl.gz"
    done = subprocess.run(
        [sys.executable, "-m", "experiments.benchmarks.throughput", *words, f"--data={file}"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith(("| plain", "| cached"))]
    settings = ("plain", "cached") if task == "dpo" else ("plain",)
    assert [(row[1].strip(), row[2].strip()) for row in rows] == [
        (ours, peer) for ours in settings for peer in ("defaults", "grouped")
    ]
    for row in rows:
        if row[2].strip() == "defaults":
            assert 0 < float(row[-2]) < 1e-4
        else:
            assert row[-2].strip() == "–", "those are other batches"
        assert float(row[3]) > 0
        assert float(row[4]) > 0
