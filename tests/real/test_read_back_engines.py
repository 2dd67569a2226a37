"""A real model, trained and merged by our commands, as vLLM and llama.cpp read it: greedy answers equal ours.

Each engine stands in an environment of its own, which ``make soak`` makes (``make .envs/vllm/ready`` alone). The model
is SmolLM2-135M-Instruct, since llama.cpp's converter refuses tokenizers that it does not know.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.batches import Sequences
from rlhf_lit.data.chat import ChatFormat
from rlhf_lit.data.rows import Message
from rlhf_lit.models.base import Base
from rlhf_lit.rollout.engine import Sampling, sample

ROOT = Path(__file__).parents[2]
READERS = Path(__file__).parent / "readers"
VLLM, LLAMA = ROOT / ".envs" / "vllm", ROOT / ".envs" / "llama"
MODEL = ROOT / ".envs" / "smollm2"
needs_vllm = pytest.mark.skipif(not (VLLM / "ready").exists(), reason="no vLLM: make .envs/vllm/ready")
needs_llama = pytest.mark.skipif(not (LLAMA / "ready").exists(), reason="no llama.cpp: make .envs/llama/ready")
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not (MODEL / "complete").exists(), reason="no real model: make .envs/smollm2/complete"),
]

TOKENS = 32  # longest answer; those of the trained model are shorter, and stop by themselves
CONVERSATIONS = [
    [{"role": "user", "content": "What is 3 plus 4?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 7 plus 8?"}],
    [
        {"role": "user", "content": "What is 2 plus 2?"},
        {"role": "assistant", "content": "2 plus 2 is 4."},
        {"role": "user", "content": "What is the capital of France?"},
    ],
]


@dataclass
class Answered:
    """A prompt and its greedy answer.

    Attributes:
        prompt, tokens: their ids, the answer's stop token included.
        text: of the answer, without special tokens.
        ended: it stopped by itself.
    """

    prompt: list[int]
    tokens: list[int]
    text: str
    ended: bool


@dataclass
class Trained:
    """A run, its merged export, and what the run's own model answers."""

    merged: Path
    module: SFT
    answers: list[Answered]

    @property
    def row(self) -> list[int]:
        """The last conversation, with its answer."""
        return self.answers[-1].prompt + self.answers[-1].tokens


def answers_of(module: SFT) -> list[Answered]:
    """Greedy answers by the sampler of our rollouts."""
    tokenizer = module.tokenizer
    chat = ChatFormat(tokenizer)
    prompts = [chat.prompt([Message(**turn) for turn in turns]) for turns in CONVERSATIONS]
    asked = Sequences.pad(prompts, [[False] * len(prompt) for prompt in prompts])
    found = sample(module.trained_model, asked, None, module.sampling, (tokenizer.eos_token_id,))
    rows = [tokens[mask].tolist() for tokens, mask in zip(found.sequences.tokens, found.sequences.mask, strict=True)]
    return [
        Answered(prompt, row, tokenizer.decode(row, skip_special_tokens=True), ended)
        for prompt, row, ended in zip(prompts, rows, found.ended.tolist(), strict=True)
    ]


def model_of(name: str) -> SFT:
    module = SFT(Base(name=name, dtype="float32"), sampling=Sampling(max_new_tokens=TOKENS))
    module.configure_model()
    module.eval()
    return module


def run(argv: list[object], folder: Path, standard_input: str | None = None, **variables: str) -> None:
    environment = {**os.environ, **variables}
    words = [str(word) for word in argv]
    done = subprocess.run(words, input=standard_input, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """Eight steps of SFT with LoRA through the command line, merged by ``export``."""
    place = tmp_path_factory.mktemp("engines")
    sums = [(i, j) for i in range(2, 10) for j in range(2, 10)]
    rows = [{"prompt": f"What is {i} plus {j}?", "response": f"{i} plus {j} is {i + j}."} for i, j in sums]
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command, ours = [sys.executable, "-m", "rlhf_lit"], {"PYTHONPATH": str(ROOT)}
    options = (
        "--model=SFT", f"--model.base.name={MODEL}", "--model.base.dtype=float32", "--model.base.lora.rank=8",
        "--model.learning_rate=2e-3", "--model.sampling.max_new_tokens=4", "--data=SFTDataModule",
        "--data.train.path=sums.jsonl", "--data.batch_size=4", "--data.cache=null", "--trainer.max_steps=8",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--name=sums",
    )  # fmt: skip
    run([*command, "fit", *options], place, **ours)
    run([*command, "export", "runs/sums", "--merge", "--dtype=float32", "--to=merged"], place, **ours)
    module = model_of(str(place / "runs" / "sums"))
    answers = answers_of(module)
    assert [answer.text for answer in answers][:2] == ["3 plus 4 is 7.", "7 plus 8 is 15."]
    assert all(answer.ended for answer in answers)
    # A reader that saw the base alone would be found out.
    assert [answer.tokens for answer in answers_of(model_of(str(MODEL)))] != [answer.tokens for answer in answers]
    return Trained(place / "merged", module, answers)


def read(program: str, python: Path, model: Path, trained: Trained, scratch: Path) -> dict[str, Any]:
    """What a reader makes of the conversations, and of the last one with our answer."""
    request = {"conversations": CONVERSATIONS, "tokens": TOKENS, "row": trained.row}
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    run([python, READERS / program, model, scratch / "answers.json"], scratch, json.dumps(request), **settings)
    found: dict[str, Any] = json.loads((scratch / "answers.json").read_text())
    return found


def off_by(logprobs: list[float], trained: Trained) -> float:
    """The largest difference of a log-prob of that row's tokens to ours. Frequencies of a tenth in the rotary embedding
    leave all three answers as they are, and move one of these by 0.5."""
    row = trained.row
    with torch.no_grad():
        logits = trained.module.trained_model(input_ids=torch.tensor([row])).logits[0, :-1]
    ours = logits.log_softmax(-1)[torch.arange(len(row) - 1), row[1:]]
    return float((torch.tensor(logprobs) - ours).abs().max())


@needs_vllm
def test_vllm(trained: Trained, tmp_path: Path) -> None:
    """vLLM applies the chat template, decodes greedily and stops by itself: token for token what we sample."""
    found = read("with_vllm.py", VLLM / "bin" / "python", trained.merged, trained, tmp_path)
    assert [Answered(**row) for row in found["rows"]] == trained.answers
    off = off_by(found["logprobs"], trained)
    print(f"largest difference of a log-prob in vLLM: {off:.2g}")
    assert off < 2e-4


# The tolerance is of log-probs, by the width of the GGUF's weights.
@needs_llama
@pytest.mark.parametrize(("width", "tolerance"), [("f32", 2e-4), ("f16", 3e-2)])
def test_llama_cpp(trained: Trained, tmp_path: Path, width: str, tolerance: float) -> None:
    """Through a GGUF of llama.cpp's own converter, in the environment that it asks for."""
    python, file = LLAMA / "bin" / "python", tmp_path / "model.gguf"
    converter = LLAMA / "llama.cpp" / "convert_hf_to_gguf.py"
    run([python, converter, trained.merged, "--outfile", file, "--outtype", width], tmp_path, HF_HUB_OFFLINE="1")
    found = read("with_llama_cpp.py", python, file, trained, tmp_path)
    for theirs, ours in zip(found["rows"], trained.answers, strict=True):
        assert theirs["prompt"] == ours.prompt
        assert theirs["read"] == len(ours.prompt), "no second BOS"
        assert (theirs["text"], theirs["ended"]) == (ours.text, ours.ended)
    off = off_by(found["logprobs"], trained)
    print(f"largest difference of a log-prob in {width}: {off:.2g}")
    assert off < tolerance
