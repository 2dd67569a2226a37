"""YAML that says two things, or has no end, is one line, in every file and option that a command reads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TWICE = "trainer:\n  max_steps: 1\n  devices: 1\n  max_steps: 2\n"
ROUND = "data: &data\n  init_args: *data\n"
BOMB = "a0: &a0 [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
DEEP = "[" * 100_000 + "]" * 100_000


def complaint(answer: Any) -> str:
    """The one line that a refused command prints."""
    assert answer.status == 2
    (line,) = answer.err.strip().splitlines()
    return line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (TWICE, "--config more.yaml, line 4: the key 'max_steps' is there twice, first in line 2; keep one"),
        ("name: a\nname: a\n", "--config more.yaml, line 2: the key 'name' is there twice, first in line 1; keep one"),
        ("data: {train: {path: a, path: b}}", "--config more.yaml, line 1: the key 'path' is there twice"),
        (ROUND, "--config more.yaml, line 1: a value has an alias of itself inside of it"),
        (BOMB, "line 5: its aliases stand for more than 100000 values"),
        (f"name: {DEEP}", "--config more.yaml: nested too deep"),
    ],
)
def test_a_config(run: Callable, text: str, line: str) -> None:
    Path("more.yaml").write_text(text)
    for command in (["fit", "--config=sft.yaml", "--config=more.yaml"], ["evaluate", "tiny", "--config", "more.yaml"]):
        assert line in complaint(run(*command))


def test_an_option_and_a_file_that_it_names(run: Callable) -> None:
    fit = ("fit", "--config=sft.yaml", "--trainer.max_steps=1")
    line = complaint(run(*fit, "--data.train={path: sft.jsonl, path: pairs.jsonl}"))
    assert line == "error: --data.train: the key 'path' is there twice, first in line 1; keep one"
    line = complaint(run("evaluate", "tiny", "--prompts={path: a, path: b}"))
    assert line == "error: --prompts: the key 'path' is there twice, first in line 1; keep one"
    Path("model.yaml").write_text("class_path: SFT\ninit_args:\n  base: {name: tiny}\n  base: {name: other}\n")
    assert "'base' is there twice" in complaint(run(*fit, "--model=model.yaml"))


def test_a_sweep(run: Callable) -> None:
    Path("s.yaml").write_text("method: grid\nparameters:\n  model.lr: {value: 1}\n  model.lr: {value: 2}\n")
    assert complaint(run("sweep", "s.yaml")) == (
        "error: s.yaml, line 4: the key 'model.lr' is there twice, first in line 3; keep one"
    )
    Path("s.yaml").write_text(f"method: grid\n{BOMB}")
    assert "its aliases stand for more than 100000 values" in complaint(run("sweep", "s.yaml"))


def test_aliases_and_merged_keys_as_before(run: Callable) -> None:
    Path("more.yaml").write_text(
        "trainer:\n  <<: &few {max_steps: 9, limit_val_batches: 1}\n  max_steps: 1\n"
        "data:\n  init_args:\n    train: &rows {path: sft.jsonl}\n    validation: *rows\n"
    )
    assert run("fit", "--config=sft.yaml", "--config=more.yaml", "--preflight=false").status == 0
