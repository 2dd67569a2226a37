"""What a model says and what a row holds never act on a terminal: through the commands that show some of it."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_lit import __main__ as front_door
from rlhf_lit.errors import printable

ACTING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
# Clears the screen, sets the title, rings, turns the writing around, and C1's introducer of sequences.
EVIL = "\x1b[2J\x1b]0;title\x07 a\u202eb\x9b31m \x7f[/b]"
SHOWN = r"\u001b[2J\u001b]0;title\u0007 a\u202eb\u009b31m \u007f[/b]"


def lines(name: str, *rows: dict) -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return name


def harmless(answer, status: int) -> str:
    assert answer.status == status, answer.err
    assert not ACTING.search(answer.out + answer.err)
    return answer.out + answer.err


def test_what_is_printable() -> None:
    assert printable(EVIL) == SHOWN
    assert printable("a\tb\nc\r\nd\re \u200f é 日本 👩‍🔬") == "a\tb\nc\nd\\u000de \u200f é 日本 👩‍🔬"
    assert printable("\ud800") == r"\ud800"
    for code in (*range(32), *range(127, 160)):
        assert (printable(chr(code)) == chr(code)) == (chr(code) in "\n\t")


def test_chat_is_harmless_at_a_terminal_and_whole_in_a_pipe(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of random weights over bytes says all kinds of things."""

    def chat() -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("hi\n"))
        return run("chat", "tiny", "--sampling.max_new_tokens=100").out

    piped = chat()
    assert len(set(ACTING.findall(piped))) > 2
    assert chat() == piped
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = chat()
    assert shown == printable(piped)
    assert not ACTING.search(shown)


def test_evaluate_shows_prompts_and_responses_side_by_side(run: Callable) -> None:
    rows = lines("evil.jsonl", *({"prompt": f"{EVIL} {i}", f"kind{EVIL}": "x"} for i in range(3)))
    options = ["--sampling.max_new_tokens=60", "--baseline=tiny", "--judge=RewardFromFunction"]
    answer = run("evaluate", "tiny", f"--prompts.path={rows}", *options, "--judge.function=test_command_line.brevity")
    said = harmless(answer, 0)
    assert "side by side" in said
    assert SHOWN[:10] in said
    assert f"for rewards alone: kind{SHOWN}" in said


def test_training_tells_of_rows_and_columns(run: Callable) -> None:
    good = {"prompt": f"{EVIL}?", "completion": f"{EVIL}!", f"note {EVIL}": "some text that is not used"}
    rows = lines(f"{EVIL[:4]}.jsonl", *([good] * 8))
    few = ["--config=sft.yaml", "--trainer.max_steps=1", "--data.validation=null", f"--data.train.path={rows}"]
    said = harmless(run("fit", *few), 0)
    assert f"train: {SHOWN[:9]}.jsonl: columns that were not used: note {SHOWN}" in said
    assert "passed" in said  # preflight's table
    lines("unknown.jsonl", {EVIL: "x"})
    assert SHOWN in harmless(run("fit", *few, "--data.train.path=unknown.jsonl"), 2)
    assert SHOWN[:9] in harmless(run("fit", *few, f"--data.train.path={EVIL[:4]}"), 2)


@pytest.mark.parametrize(
    "argv",
    [
        [EVIL],
        ["fit", f"--config={EVIL}"],
        ["fit", f"--{EVIL}=1"],
        ["fit", "--config=sft.yaml", f"--model.learning_rate={EVIL}"],
        ["fit", "--config=sft.yaml", f"--model.base.name=runs/{EVIL}"],
        ["fit", "--config=sft.yaml", f"--name={EVIL}"],
        ["configs", "copy", EVIL],
        ["sweep", EVIL],
        ["chat", f"./{EVIL}"],
        ["report", EVIL, "--out=out"],
        ["export", f"./{EVIL}"],
    ],
    ids=lambda argv: " ".join(argv).replace(EVIL, "X"),
)
def test_error_lines(run: Callable, argv: list[str]) -> None:
    said = harmless(run(*argv), 2)
    assert r"\u001b" in said or r"\x1b" in said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1


def test_scores_as_lines_of_json(run: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a terminal they are the same JSON, otherwise written."""
    assert run("fit", "--config=reward.yaml", "--trainer.max_steps=1", "--preflight=false").status == 0
    rows = lines("evil.jsonl", {"prompt": EVIL, "completion": EVIL})
    piped = run("score", "runs/rewardmodel", rows, "--to=-")
    assert piped.status == 0, piped.err
    assert "\x9b" in piped.out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    shown = run("score", "runs/rewardmodel", rows, "--to=-")
    assert not ACTING.search(shown.out)
    assert json.loads(shown.out) == json.loads(piped.out)
    assert json.loads(shown.out)["prompt"] == EVIL


def test_a_bug_is_harmless_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(sys, "argv", ["rlhf-lit"])
    assert front_door.main() == 0
    try:
        raise RuntimeError(EVIL)
    except RuntimeError:
        sys.excepthook(*sys.exc_info())
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):\n")
    assert said.endswith(f"RuntimeError: {SHOWN}\n")
