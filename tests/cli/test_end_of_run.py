"""A run that ends by its number of steps, in the middle of an epoch, ends with a validation."""

from __future__ import annotations

import csv
import io
import logging
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


def test_a_profiler_reports(command):
    """By Lightning's own messages, whose handler holds the stderr that it was imported with."""
    configs = Path(__file__).parents[2] / "configs"
    said = io.StringIO()
    (handler,) = [h for h in logging.getLogger("lightning.pytorch").handlers if type(h) is logging.StreamHandler]
    before = handler.setStream(said)
    try:
        answer = command(
            "fit", f"--config={configs / 'sft' / 'quickstart.yaml'}", "--data.train.world.demonstrations=60",
            "--data.batch_size=8", "--trainer.max_steps=1", "--trainer.profiler=simple",
        )  # fmt: skip
    finally:
        handler.setStream(before)
    assert answer.status == 0, answer.err
    assert "Profiler Report" in said.getvalue()
    assert "run_training_batch" in said.getvalue()
