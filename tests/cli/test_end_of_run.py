"""A run that ends by its number of steps, in the middle of an epoch, ends with a validation."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path


def test_the_last_step_is_followed_by_a_validation(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    configs = Path(__file__).parents[2] / "configs"
    answer = command(
        "fit",
        f"--config={configs / 'sft' / 'quickstart.yaml'}",
        "--name=short",
        "--data.train.world.demonstrations=60",
        "--data.batch_size=8",
        "--trainer.max_steps=3",
    )
    assert answer.status == 0, answer.err
    with open("runs/short/version_0/metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows if row["val/loss"]] == ["2"]
    assert sum(bool(row["train/loss"]) for row in rows) == 3


def test_a_profiler_reports(tmp_path):
    """As a process of its own, since Lightning's messages go to the stderr that it was imported with."""
    configs = Path(__file__).parents[2] / "configs"
    argv = [
        "fit", f"--config={configs / 'sft' / 'quickstart.yaml'}", "--data.train.world.demonstrations=60",
        "--data.batch_size=8", "--trainer.max_steps=1", "--trainer.profiler=simple",
    ]  # fmt: skip
    done = subprocess.run([sys.executable, "-m", "rlhf_lit", *argv], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Profiler Report" in done.stderr
    assert "run_training_batch" in done.stderr
