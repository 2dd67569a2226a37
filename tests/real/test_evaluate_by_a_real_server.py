"""``evaluate`` with a real server: vLLM's, which serves a real model on the CPU, as the baseline and as the judge."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
VLLM, MODEL = ROOT / ".envs" / "vllm", ROOT / ".envs" / "smollm2"
PATIENCE = 600.0  # seconds that the server may take to start; on two quiet cores it needs half a minute
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not (VLLM / "ready").exists(), reason="no vLLM: make .envs/vllm/ready"),
    pytest.mark.skipif(not (MODEL / "complete").exists(), reason="no real model: make .envs/smollm2/complete"),
]
QUESTIONS = ["What is the capital of France?", "What is the capital of Italy?", "Name a fruit.", "What is 2 plus 2?"]


@pytest.fixture(scope="module")
def base_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a server that runs until the tests are through. The program `vllm` would ask for a package of that name, which
    the CPU's build is not."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url, log = f"http://127.0.0.1:{port}/v1", tmp_path_factory.mktemp("server") / "log"
    words = ["--model", str(MODEL), "--served-model-name", "smollm2", "--host", "127.0.0.1", "--port", str(port)]
    words += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    with log.open("w") as file:
        server = subprocess.Popen(
            [VLLM / "bin" / "python", "-m", "vllm.entrypoints.openai.api_server", *words],
            env={**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": ""},
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + PATIENCE
        while not _answers(url):
            assert server.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)
        yield url
    finally:
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def _answers(url: str) -> bool:
    with suppress(OSError), urllib.request.urlopen(f"{url}/models") as answer:
        return bool(answer.status == 200)
    return False


def samples(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def evaluate(command: Callable, base_url: str, *options: str) -> Any:
    Path("questions.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question in QUESTIONS))
    server = f"{{base_url: '{base_url}', model: smollm2}}"
    # A model this small gives verdicts if it can say nothing else.
    choice = "structured_outputs: {choice: ['[[A]]', '[[B]]', '[[tie]]']}"
    judge = f"{{base_url: '{base_url}', model: smollm2, fields: {{{choice}}}}}"
    return command(
        "evaluate", MODEL, "--prompts.path=questions.jsonl", "--sampling.max_new_tokens=24",
        f"--baseline={server}", "--judge=ServerJudge", f"--judge.server={judge}", "--judge.max_tokens=64", *options,
    )  # fmt: skip


def test_the_same_model_here_and_there(command: Callable, base_url: str) -> None:
    """Nearly greedy, both say the same of the capital of France; the judge compares all, in both orders."""
    answer = evaluate(command, base_url, "--sampling.temperature=0.02", "--to=greedy")
    assert answer.status == 0, answer.err
    lines = samples("greedy")
    for line in lines[:1]:
        assert "Paris" in line["model"]
        assert line["model"] == line["baseline"]
        assert line["model/tokens"] == line["baseline/tokens"]
    result = json.loads(Path("greedy/evaluation.json").read_text())
    verdicts = result["verdicts"]["judge"]
    assert (verdicts["count"], verdicts["unreadable"]["mean"]) == (8, 0)
    for line in lines:
        for both in line["verdicts/judge"]:
            assert {both["model_first"]["words"], both["baseline_first"]["words"]} <= {"[[A]]", "[[B]]", "[[tie]]"}
    # Of two answers that are the same the outcome is ½, however biased the judge.
    first = lines[0]["verdicts/judge"][0]
    assert {first["model_first"]["winner"], first["baseline_first"]["winner"]} in ({"model", "baseline"}, {"tie"})


def test_seeds_are_the_rows_own(command: Callable, base_url: str) -> None:
    found = []
    for name in ("once", "twice"):
        answer = evaluate(command, base_url, "--samples=2", f"--to={name}", "--baseline.concurrency=1")
        assert answer.status == 0, answer.err
        found.append([line["baseline"] for line in samples(name)])
    assert found[0] == found[1]
    assert len(set(found[0])) > len(QUESTIONS)


def test_what_the_server_refuses_is_one_line(command: Callable, base_url: str) -> None:
    for option, complaint in (
        ("--baseline.model=gpt", "has no model 'gpt'; it has 'smollm2'"),
        ("--baseline.fields={max_tokens: 9000}", "refuses the request (400: max_tokens=9000 cannot be greater"),
    ):
        answer = evaluate(command, base_url, option)
        assert answer.status == 2
        assert answer.err.splitlines()[-1].startswith(f"error: baseline: the server {base_url} {complaint}")
