"""``evaluate`` with a server as the baseline and as the judge, on loopback, which fails now and then."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import KEY, MODEL, ChatServer, Failure, serving

from rlhf_lit.rollout import server as client

PROMPTS = ["--prompts.path=sft.jsonl", "--prompts.limit=6", "--sampling.max_new_tokens=6"]
FUNCTION = ["--judge=RewardFromFunction", "--judge.function=test_evaluate_with_a_server.length"]


def length(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """Characters."""
    return [float(len(response)) for response in responses]


def says(body: dict[str, Any]) -> Any:
    """As a judge: the answer that was shown first, but where a prompt says otherwise. Else what it was asked, with its
    seed; a reply to "add 1 …" is cut."""
    last = body["messages"][-1]["content"]
    if "[Answer A]" not in last:
        finish = "length" if last.startswith("add 1 ") else "stop"
        return {"message": {"content": f" {last}: {body.get('seed')} "}, "finish_reason": finish}
    if "add 2 and" in last:
        return "both the same [[tie]]"
    if "add 3 and" in last:
        return "no idea"
    if "add 4 and" in last:  # whatever the order, the answer of the model behind the server
        return "[[A]]" if re.search(r"\[Answer A\]\nadd 4 and 1: \d+\n", last) else "[[B]]"
    return "the first [[A]]"


@pytest.fixture
def there(monkeypatch: pytest.MonkeyPatch) -> Iterator[ChatServer]:
    monkeypatch.setattr(client, "FIRST_WAIT", 0.0)
    with serving(says) as server:
        yield server


def baseline(server: ChatServer) -> list[str]:
    return [f"--baseline.base_url={server.base_url}", f"--baseline.model={MODEL}"]


def judge(server: ChatServer) -> list[str]:
    return ["--judge=ServerJudge", f"--judge.server.base_url={server.base_url}", f"--judge.server.model={MODEL}"]


def found(folder: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(folder, "evaluation.json").read_text())
    return result


def samples(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def test_a_servers_answers_are_a_baseline(run: Callable, there: ChatServer) -> None:
    command = ["evaluate", "tiny", *PROMPTS, *FUNCTION, *baseline(there), "--samples=2", "--sampling.temperature=0.7"]
    answer = run(*command, "--to=first")
    assert answer.status == 0, answer.err
    probe, *asked = there.asked
    assert {**probe, "messages": [], "seed": 0} == {**asked[0], "messages": [], "seed": 0}
    assert len(asked) == 12
    for body in asked:
        [turn] = body["messages"]
        assert (turn["role"], turn["content"][:4]) == ("user", "add "), "not as our template renders it"
        assert 0 <= body["seed"] < 2**31
        assert set(body) == {"model", "messages", "max_tokens", "temperature", "seed"}
        assert (body["model"], body["max_tokens"], body["temperature"]) == (MODEL, 6, 0.7)
    assert len({body["seed"] for body in asked}) == 12
    lines = samples("first")
    for line in lines:
        assert line["baseline"].startswith(f"{line['prompt']}: "), "beside its own prompt"
    assert sorted(int(line["baseline"].split()[-1]) for line in lines) == sorted(body["seed"] for body in asked)
    result = found("first")
    assert result["baseline"] == f"{MODEL} at {there.base_url}"
    assert result["responses"]["baseline"]["ended"]["mean"] == pytest.approx(5 / 6)
    assert f"note: baseline: 2 of 12 answers of {MODEL} at {there.base_url} were cut at 6 tokens" in answer.err
    ours = [line["model/judge"] for line in lines]
    assert [line["baseline/judge"] for line in lines] == length([], [line["baseline"] for line in lines], [])
    theirs = [line["baseline/judge"] for line in lines]
    points = [
        (ours[2 * i + a] > theirs[2 * i + b]) + (ours[2 * i + a] == theirs[2 * i + b]) / 2
        for i in range(6) for a in range(2) for b in range(2)
    ]  # fmt: skip
    assert result["win_rates"]["judge"]["win_rate"]["mean"] == pytest.approx(sum(points) / 24)
    # As if they came from a file.
    rows = [{"prompt": line["prompt"], "response": line["baseline"]} for line in lines]
    Path("own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(*command[:7], "--baseline=own.jsonl", *command[-2:], "--to=file").status == 0
    assert [line["baseline/tokens"] for line in samples("file")] == [line["baseline/tokens"] for line in lines]
    assert found("file")["win_rates"] == result["win_rates"]
    # The same seeds again, in whatever order requests go out, and others by another seed.
    there.asked = []
    assert run(*command, "--to=again", "--baseline.concurrency=1").status == 0
    assert samples("again") == lines
    assert run(*command, "--to=other", "--seed=1").status == 0
    assert not {line["baseline"] for line in samples("other")} & {line["baseline"] for line in lines}


def test_a_server_judges_both_orders(run: Callable, there: ChatServer) -> None:
    """Rows 0, 1, 5: whoever is first. Row 2: ties. Row 3: cannot be read. Row 4: the baseline, both times."""
    answer = run("evaluate", "tiny", *PROMPTS, *baseline(there), *judge(there), "--to=judged")
    assert answer.status == 0, answer.err
    result = found("judged")
    assert result["judges"] == {"judge": f"{MODEL} at {there.base_url}"}
    rate = result["win_rates"]["judge"]
    assert rate["win"]["mean"] == pytest.approx(3 * 0.5 / 6)
    assert rate["tie"]["mean"] == pytest.approx(2 / 6)
    assert rate["loss"]["mean"] == pytest.approx(2.5 / 6)
    assert rate["win_rate"]["mean"] == pytest.approx(2.5 / 6)
    assert rate["difference"]["mean"] == pytest.approx(-1 / 6)
    verdicts = result["verdicts"]["judge"]
    assert verdicts["count"] == 12
    assert verdicts["unreadable"]["mean"] == pytest.approx(2 / 12)
    assert verdicts["first"]["mean"] == pytest.approx(7 / 8)
    assert verdicts["consistent"]["mean"] == pytest.approx(3 / 6)
    for told in ("the one shown first, of those decided", "not readable, of 12 verdicts"):
        assert told in answer.out
    lines = samples("judged")
    assert [line["verdicts/judge"][0]["model_first"]["winner"] for line in lines] == [
        "model", "model", "tie", None, "baseline", "model",
    ]  # fmt: skip
    assert lines[2]["verdicts/judge"][0]["baseline_first"]["words"] == "both the same [[tie]]"
    shown = [text for text in there.shown if "[Answer A]" in text]
    pair = f"[Answer A]\n{lines[0]['model']}\n\n[Answer B]\n{lines[0]['baseline']}\n"
    assert sum(f"[Request]\nadd 0 and 1\n\n{pair}" in text for text in shown) == 1
    assert "judge" not in result["responses"]["model"]["scores"]


def test_failures_in_passing_change_nothing(run: Callable, there: ChatServer) -> None:
    command = ["evaluate", "tiny", *PROMPTS, *baseline(there), *judge(there)]
    assert run(*command, "--to=smooth").status == 0
    smooth = there.count
    rough = [
        None,
        Failure(503),
        None,
        Failure(),
        Failure(0, '{"choi'),
        None,
        None,
        Failure(429),
        Failure(200, "<html>"),
    ]
    there.failures = [*rough, *[None] * 5, *rough]
    answer = run(*command, "--to=rough")
    assert answer.status == 0, answer.err
    assert there.count - smooth == smooth + 10, "what was answered is not asked for again"
    assert samples("rough") == samples("smooth")
    assert found("rough")["win_rates"] == found("smooth")["win_rates"]


def test_a_dialogue_is_asked_turn_by_turn(run: Callable, there: ChatServer) -> None:
    turns = [
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "b"}, {"role": "user", "content": "c?"},
    ]  # fmt: skip
    Path("turns.jsonl").write_text(json.dumps({"prompt": turns}) + "\n")
    answer = run("evaluate", "tiny", "--prompts.path=turns.jsonl", *PROMPTS[2:], *baseline(there), *judge(there))
    assert answer.status == 0, answer.err
    assert [body["messages"] for body in there.asked].count(turns) == 1
    assert "[Request]\nSystem: Be brief.\n\nUser: a?\n\nAssistant: b\n\nUser: c?\n\n[Answer A]" in there.shown[-1]


def test_a_key_stands_in_the_environment_alone(
    run: Callable, there: ChatServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    there.key = KEY
    monkeypatch.setenv("TEACHER_KEY", KEY)
    Path("teacher.yaml").write_text(
        f"baseline: {{base_url: '{there.base_url}', model: {MODEL}, api_key_env: TEACHER_KEY}}\n"
        "judge: {class_path: ServerJudge, init_args: {server: "
        f"{{base_url: '{there.base_url}', model: {MODEL}, api_key_env: TEACHER_KEY}}}}}}\n"
    )
    answer = run("evaluate", "tiny", *PROMPTS, "--config=teacher.yaml", "--to=keyed")
    assert answer.status == 0, answer.err
    assert len(there.asked) == 2 + 6 + 12
    for file in Path("keyed").iterdir():
        assert KEY.encode() not in file.read_bytes()
    assert KEY not in answer.out + answer.err


REFUSED: list[tuple[list[str], str]] = [
    (["--baseline.retries=0"], "baseline: the server URL failed (500: out of memory); look at its log"),
    (["--baseline.model=large"], "baseline: the server URL has no model 'large'; it has 'teacher'"),
    (["--baseline.base_url=http://127.0.0.1:1/v1", "--baseline.retries=0"],
     "baseline: the server http://127.0.0.1:1/v1 cannot be reached"),
    (["--baseline.api_key_env=NO_SUCH_KEY"], "baseline.api_key_env: the environment variable NO_SUCH_KEY holds no key"),
    (["--baseline.concurrency=0"], "concurrency must be at least 1, not 0"),
    (["--baseline.retrys=1"], "baseline.retrys: unknown key; Server has base_url, model, api_key_env"),
    (["--baseline=http://127.0.0.1:1/v1"], "baseline: a server is named by its parts: --baseline.base_url="),
    (["--judge.server.timeout=0"], "timeout must be greater than 0, not 0.0"),
    (["--judge.template=better?"], "template shows no {first}"),
    (["--judge.server=null"], "judge.server.base_url, judge.server.model: required"),
    (["--best_of=[1]"], "best_of: the judge compares responses and scores none"),
    (["--baseline=null"], "judge: it compares responses with a baseline's, and there is none"),
    (["--prompts.path=tools.jsonl"], "baseline: row 0 of tools.jsonl has tools, and what a server answers"),
]  # fmt: skip


@pytest.mark.parametrize(("argv", "complaint"), REFUSED, ids=[" ".join(argv)[-40:] for argv, _ in REFUSED])
def test_bad_input_is_one_line(run: Callable, there: ChatServer, argv: list[str], complaint: str) -> None:
    tool = {"type": "function", "function": {"name": "now", "description": "the time", "parameters": {}}}
    Path("tools.jsonl").write_text(json.dumps({"prompt": "a", "tools": [tool]}) + "\n")
    if "retries=0" in argv[0]:
        there.always = Failure(500, json.dumps({"error": {"message": "out of memory"}}))
    answer = run("evaluate", "tiny", *PROMPTS, *baseline(there), *judge(there), *argv)
    assert answer.status == 2
    errors = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert complaint.replace("URL", there.base_url) in errors[0]
    assert "Traceback" not in answer.err
    assert not Path("runs").exists(), "nothing is written"


def test_a_server_that_is_lost_in_the_middle(run: Callable, there: ChatServer) -> None:
    """Once a word was had of it, it says no more than four answers."""
    there.failures = [None, None, *[None] * 4]
    there.always = Failure(400, "no more")
    answer = run("evaluate", "tiny", *PROMPTS, *baseline(there), *judge(there), "--baseline.concurrency=1")
    assert answer.status == 2
    assert answer.err.splitlines()[-1] == (
        f"error: baseline: the server {there.base_url} refuses the request (400: no more); 4 of 6 answers had come; "
        "set fields and sampling to what it takes"
    )


@pytest.mark.parametrize(("options", "who"), [(["--sampling.max_new_tokens=99"], "baseline"), ([], "judge.server")])
def test_what_a_server_refuses_shows_before_anything_is_sampled(
    run: Callable, there: ChatServer, options: list[str], who: str
) -> None:
    """A server has less room than our requests ask for; a file that is not there would be read next."""
    there.most_tokens = 64
    answer = run("evaluate", "tiny", "--prompts.path=none.jsonl", *baseline(there), *judge(there), *options)
    assert answer.status == 2
    assert answer.err.splitlines()[-1].startswith(
        f"error: {who}: the server {there.base_url} refuses the request (400: max_tokens="
    )


def test_an_answer_without_a_text(run: Callable, there: ChatServer) -> None:
    there.says = lambda body: {"message": {"content": None}, "finish_reason": "length"}
    answer = run("evaluate", "tiny", *PROMPTS, *FUNCTION, *baseline(there))
    assert answer.status == 2
    assert answer.err.splitlines()[-1] == (
        f"error: baseline: {MODEL} at {there.base_url} answered row 0 without a text (finish_reason 'length'); raise "
        "sampling.max_new_tokens"
    )
