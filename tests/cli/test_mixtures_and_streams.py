"""Mixtures and streams through the real command line: what is said of them, and that a run resumes exactly."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ADD = [{"prompt": f"add {i} and 1", "completion": f"it is {i + 1}"} for i in range(30)]
DOUBLE = [{"prompt": f"double {i}", "completion": f"that is {2 * i}"} for i in range(10)]
PAIRS = [{"prompt": f"add {i} and 1", "chosen": f"it is {i + 1}", "rejected": f"no, {i}"} for i in range(30)]


def write(name: str, rows: list[Any]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def overlay(**fields: Any) -> str:
    Path("over.yaml").write_text(yaml.safe_dump({"data": {"init_args": fields}}))
    return "over.yaml"


def losses(run: str) -> dict[int, str]:
    """The loss of each step, over all versions of a run."""
    found = {}
    for version in sorted(Path("runs", run).glob("version_*")):
        for row in csv.DictReader((version / "metrics.csv").open()):
            if row.get("train/loss"):
                found[int(row["step"])] = row["train/loss"]
    return found


def complaint(answer: Any) -> str:
    assert answer.status == 2
    (line,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    return line


MIXED = {"train": [{"path": "add.jsonl"}, {"path": "double.jsonl", "weight": 3}]}
STREAMED = {"train": {"path": "add.jsonl", "streaming": True}, "stream_buffer": 16}


@pytest.mark.parametrize(
    ("config", "fields", "said"),
    [
        (
            "sft.yaml",
            MIXED,
            "train: an epoch is 40 rows: add.jsonl 25.0% (10 of 30 rows, 0.33 passes), "
            "double.jsonl 75.0% (30 of 10 rows, 3.00 passes)",
        ),
        (
            "sft.yaml",
            STREAMED,
            "train: add.jsonl is streamed: it has no length, its rows are shuffled among 16 at a time",
        ),
        (
            "dpo.yaml",
            {**STREAMED, "train": {"path": "pairs.jsonl", "streaming": True}},
            "train: pairs.jsonl is streamed",
        ),
    ],
    ids=["mixture", "stream", "stream of pairs"],
)
def test_a_run_resumes_exactly(run: Callable, place: Path, config: str, fields: Any, said: str) -> None:
    write("add.jsonl", ADD)
    write("double.jsonl", DOUBLE)
    write("pairs.jsonl", PAIRS)
    common = ["fit", "--config", config, "--config", overlay(**fields), "--preflight=false", "--trainer.max_epochs=-1"]
    common += ["--trainer.log_every_n_steps=1", "--trainer.limit_val_batches=0", "--model.schedule.name=constant"]
    answer = run(*common, "--trainer.max_steps=9", "--name=whole")
    assert answer.status == 0, answer.err
    assert answer.err.count(said) == 1, answer.err
    whole = losses("whole")
    assert len(whole) == 9
    assert run(*common, "--trainer.max_steps=3", "--name=parts").status == 0
    assert run(*common, "--trainer.max_steps=9", "--name=parts", "--ckpt_path=last").status == 0
    assert losses("parts") == whole


def test_a_stream_needs_to_know_the_runs_length(run: Callable, place: Path) -> None:
    write("add.jsonl", ADD)
    answer = run("fit", "--config", "sft.yaml", "--config", overlay(**STREAMED))
    assert complaint(answer) == "error: data.train.streaming: a stream has no length; set trainer.max_steps"


def test_what_a_mixture_is_not(run: Callable, place: Path) -> None:
    write("add.jsonl", ADD)
    fields = {"train": [{"path": "add.jsonl", "weight": 0}, {"path": "add.jsonl"}]}
    answer = run("fit", "--config", "sft.yaml", "--config", overlay(**fields))
    assert "weight must be above 0, not 0" in complaint(answer)
    answer = run("fit", "--config", "sft.yaml", "--config", overlay(train=[{"path": "nowhere.jsonl"}]))
    assert complaint(answer) == "error: no such file: nowhere.jsonl"
    answer = run("fit", "--config", "sft.yaml", "--config", overlay(train=[]))
    assert complaint(answer) == "error: data.train: name the training rows, e.g. data.train.path=FILE"
