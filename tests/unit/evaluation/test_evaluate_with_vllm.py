"""``evaluate`` on what vLLM draws, by a strict stand-in for the package."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "rollout"))

import vllm_double

from rlhf_lit.algorithms import SFT
from rlhf_lit.evaluation import answers, evaluate
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm, load_tokenizer
from rlhf_lit.rollout.engine import sample
from rlhf_lit.rollout.vllm_engine import VLLM, VLLMEngine

VLLM_OPTIONS = ["--vllm.dtype=float32", "--vllm.sleep=0"]
OPTIONS = ["--prompts.path=prompts.txt", "--template=none", "--sampling.max_new_tokens=5", *VLLM_OPTIONS]
FUNCTION = ["--judge=RewardFromFunction", "--judge.function=test_evaluate_with_vllm.letters"]


def letters(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A score that differs from response to response."""
    return [float(sum(map(ord, response)) % 7) for response in responses]


@pytest.fixture
def models(command: Callable, llama: str, monkeypatch: pytest.MonkeyPatch) -> list[vllm_double.LLM]:
    """A policy that is not its base, prompts, and the stand-in in vllm's place. → what was made of it."""
    base = Base(llama)
    other: Any = load_causal_lm(base)
    tiny.disturb(other, 0.1)
    other.save_pretrained("other")
    load_tokenizer(base).save_pretrained("other")
    Path("base").symlink_to(llama)
    Path("prompts.txt").write_text("".join(f"w{3 + i} w{9 + i} w5\n" if i % 2 else f"w{3 + i}\n" for i in range(6)))
    vllm_double.install(monkeypatch)
    monkeypatch.setattr(evaluate, "require_vllm", lambda device, ranks: None)
    return vllm_double.LLM.made


def found(folder: str) -> dict[str, Any]:
    result: dict[str, Any] = json.loads(Path(folder, "evaluation.json").read_text())
    return result


def samples(folder: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(folder, "samples.jsonl").read_text().splitlines()]


def weights(folder: str) -> dict[str, torch.Tensor]:
    return load_causal_lm(Base(folder)).state_dict()


def test_each_model_in_turn_and_several_samples(command: Callable, models: list[vllm_double.LLM]) -> None:
    plain = ["evaluate", "other", *OPTIONS, "--samples=2"]
    answer = command(*plain, *FUNCTION, "--baseline=base", "--reference=base", "--to=first")
    assert answer.status == 0, answer.err
    assert len(models) == 2
    for made, name in zip(models, ("other", "base"), strict=True):
        for key, weight in weights(name).items():
            assert made.weights[key].equal(weight), key
        assert made.closed, "nothing is left beside the next model, or the judge"
    result = found("first")
    assert result["settings"]["vllm"] == asdict(VLLM(dtype="float32", sleep=0))
    assert result["kl"]["exact"]["mean"] > 0
    lines = samples("first")
    assert len(lines) == 12
    assert len({line["model"] for line in lines}) > 6
    assert [line["model/judge"] for line in lines] == letters([], [line["model"] for line in lines], [])
    said = [line["model"] for line in lines]
    assert command(*plain, "--to=again", "--sampling.rows_at_once=2").status == 0
    assert [line["model"] for line in samples("again")] == said, "each row's noise is its own"
    assert command(*plain, "--to=seed", "--seed=1").status == 0
    assert [line["model"] for line in samples("seed")] != said


def test_without_it_transformers_draws(command: Callable, models: list[vllm_double.LLM]) -> None:
    assert command("evaluate", "other", *OPTIONS[:3], "--to=plain").status == 0
    assert not models
    assert "vllm" not in found("plain")["settings"], "of the same kind as evaluations of earlier versions"


def test_noise_is_not_evaluated(
    command: Callable, models: list[vllm_double.LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probs that are not the training forward's, whatever is drawn by them."""

    def off(made: Any, prompt: list[int], settings: Any) -> Any:
        found = told(made, prompt, settings)
        for position in found.logprobs:
            for token in position:
                position[token] = vllm_double.Logprob(position[token].logprob - 0.3)
        return found

    told = vllm_double.LLM._answer
    monkeypatch.setattr(vllm_double.LLM, "_answer", off)
    answer = command("evaluate", "other", *OPTIONS)
    assert answer.status == 2
    assert "error: other: sampler: its log-probs and those of the training forward 0.3 apart" in answer.err
    assert models[0].closed
    assert not Path("runs").exists()


def test_the_module_gets_its_own_sampler_back(models: list[vllm_double.LLM], llama: str) -> None:
    module = SFT(Base(llama))
    with answers.drawing_with(module, VLLM()):
        assert module.vllm == VLLM()
        assert isinstance(module.engine, VLLMEngine)
    assert module.engine is sample
    assert module.vllm is None


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (["--vllm.max_length=1"], "vllm.max_length must be at least 2 or null, not 1"),
        (["--vllm.max_length=5"], "sampling.max_new_tokens: 5 new tokens leave no prompt of prompts.txt room in the "
         "model's context of 2048, or in vllm.max_length, 5"),
        (["--sampling.temperature=0.005"], "sampling.temperature: vLLM raises 0.005 to 0.01"),
        (["--vllm.sleeps=1"], "vllm.sleeps: unknown key"),
        (["--prompts=null", "--pairs.path=pairs.jsonl"], "vllm: it speaks of responses, and there are no prompts"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line(
    command: Callable, models: list[vllm_double.LLM], argv: list[str], complaint: str
) -> None:
    answer = command("evaluate", "other", *OPTIONS, *argv)
    assert answer.status == 2
    [line] = [line for line in answer.err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {complaint}")
    assert "model." not in line


def test_prompts_that_its_cache_has_no_room_for_are_counted(command: Callable, models: list[vllm_double.LLM]) -> None:
    answer = command("evaluate", "other", *OPTIONS, "--vllm.max_length=7", "--to=short")
    assert answer.status == 0, answer.err
    assert "prompts.txt: 3 of 6 rows used; skipped 3 over-long for vllm.max_length (rows 1, 3, 5)" in answer.err
    assert len(samples("short")) == 3


def test_where_vllm_is_not_installed(command: Callable, llama: str) -> None:
    Path("prompts.txt").write_text("w3\n")
    answer = command("evaluate", llama, *OPTIONS)
    assert answer.status == 2
    assert answer.err.splitlines()[-1].startswith("error: vllm: vLLM is not installed: pip install 'rlhf-lit[vllm]'")
