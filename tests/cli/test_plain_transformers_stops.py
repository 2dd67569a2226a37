"""What ``fit`` and ``export`` leave stops in plain transformers where it stops here, in a process of its own.

In transformers 4.57 too, where ``make soak`` has made an environment for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_folders import save_small_model

from rlhf_lit.batches import Sequences
from rlhf_lit.models.anatomy import stop_ids
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm, load_tokenizer
from rlhf_lit.rollout.engine import Sampling, sample

ROOT = Path(__file__).parents[2]
EOS, OTHER = 2, 5
LONGEST = 40
PROMPTS = ["reverse lion.", "what is 1 plus 2?", "owl backwards?", "capital of france?", "say lamp.", "add 3 and 4."]
OLDER = ROOT / ".envs" / "transformers-4.57"
READERS = [
    pytest.param(sys.executable, "5.", id="transformers 5"),
    pytest.param(
        str(OLDER / "bin" / "python"),
        "4.57.",
        id="transformers 4.57",
        marks=[
            pytest.mark.soak,
            pytest.mark.skipif(
                not (OLDER / "ready").exists(), reason="no transformers 4.57: make .envs/transformers-4.57/ready"
            ),
        ],
    ),
]
SETTINGS = {
    "model": {"init_args": {"base": {"name": "model", "fresh": False}, "learning_rate": 0.003}},
    "data": {"init_args": {"cache": None, "batch_size": 8}},
    "trainer": {"max_steps": 20, "limit_val_batches": 1, "enable_progress_bar": False},
}
PLAIN = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, __version__
print(__version__)
folders, longest, prompts = json.loads(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
for folder, kind in folders.items():
    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = {}
    if kind == "adapter":
        from peft import AutoPeftModelForCausalLM
        model = AutoPeftModelForCausalLM.from_pretrained(folder)
        settings["generation_config"] = GenerationConfig.from_pretrained(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    answers = []
    for prompt in prompts:
        turns = [{"role": "user", "content": prompt}]
        tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        answer = model.generate(**tokens, max_new_tokens=longest, **settings)
        answers.append(answer[0, tokens["input_ids"].shape[1]:].tolist())
    print(json.dumps(answers))
assert "rlhf_lit" not in sys.modules
"""


def ours(folder: Path) -> list[list[int]]:
    """The likeliest tokens after each prompt, by our own engine."""
    base = Base(name=str(folder))
    model: Any = load_causal_lm(base)
    tokenizer = load_tokenizer(base)
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    rows = [tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in turns]
    prompts = Sequences.pad(rows, [[False] * len(row) for row in rows])
    found = sample(model, prompts, None, Sampling(max_new_tokens=LONGEST), stop_ids(tokenizer, model))
    sequences = found.sequences
    return [row[mask].tolist() for row, mask in zip(sequences.tokens, sequences.mask, strict=True)]


@pytest.mark.parametrize(("reader", "version"), READERS)
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_answers_end_where_ours_do(
    command: Callable[..., Any], tmp_path: Path, kind: str, reader: str, version: str
) -> None:
    save_small_model(tmp_path / "model")
    if kind == "full":  # a rotary embedding that is not the one taken by default; an adapter's base is as it came
        file = tmp_path / "model" / "config.json"
        rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}
        file.write_text(json.dumps({**json.loads(file.read_text()), "rope_parameters": rope}))
    for name in ("config.json", "generation_config.json"):  # a base whose files stop at another token
        file = tmp_path / "model" / name
        file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": OTHER}))
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(SETTINGS))
    world = ["--data.train.world.demonstrations=64", "--data.train.world.prompts=16", "--data.train.world.held_out=8"]
    overlay = [f"--config={ROOT / 'configs' / 'overlays' / 'lora.yaml'}"] if kind == "lora" else []
    configs = [f"--config={ROOT / 'configs' / 'sft' / 'quickstart.yaml'}", "--config=few.yaml", *overlay]
    said = command("fit", *configs, *world, "--name=sft")
    assert said.status == 0, said.err
    hf = tmp_path / "runs" / "sft" / "version_0" / "hf"
    options = ["--merge"] if kind == "lora" else ["--dtype=float32"]
    said = command("export", "runs/sft", *options, "--to=out")
    assert said.status == 0, said.err
    expected = ours(hf)
    ended = [row for row in expected if row[-1] == EOS and len(row) < LONGEST]
    assert len(ended) > 1
    assert ours(tmp_path / "out") == expected
    folders = {str(hf): "adapter" if kind == "lora" else "whole", str(tmp_path / "out"): "whole"}
    argv = [reader, "-c", PLAIN, json.dumps(folders), str(LONGEST), json.dumps(PROMPTS)]
    answered = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, check=True)
    found, *answers = answered.stdout.splitlines()
    assert found.startswith(version)
    assert [json.loads(line) for line in answers] == [expected, expected]
