"""SFT of a real instruction-tuned model through the command line, and what is done with it: chat, memory, export."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from real_model import BASE, LORA, MODEL, Place, Run, answer_logprob, gibibytes, greedy, needs_model, place

pytestmark = needs_model
__all__ = ["place"]  # a fixture

ROWS = ("--data.train.path=answers.jsonl", "--data.batch_size=8", "--model.sampling.max_new_tokens=24")


@pytest.fixture(scope="module")
def plain() -> Any:
    """The model as plain transformers loads it."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def sft(place: Place) -> Run:
    """Three steps on the same eight rows, in whole weights."""
    rate = ("--model.learning_rate=2e-5", "--trainer.max_steps=3")
    held_out = ("--data.validation.path=answers.jsonl", "--data.validation.limit=4")
    return place.fit("sft", "SFT", "SFTDataModule", BASE, *rate, *ROWS, *held_out)


@pytest.fixture(scope="module")
def adapter(place: Place) -> Run:
    """The same with LoRA."""
    rate = ("--model.learning_rate=2e-3", "--trainer.max_steps=3")
    return place.fit("lora", "SFT", "SFTDataModule", *LORA, *rate, *ROWS)


@pytest.fixture(scope="module")
def four_bits(place: Place) -> Run:
    """And on a base of 4 bits."""
    rate = ("--model.learning_rate=2e-3", "--trainer.max_steps=3", "--model.base.quantization.type=nf4")
    return place.fit("nf4", "SFT", "SFTDataModule", *LORA, *rate, *ROWS)


def loss_of(model: Any, place: Place) -> float:
    """−Σ log π / tokens of the rows' answers."""
    found = [answer_logprob(model, row, row["output"]) for row in place.rows["answers"]]
    return -sum(logprob for logprob, _ in found) / sum(tokens for _, tokens in found)


def test_the_first_loss_is_transformers_own(place: Place, plain: Any, sft: Run, adapter: Run) -> None:
    """The same tokens are learned, through the model's own template, its EOS included."""
    expected = loss_of(plain, place)
    for run in (sft, adapter):
        assert run.column("train/loss")[0] == pytest.approx(expected, abs=1e-4)
        falling = run.column("train/loss")
        assert falling[0] > falling[1] > falling[2]
    assert sft.validations[-1]["val/loss"] < falling[0]


def test_plain_transformers_reads_what_was_trained(place: Place, sft: Run) -> None:
    """It still knows and still stops, and is the model of the last step."""
    from transformers import AutoModelForCausalLM

    text, stopped = greedy(sft.hf)
    assert "Paris" in text
    assert stopped, text
    trained = AutoModelForCausalLM.from_pretrained(sft.hf).eval()
    assert loss_of(trained, place) < sft.column("train/loss")[-1]


def test_samples_are_answers_to_the_rows(place: Place, sft: Run) -> None:
    """After each validation, to the prompts of its rows."""
    samples = sft.samples()
    assert {sample["step"] for sample in samples} == {1, 2, 3}
    samples = [sample for sample in samples if sample["step"] == 3]
    asked = ["\n\n".join(filter(None, (row["instruction"], row["input"]))) for row in place.rows["answers"]]
    assert [sample["prompt"] for sample in samples] == asked[:4]
    assert any(sample["ended"] for sample in samples)
    assert not any("<|im" in sample["response"] for sample in samples)


def test_chat_answers(place: Place, sft: Run) -> None:
    said = place.command("chat", "runs/sft", "--sampling.temperature=0.01", typed="What is the capital of France?\n")
    assert said.out.strip() == "The capital of France is Paris."
    assert not said.err


def test_an_adapter_is_merged(place: Place, plain: Any, adapter: Run) -> None:
    assert (adapter.hf / "adapter_model.safetensors").stat().st_size < 20e6
    place.command("export", "runs/lora", "--merge", "--to=merged", "--dtype=float32")
    text, stopped = greedy(place.folder / "merged")
    assert "Paris" in text
    assert stopped
    trained = whole_and_adapted(place.folder / "merged", adapter)
    assert trained["merged"] == pytest.approx(trained["adapted"], abs=1e-3)
    assert abs(trained["merged"] - answer_logprob(plain, *trained["asked"])[0]) > 0.1, "it has learned something"


def whole_and_adapted(merged: Path, run: Run) -> dict[str, Any]:
    """Σ log π of one answer by the merged weights, and by peft with the adapter on its base."""
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    row = {"instruction": "What is the capital of France?", "input": ""}
    asked = (row, "The capital of France is Paris.")
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    adapted = AutoPeftModelForCausalLM.from_pretrained(run.hf, dtype=torch.float32).eval()
    return {
        "asked": asked,
        "merged": answer_logprob(whole, *asked)[0],
        "adapted": answer_logprob(adapted, *asked)[0],
    }


def test_four_bits_train_and_are_exported(place: Place, plain: Any, four_bits: Run) -> None:
    """nf4 costs this model something, and training wins it back: first loss above the whole base's, but near."""
    losses = four_bits.column("train/loss")
    exact = loss_of(plain, place)
    assert exact - 0.1 < losses[0] < exact + 0.5
    assert losses[0] > losses[1] > losses[2]
    assert json.loads((four_bits.hf / "base.json").read_text())["quantization"]["type"] == "nf4"
    place.command("export", "runs/nf4", "--merge", "--to=merged_4bit")
    text, stopped = greedy(place.folder / "merged_4bit")
    assert "Paris" in text
    assert stopped


@pytest.fixture(scope="module")
def weights() -> Iterator[int]:
    """Parameters of the base, counted in its file."""
    from safetensors import safe_open

    with safe_open(MODEL / "model.safetensors", "pt") as file:
        yield sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118


def test_memory_is_told(place: Place, weights: int) -> None:
    """Without and with adapters: what is held is what the weights' file says."""
    short = (*ROWS, "--data.max_length=64", "--limit_gb=16", "--trainer.accelerator=cpu")
    whole = place.command("memory", "--model=SFT", "--data=SFTDataModule", BASE, *short).out
    gib = weights * 4 / 2**30
    for line, times in (("held: weights", 1), ("held: gradients, within a step", 1), ("held: optimizer state", 2)):
        assert gibibytes(whole, line) == pytest.approx(times * gib, rel=0.01)
    adapters = place.command("memory", "--model=SFT", "--data=SFTDataModule", *LORA, *short).out
    assert gibibytes(adapters, "held: weights") == pytest.approx(gib, rel=0.01)
    assert gibibytes(adapters, "held: optimizer state") < 0.05
    assert gibibytes(adapters, "peak, update") < gibibytes(whole, "peak, update") - 2 * gib
