"""Files of rows as the commands meet them."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

ROWS = [{"prompt": f"add {i} and 1", "completion": f"it is {i + 1}"} for i in range(8)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
JUDGE = ("--judge=RewardFromFunction", "--judge.function=rlhf_lit.playground.gold_reward")
FIT = ("fit", "--config=sft.yaml", "--trainer.max_steps=1", "--preflight=false", "--data.batch_size=8")


def complaint(answer: Any) -> str:
    """The one line that a refused command prints."""
    assert answer.status == 2, answer.err
    (line,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in answer.err
    return line


def table(delimiter: str) -> str:
    return "".join(f"{q}{delimiter}{a}\n" for q, a in [("question", "best"), *(row.values() for row in ROWS)])


def test_files_of_many_kinds(run: Callable) -> None:
    Path("rows.TSV").write_text(table("\t"))
    Path("rows.csv").write_text(table(";"))
    Path("rows.jsonl.zst").write_bytes(pa.Codec("zstd").compress(LINES.encode(), asbytes=True))
    Path("rows.JSONL.gz").write_bytes(gzip.compress(LINES.encode()))
    Path("rows.json").write_text(json.dumps({"about": "sums", "data": {"examples": ROWS}}, indent=1))
    columns = "--data.train.columns={prompt: question, completion: best}"
    for name, *options in (
        ("rows.TSV", columns),
        ("rows.csv", columns, "--data.train.delimiter=;"),
        ("rows.jsonl.zst", "--data.train.split=null"),
        ("rows.JSONL.gz",),
        ("rows.json", "--data.train.columns={rows: data.examples}"),
    ):
        answer = run(*FIT, f"--data.train.path={name}", *options)
        assert answer.status == 0, answer.err
        assert f"train: {name}: 8 of 8 rows used" in answer.err


def test_folders(run: Callable) -> None:
    from datasets import Dataset, DatasetDict

    saved = DatasetDict({"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[:3])})
    saved.save_to_disk("saved")
    os.mkdir("mixed")
    Path("mixed/a.jsonl").write_text(LINES)
    Path("mixed/b.csv").write_text("prompt,completion\nadd 007,8\n")
    for path, said in (("saved", "saved[train]: 8 of 8"), ("mixed", "mixed[train]: 9 of 9")):
        answer = run(*FIT, f"--data.train.path={path}")
        assert answer.status == 0, answer.err
        assert said in answer.err
    Path("mixed/c.xlsx").write_text("x")
    assert "mixed: c.xlsx is of no kind that can be read" in complaint(run(*FIT, "--data.train.path=mixed"))


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("r.csv", 'prompt,completion\na,b\nc,"d\n' + "e,f\n" * 1000, "r.csv, line 3: not valid CSV (a quote"),
        ("r.csv", "prompt,completion,completion\na,b,c\n", "r.csv, line 1: two columns are named 'completion'"),
        ("r.csv", "prompt,completion,\na,b,c\n", "r.csv, line 1: column 3 has no name"),
        ("r.jsonl", LINES + '{"prompt": \n', "r.jsonl, line 9: not valid JSON"),
        ("r.json", json.dumps({"rows": ROWS}, indent=1), "say where in it the rows are, as columns: {rows: rows}"),
        ("r.json", '{"rows": ' + "[" * 100_000 + "\n" + "]" * 100_000 + "}", "r.json, line 2: not valid JSON"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read(run: Callable, name: str, content: str, line: str) -> None:
    Path(name).write_text(content)
    assert line in complaint(run(*FIT, f"--data.train.path={name}"))
    assert line in complaint(run("score", "tiny", name))
    assert line in complaint(run("evaluate", "tiny", f"--prompts.path={name}", *JUDGE))


def test_rows_that_nobody_can_use_are_counted(run: Callable) -> None:
    deep = "[" * 100_000 + "]" * 100_000
    bad = [
        f'{{"prompt": "a", "completion": {deep}}}',
        '{"prompt": "a", "completion": "\\ud83d"}',
        f'{{"n": {"7" * 5000}}}',
    ]
    Path("r.jsonl").write_text(LINES + "\n".join(bad))
    answer = run(*FIT, "--data.train.path=r.jsonl")
    assert answer.status == 0, answer.err
    for reason in (
        "r.jsonl: 8 of 11 rows used", "1 nested too deep (row 8)", "1 lone surrogate (row 9)",
        "1 number of too many digits (row 10)",
    ):  # fmt: skip
        assert reason in answer.err


def test_lines_of_text_end_at_newlines_alone(run: Callable) -> None:
    Path("r.txt").write_text("one\u2028two\u0085three\x0cfour\x1cfive\n" * 8)
    assert "r.txt: 8 of 8 rows used" in run(*FIT, "--data.train.path=r.txt").err


def test_a_tokenizer_that_loses_text(run: Callable) -> None:
    file = Path("tiny/tokenizer.json")
    tokenizer = json.loads(file.read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": ""}
    file.write_text(json.dumps(tokenizer))
    answer = run("fit", "--config=sft.yaml", "--trainer.max_steps=1")
    assert answer.status == 0, answer.err
    (line,) = [line for line in answer.out.splitlines() if "text kept" in line]
    assert line.startswith("warning  text kept  ")
    assert "not in 32 of 32 rows: in row 0 'add 0 and 1' comes back as 'add0and1'; the model never sees" in line
