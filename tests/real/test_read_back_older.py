"""Folders that ``fit`` and ``export`` leave, read by transformers 4.57 in an environment of its own.

``make soak`` makes it, or ``make .envs/transformers-4.57/ready`` alone. The greedy answers of small trained models are
held in tests/cli/test_plain_transformers_stops.py, by this version too; here are those of a real one.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))

from older_names import FAMILIES, SPEECHLESS, TOKENIZERS, base_of  # noqa: E402
from reading import look  # noqa: E402

from rlhf_lit.batches import Sequences  # noqa: E402
from rlhf_lit.models.anatomy import stop_ids  # noqa: E402
from rlhf_lit.models.base import Base  # noqa: E402
from rlhf_lit.models.loading import load_causal_lm, load_tokenizer  # noqa: E402
from rlhf_lit.models.saving import write_model  # noqa: E402
from rlhf_lit.rollout.engine import Sampling, sample  # noqa: E402

OLDER = ROOT / ".envs" / "transformers-4.57"
SMOLLM2 = ROOT / ".envs" / "smollm2"
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        not (OLDER / "ready").exists(), reason="no transformers 4.57: make .envs/transformers-4.57/ready"
    ),
]
ROWS = torch.randint(3, 40, (2, 40), generator=torch.Generator().manual_seed(1)).tolist()


def read(asked: dict[str, dict[str, Any]], scratch: Path) -> dict[str, Any]:
    """What transformers 4.57 makes of folders (see tests/reading.py)."""
    (scratch / "asked.json").write_text(json.dumps(asked))
    argv = [OLDER / "bin" / "python", ROOT / "tests" / "reading.py", scratch / "asked.json", scratch / "found.pt"]
    subprocess.run([str(word) for word in argv], check=True, capture_output=True, text=True, cwd=scratch)
    found: dict[str, Any] = torch.load(scratch / "found.pt", weights_only=True)
    assert found.pop("version").startswith("4.57.")
    return found


def test_it_computes_what_we_trained(tmp_path: Path) -> None:
    ours: dict[str, torch.Tensor] = {}
    for name, (kind, changes, _) in FAMILIES.items():
        base = base_of(tmp_path / "base" / name, kind, changes)
        model: Any = load_causal_lm(base)
        write_model(model, load_tokenizer(base), tmp_path / "saved" / name, scorer=False)
        with torch.no_grad():
            ours[name] = model(input_ids=torch.tensor(ROWS), use_cache=False).logits
    folders = {str(tmp_path / place / name): {"rows": ROWS} for place in ("base", "saved") for name in FAMILIES}
    theirs = read(folders, tmp_path)
    off = {}
    for place in ("base", "saved"):
        for name in FAMILIES:
            found = theirs[str(tmp_path / place / name)]
            off[place, name] = found if isinstance(found, str) else float((found - ours[name]).abs().max())
    for name in FAMILIES:
        saved, plain = off["saved", name], off["base", name]
        assert not isinstance(saved, str), (name, saved)
        assert saved < 1e-5, name
        # As transformers 5 itself leaves them, they are read as other models, or not at all.
        assert isinstance(plain, str) or plain > 1e-3, (name, plain)


def test_what_it_cannot_read_is_what_we_say(tmp_path: Path) -> None:
    ours = {}
    for name, (kind, changes, _) in SPEECHLESS.items():
        base = base_of(tmp_path / "base" / name, kind, changes)
        model: Any = load_causal_lm(base)
        write_model(model, load_tokenizer(base), tmp_path / name, scorer=False)
        with torch.no_grad():
            ours[name] = model(input_ids=torch.tensor(ROWS), use_cache=False).logits
    theirs = read({str(tmp_path / name): {"rows": ROWS} for name in SPEECHLESS}, tmp_path)
    for name, expected in ours.items():
        assert float((theirs[str(tmp_path / name)] - expected).abs().max()) > 1e-3, name


def test_it_cuts_texts_as_we_do(tmp_path: Path) -> None:
    model = load_causal_lm(base_of(tmp_path / "base", "llama", {}))
    ours = {}
    for name, make in TOKENIZERS.items():
        tokenizer = make()
        ours[name] = look(tokenizer)
        write_model(model, tokenizer, tmp_path / "saved" / name, scorer=False)
        tokenizer.save_pretrained(tmp_path / "plain" / name)
    folders: dict[str, dict[str, Any]] = {
        str(tmp_path / place / name): {} for place in ("saved", "plain") for name in TOKENIZERS
    }
    theirs = read(folders, tmp_path)
    for name, expected in ours.items():
        assert theirs[str(tmp_path / "saved" / name)] == expected, name
        assert theirs[str(tmp_path / "plain" / name)] != expected, name


# --- a real model ----------------------------------------------------------------------------------------------------

PROMPTS = ["What is the capital of France?", "Name three colours.", "Write one sentence about the sea."]
LONGEST = 24
ANSWER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__
folder, longest, prompts = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
answers = []
for prompt in prompts:
    turns = [{"role": "user", "content": prompt}]
    tokens = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    answer = model.generate(**tokens, max_new_tokens=longest)
    answers.append(answer[0, tokens["input_ids"].shape[1]:].tolist())
print(json.dumps([__version__, answers]))
assert "rlhf_lit" not in sys.modules
"""


@pytest.mark.skipif(not (SMOLLM2 / "complete").exists(), reason="no SmolLM2: make .envs/smollm2/complete")
def test_a_real_model_answers_as_here(command: Callable[..., Any], tmp_path: Path) -> None:
    """SmolLM2-135M-Instruct after four steps of LoRA by the command line, merged."""
    rows = [{"prompt": f"What is {i} plus {i}?", "completion": f"It is {2 * i}."} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = command(
        "fit", "--model=SFT", "--data=SFTDataModule", f"--model.base.name={SMOLLM2}", "--model.base.lora.rank=8",
        "--model.learning_rate=1e-3", "--data.train.path=rows.jsonl", "--data.batch_size=4", "--trainer.max_steps=4",
        "--model.sampling.max_new_tokens=8", "--name=sft",
    )  # fmt: skip
    assert said.status == 0, said.err
    said = command("export", "runs/sft", "--merge", "--dtype=float32", "--to=out")
    assert said.status == 0, said.err
    base = Base(str(tmp_path / "out"))
    model: Any = load_causal_lm(base)
    tokenizer = load_tokenizer(base)
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    asked = [tokenizer.apply_chat_template(one, add_generation_prompt=True)["input_ids"] for one in turns]
    prompts = Sequences.pad(asked, [[False] * len(row) for row in asked])
    found = sample(model, prompts, None, Sampling(max_new_tokens=LONGEST), stop_ids(tokenizer, model)).sequences
    expected = [row[mask].tolist() for row, mask in zip(found.tokens, found.mask, strict=True)]
    assert any(row[-1] == tokenizer.eos_token_id and len(row) < LONGEST for row in expected)
    argv = [str(OLDER / "bin" / "python"), "-c", ANSWER, str(tmp_path / "out"), str(LONGEST), json.dumps(PROMPTS)]
    answered = subprocess.run(argv, capture_output=True, text=True, cwd=tmp_path, check=True)
    version, answers = json.loads(answered.stdout.splitlines()[-1])
    assert version.startswith("4.57.")
    assert answers == expected
