"""Files that are absent, empty, broken or mixed, through the command line: a counted skip, or one line and status 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

INSTRUCTION = {
    "instruction": "Explain quantum computing in simple terms.",
    "response": "A quantum computer tries many answers at once.",
}
PAIR = {"prompt": "What is 2+2?", "chosen": "2+2 equals 4.", "rejected": "2+2 equals 5."}

DATA = {"SFT": "SFTDataModule", "DPO": "PreferenceDataModule", "PPO": "RolloutDataModule"}


def constant(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """A reward function that likes everything alike."""
    return [0.0] * len(responses)


@pytest.fixture
def fit(command: Callable[..., Any]) -> Callable[..., Any]:
    """One step of an algorithm on rows of a file."""

    def call(algorithm: str, path: object, *argv: object) -> Any:
        extra: tuple[str, ...] = ()
        if algorithm == "DPO":
            extra = ("--model.loss=DPOLoss", "--model.loss.beta=0.1")
        elif algorithm == "PPO":
            extra = (
                "--model.reward=RewardFromFunction", "--model.reward.function=test_bad_input.constant",
                "--model.kl=FixedKL", "--model.kl.beta=0.1", "--model.critic.init=policy",
                "--data.rollout_size=2", "--data.batch_size=2",
            )  # fmt: skip
        return command(
            "fit", f"--model={algorithm}", "--model.base.name=playground", "--model.base.fresh=true",
            "--model.sampling.max_new_tokens=2", f"--data={DATA[algorithm]}", *extra,
            f"--data.train.path={path}", "--data.cache=null",
            "--trainer.max_steps=1", "--trainer.accelerator=cpu", *argv,
        )  # fmt: skip

    return call


def write(rows: list[Any], name: str = "rows.jsonl") -> Path:
    path = Path(name)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def refused(answer: Any) -> str:
    """The one line of an answer that refuses."""
    assert answer.status == 2
    assert "Traceback" not in answer.err
    (line,) = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    return line


ALL = pytest.mark.parametrize("algorithm", ["SFT", "DPO", "PPO"])


@ALL
def test_a_missing_file(fit, algorithm):
    assert refused(fit(algorithm, "nowhere.jsonl")) == "error: no such file: nowhere.jsonl"


@ALL
@pytest.mark.parametrize("name", ["empty.jsonl", "empty.json", "empty.csv", "empty.txt"])
def test_an_empty_file(fit, algorithm, name):
    Path(name).write_text("[]" if name == "empty.json" else "")
    assert "empty." in (line := refused(fit(algorithm, name)))
    assert "has no rows" in line


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"prompt": "a", "completion": "b"}\n{"prompt": \n', "rows.jsonl, line 2: not valid JSON"),
        (b"\xff\xfe\x00rows", "rows.jsonl, line 1: not UTF-8 text"),
        ('{"foo": "a", "bar": "b"}\n', "columns bar, foo have no known shape of demonstrations"),
        ("3\n4\n", "columns (none) have no known shape"),
    ],
)
def test_a_file_that_holds_something_else(fit, content, complaint):
    Path("rows.jsonl").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert complaint in refused(fit("SFT", "rows.jsonl"))


# Each change makes a good row bad; the reason it is counted under.
BAD_INSTRUCTIONS = [
    ({"instruction": ""}, "empty instruction"),
    ({"instruction": "   "}, "empty instruction"),
    ({"instruction": None}, "null instruction"),
    ({"instruction": 42}, "non-text instruction"),
    ({"instruction": ["Explain"]}, "non-message instruction"),
    ({"response": ""}, "empty response"),
    ({"response": "\n"}, "empty response"),
    ({"response": None}, "null response"),
    ({"response": 3.5}, "non-text response"),
    ({"response": True}, "non-text response"),
]
BAD_PAIRS = [
    ({"prompt": ""}, "empty prompt"),
    ({"prompt": None}, "null prompt"),
    ({"prompt": 4}, "non-text prompt"),
    ({"chosen": ""}, "empty chosen"),
    ({"chosen": None}, "null chosen"),
    ({"chosen": 4}, "non-text chosen"),
    ({"rejected": ""}, "empty rejected"),
    ({"rejected": None}, "null rejected"),
    ({"rejected": {"text": "2+2 equals 5."}}, "unknown role"),
    ({"rejected": "2+2 equals 4."}, "chosen equals rejected"),
]


def reasons(bad: list[tuple[dict[str, Any], str]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for row, (_, reason) in enumerate(bad, start=1):
        found.setdefault(reason, []).append(row)
    return found


@pytest.mark.parametrize(
    ("algorithm", "good", "bad"), [("SFT", INSTRUCTION, BAD_INSTRUCTIONS), ("DPO", PAIR, BAD_PAIRS)]
)
def test_tutorial_rows_and_their_bad_relatives(fit, algorithm, good, bad):
    """Good rows train; each bad one is skipped, counted under its reason, and named by its number."""
    path = write([good, *[{**good, **change} for change, _ in bad], good])
    answer = fit(algorithm, path)
    assert answer.status == 0, answer.err
    (line,) = [line for line in answer.err.splitlines() if line.startswith("train: ")]
    assert line.startswith(f"train: rows.jsonl: 2 of {len(bad) + 2} rows used; skipped ")
    for reason, rows in reasons(bad).items():
        numbers = f"{'row' if len(rows) == 1 else 'rows'} {', '.join(map(str, rows))}"
        assert f"{len(rows)} {reason} ({numbers})" in line


@pytest.mark.parametrize(
    ("algorithm", "good", "change", "reason"),
    [("SFT", INSTRUCTION, *case) for case in BAD_INSTRUCTIONS] + [("DPO", PAIR, *case) for case in BAD_PAIRS],
)
def test_a_bad_row_is_fatal_where_the_user_says_so(fit, algorithm, good, change, reason):
    path = write([good, {**good, **change}])
    line = refused(fit(algorithm, path, "--data.on_bad_row=error"))
    assert line.startswith(f"error: rows.jsonl, row 1: {reason}; ")


@pytest.mark.parametrize(
    ("algorithm", "good", "bad"), [("SFT", INSTRUCTION, BAD_INSTRUCTIONS), ("DPO", PAIR, BAD_PAIRS)]
)
def test_no_good_row_is_left(fit, algorithm, good, bad):
    path = write([{**good, **change} for change, _ in bad])
    line = refused(fit(algorithm, path))
    assert line.startswith(f"error: no usable row in rows.jsonl: rows.jsonl: 0 of {len(bad)} rows used; skipped ")


def test_rows_that_are_too_long_are_counted_too(fit):
    long = {**INSTRUCTION, "response": "very " * 200}
    answer = fit("SFT", write([INSTRUCTION, long]), "--data.max_length=128")
    assert answer.status == 0, answer.err
    assert "1 of 2 rows used; skipped 1 over-long (row 1)" in answer.err
    assert "over-long (row 0)" in refused(fit("SFT", write([long]), "--data.max_length=128", "--name=second"))
