"""SmolLM2-135M-Instruct, a few real rows, and the command line inside this process, for the tests in ``real``."""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import json
import math
import re
import shutil
import sys
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

ROOT = Path(__file__).parents[1]
MODEL = ROOT / ".envs" / "smollm2"
needs_model = [
    pytest.mark.soak,
    pytest.mark.skipif(not (MODEL / "complete").exists(), reason="no real model: make .envs/smollm2/complete"),
]
BASE = f"--model.base.name={MODEL}"
LORA = (BASE, "--model.base.lora.rank=8")
FRANCE = [{"role": "user", "content": "What is the capital of France?"}]


@dataclass
class Said:
    """What a command printed."""

    out: str
    err: str


class Run:
    """A finished run's folder, and the rows of its ``metrics.csv``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with (folder / "metrics.csv").open(newline="") as file:
            rows = [{name: float(x) for name, x in row.items() if x} for row in csv.DictReader(file)]
        assert all(math.isfinite(x) for row in rows for x in row.values()), rows
        self.steps = [row for row in rows if "train/loss" in row]
        self.validations = [row for row in rows if "train/loss" not in row]

    @property
    def hf(self) -> Path:
        """The model that the run left."""
        return self.folder / "hf"

    def column(self, name: str) -> list[float]:
        """A metric, one number for each step."""
        return [row[name] for row in self.steps]

    def rollouts(self) -> list[dict[str, Any]]:
        """Everything that its rollouts were made of."""
        return [torch.load(path, weights_only=True) for path in sorted((self.folder / "rollouts").iterdir())]

    def samples(self) -> list[dict[str, Any]]:
        """The lines of ``samples.jsonl``."""
        return [json.loads(line) for line in (self.folder / "samples.jsonl").read_text().splitlines()]


class Place:
    """A working folder with a few rows of real data, in which commands run."""

    def __init__(self, folder: Path, data: Path) -> None:
        self.folder = folder
        book = data / "rasbt_llm_book"
        answers = json.loads((book / "instruction-data.json").read_text())
        pairs = json.loads((book / "instruction-data-with-preference.json").read_text())
        judged = sorted(json.loads((data / "llamafactory_demo" / "kto_en_demo.json").read_text()), key=repr_length)
        prompts = [json.loads(line) for line in (data / "ifeval" / "input_data.jsonl").open()]
        commas = [row for row in prompts if row["instruction_id_list"] == ["punctuation:no_comma"]]
        self.rows = {
            "answers": answers[:8],
            "pairs": [row for row in pairs if row["chosen"] != row["rejected"]][:8],
            "judged": [row for label in (True, False) for row in [r for r in judged if r["label"] is label][:3]],
            "no_commas": sorted(commas, key=repr_length)[:4],
        }
        for name, rows in self.rows.items():
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(self, *argv: object, typed: str = "", ends: int = 0) -> Said:
        """Run one command, which must end with a status; ``typed``: its standard input."""
        from rlhf_lit.__main__ import main

        out, err = io.StringIO(), io.StringIO()
        places = (contextlib.chdir(self.folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err))
        with contextlib.ExitStack() as stack, warnings.catch_warnings():
            for place in places:
                stack.enter_context(place)
            stack.enter_context(mock.patch.object(sys, "stdin", io.StringIO(typed)))
            status = main([str(word) for word in argv])
        torch.set_grad_enabled(True)
        gc.collect()
        assert status == ends, err.getvalue()
        assert "Traceback" not in err.getvalue()
        return Said(out.getvalue(), err.getvalue())

    def fit(self, name: str, algorithm: str, data: str, *options: object) -> Run:
        """Train, and read what was left."""
        self.command("fit", f"--model={algorithm}", f"--data={data}", *options, *CPU, f"--name={name}")
        return Run(self.folder / "runs" / name / "version_0")


# A checkpoint of all weights has 1.6 GB: the last step's alone.
CPU = (
    "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", "--data.cache=null",
    "--checkpoint.every_n_train_steps=100", "--seed_everything=0",
)  # fmt: skip


def repr_length(row: Any) -> int:
    """How long a row is, about."""
    return len(json.dumps(row))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, real_data: Path) -> Iterator[Place]:
    """A module's working folder; it holds gigabytes, and goes with the module."""
    folder = tmp_path_factory.mktemp("real_model")
    yield Place(folder, real_data)
    shutil.rmtree(folder)


def rendered(row: dict[str, str], answer: str) -> tuple[list[int], list[int]]:
    """The token ids of a row's prompt and of an answer up to its EOS, by plain transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    asked = "\n\n".join(filter(None, (row["instruction"], row["input"])))
    turns = [{"role": "user", "content": asked}]
    prompt = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    whole = tokenizer.apply_chat_template([*turns, {"role": "assistant", "content": answer}], tokenize=False)
    assert whole.startswith(prompt)
    assert whole.endswith("<|im_end|>\n")
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    return ids, tokenizer(whole.removesuffix("\n"), add_special_tokens=False)["input_ids"][len(ids) :]


@torch.no_grad()
def answer_logprob(model: Any, row: dict[str, str], answer: str) -> tuple[float, int]:
    """Σ log π of an answer's tokens and their number, by plain transformers."""
    prompt, tokens = rendered(row, answer)
    logits = model(input_ids=torch.tensor([prompt + tokens])).logits[0, len(prompt) - 1 : -1]
    found = logits.float().log_softmax(-1).gather(-1, torch.tensor(tokens)[:, None])
    return float(found.sum()), len(tokens)


def greedy(folder: Path, turns: list[dict[str, str]] = FRANCE) -> tuple[str, bool]:
    """What plain transformers answers from a folder by its own defaults, and whether it stops by itself."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    found = model.generate(**asked, max_new_tokens=48, do_sample=False)[0, asked["input_ids"].shape[1] :]
    return tokenizer.decode(found, skip_special_tokens=True), int(found[-1]) == tokenizer.eos_token_id


def gibibytes(said: str, line: str) -> float:
    """A number of the table that ``memory`` prints."""
    found = re.search(rf"^{re.escape(line)} +([\d.]+) (GiB|MiB)$", said, re.M)
    assert found, said
    return float(found[1]) / (1 if found[2] == "GiB" else 1024)
