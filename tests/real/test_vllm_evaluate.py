"""``evaluate`` on what a real vLLM draws, where there is one."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm, or pip install 'rlhf-lit[vllm]'")

ROOT = Path(__file__).parents[2]
MODEL = ROOT / ".envs" / "smollm2"
sys.path.insert(0, str(ROOT / "tests" / "unit"))

import tiny  # noqa: E402

SIZE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 2}
ENGINE = ["--vllm.dtype=float32", "--vllm.sleep=0", "--vllm.enforce_eager=true"]


def letters(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A score that differs from response to response."""
    return [float(sum(map(ord, response)) % 7) for response in responses]


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU vLLM's cache of keys and values takes as many GiB as this says, beside the tests that run with it."""
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")


def samples(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def test_two_models_of_different_sizes_in_turn(command: Callable) -> None:
    """Its log-probs are the training forward's, or ``evaluate`` would end; a second vLLM starts where one has ended."""
    tiny.save_model(Path("model"), **SIZE, max_position_embeddings=256, tie_word_embeddings=True)
    tiny.save_model(Path("base"), seed=1, **{**SIZE, "num_hidden_layers": 3}, max_position_embeddings=256)
    Path("prompts.txt").write_text("".join(f"w{3 + i} w{4 + i}\n" for i in range(24)))
    options = [
        "evaluate", "model", "--baseline=base", "--reference=model", "--prompts.path=prompts.txt", "--template=none",
        "--judge=RewardFromFunction", "--judge.function=test_vllm_evaluate.letters", "--samples=2", "--best_of=[1,2]",
        "--sampling.max_new_tokens=16", *ENGINE,
    ]  # fmt: skip
    for name in ("once", "twice"):
        answer = command(*options, f"--to={name}")
        assert answer.status == 0, answer.err
    lines = samples("once")
    assert samples("twice") == lines
    assert len(lines) == 48
    for name in ("model", "baseline"):
        assert len({line[name] for line in lines}) > 40
    result = json.loads(Path("once/evaluation.json").read_text())
    assert result["kl"]["exact"]["mean"] == 0, "our forward's, to itself"
    assert result["win_rates"]["judge"]["win_rate"]["low"] > 0


@pytest.mark.skipif(not (MODEL / "complete").exists(), reason="no real model: make .envs/smollm2/complete")
def test_a_real_model(command: Callable) -> None:
    Path("questions.jsonl").write_text(json.dumps({"prompt": "What is the capital of France?"}) + "\n")
    options = ["--prompts.path=questions.jsonl", "--samples=4", "--sampling.max_new_tokens=16"]
    answer = command(
        "evaluate", MODEL, *options, "--sampling.temperature=0.02", *ENGINE, "--vllm.max_length=256", "--to=real"
    )
    assert answer.status == 0, answer.err
    assert {line["model"] for line in samples("real")} == {"The capital of France is Paris."}
