"""What a row says is what is learned, through the real command line."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

VOTES = [
    {"input": f"add {i} and 1", "output_1": f"no, {i}", "output_2": f"it is {i + 1}", "label": 2 - i % 3, "notes": "n"}
    for i in range(12)
]  # labels 2, 1, 0
CODED = "{prompt: input, first: output_1, second: output_2, verdict: {column: label, first: 1, second: 2, tie: 0}}"


def write(name: str, rows: list[Any]) -> None:
    Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def complaint(answer: Any) -> str:
    assert answer.status == 2
    (line,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in answer.err
    return line


@pytest.mark.parametrize("config", ["dpo.yaml", "reward.yaml"])
def test_verdicts_from_a_config_and_from_the_command_line(run: Callable, place: Path, config: str) -> None:
    write("votes.jsonl", VOTES)
    argv = ["fit", "--config", config, "--preflight=false", "--data.train.path=votes.jsonl"]
    plain = "{prompt: input, chosen: output_1, rejected: output_2}"
    assert "'label' beside 'output_1' and 'output_2' may say which of them is better: say how by columns.verdict" in (
        complaint(run(*argv, f"--data.train.columns={plain}"))
    )
    answer = run(*argv, f"--data.train.columns={CODED}", "--name=line")
    assert answer.status == 0, answer.err
    said = answer.err
    assert "train: votes.jsonl: 8 of 12 rows used; skipped 4 tie (rows 2, 5, 8, 11)" in said
    assert "train: votes.jsonl: verdicts of 'label': 1 is the first answer, 2 the second" in said
    assert said.count("train: votes.jsonl: columns that were not used: notes") == 1
    Path("over.yaml").write_text(yaml.safe_dump({"data": {"init_args": {"train": {
        "path": "votes.jsonl", "columns": {"prompt": "input", "chosen": "output_1", "rejected": "output_2",
                                           "verdict": None}}}}}))  # fmt: skip
    answer = run("fit", "--config", config, "--config", "over.yaml", "--preflight=false", "--name=null")
    assert answer.status == 0, answer.err
    assert "train: votes.jsonl: 12 of 12 rows used" in answer.err
    assert "train: votes.jsonl: columns that were not used: label, notes" in answer.err


def test_a_template_and_a_number_from_the_command_line(run: Callable, place: Path) -> None:
    rows = [{"question": f"add {i} and 1", "options": [str(i), str(i + 1)], "value": i + 1.0} for i in range(8)]
    write("options.jsonl", rows)
    columns = r'{prompt: "{question}\n{options}", answer: value}'
    argv = ["fit", "--config", "sft.yaml", "--preflight=false", "--data.train.path=options.jsonl"]
    answer = run(*argv, f"--data.train.columns={columns}", "--trainer.max_steps=1")
    assert answer.status == 0, answer.err
    assert "train: options.jsonl: 8 of 8 rows used\n" in answer.err
    assert "not used" not in answer.err
    assert "columns.prompt has {qestion}, but the file has options, question, value" in complaint(
        run(*argv, '--data.train.columns={prompt: "{qestion} {options}", answer: value}')
    )


def test_a_null_margin_under_each_loss(run: Callable, place: Path) -> None:
    pair = {"prompt": "add 1 and 1", "chosen": "it is 2", "rejected": "no"}
    write("margins.jsonl", [{**pair, "margin": 1.0}] * 3 + [{**pair, "margin": None}])
    for config, options, line in (
        ("dpo.yaml", [], "train: margins.jsonl: 4 of 4 rows used"),
        ("reward.yaml", [], "train: margins.jsonl: 4 of 4 rows used"),
        (
            "reward.yaml",
            ["--model.loss.use_margin=true"],
            "train: margins.jsonl: 3 of 4 rows used; skipped 1 non-number margin (row 3)",
        ),
    ):
        answer = run("fit", "--config", config, "--preflight=false", "--data.train.path=margins.jsonl", *options)
        assert answer.status == 0, answer.err
        assert line + "\n" in answer.err


def test_tool_use_is_not_scored_without_its_tools(run: Callable, place: Path) -> None:
    """The built-in template knows none: the row is refused by name."""
    answer = run("fit", "--config", "reward.yaml", "--preflight=false", "--name=rm")
    assert answer.status == 0, answer.err
    chat = [{"role": "user", "content": "add 1 and 1"}, {"role": "assistant", "content": "it is 2"}]
    write("tools.jsonl", [{"messages": chat}, {"messages": chat, "tools": [{"name": "add", "parameters": {}}]}])
    answer = run("score", Path("runs", "rm", "version_0"), "tools.jsonl", "--to", "out.jsonl")
    assert answer.status == 0, answer.err
    good, refused = (json.loads(line) for line in Path("out.jsonl").read_text().splitlines())
    assert isinstance(good["score"], float)
    assert refused["score"] is None
    assert "tools" in refused["reason"]


def test_scores_and_evaluations_of_verdicts(run: Callable, place: Path) -> None:
    answer = run("fit", "--config", "reward.yaml", "--preflight=false", "--name=rm")
    assert answer.status == 0, answer.err
    folder = Path("runs", "rm", "version_0")
    write("votes.jsonl", VOTES)
    answer = run("score", folder, "votes.jsonl", "--columns", CODED, "--to", "scores.jsonl")
    assert answer.status == 0, answer.err
    scored = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    assert [len(row["scores"]) for row in scored] == [2] * 12
    better = [row["scores"][row["label"] - 1] > row["scores"][2 - row["label"]] for row in scored if row["label"]]
    assert f"accuracy {sum(better) / len(better):.4f} on 8 pairs" in answer.out
    assert "votes.jsonl: columns that were not used: notes" in answer.err
    answer = run("evaluate", folder, "--pairs.path=votes.jsonl", f"--pairs.columns={CODED}", "--to=votes")
    assert answer.status == 0, answer.err
    assert "pairs: votes.jsonl: 8 of 12 rows used; skipped 4 tie" in answer.err
    assert "pairs: votes.jsonl: columns that were not used: notes" in answer.err
    result = json.loads(Path("votes", "evaluation.json").read_text())
    assert result["pairs"]["overall"]["count"] == 8
    assert result["pairs"]["overall"]["accuracy"]["mean"] == pytest.approx(sum(better) / len(better))
