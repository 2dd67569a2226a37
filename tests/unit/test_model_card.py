"""The card of an export: its code runs and answers as we do, its data and stop tokens are the run's."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import yaml
from huggingface_hub import ModelCard

from rlhf_lit.algorithms import SFT, RewardModel
from rlhf_lit.batches import Sequences
from rlhf_lit.commands.export import export
from rlhf_lit.data.chat import ChatFormat
from rlhf_lit.data.records import Message
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.saving import save_hf
from rlhf_lit.rollout.engine import Sampling, sample

CHATML = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|> ' + m['content'] + ' <eos>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|> ' }}{% endif %}"
)


def saved(place: Path, algorithm: Any, lora: bool, template: str | None) -> Any:
    """A trained module in a run folder, and the trained model's card beside its export in ``out``."""
    base = tiny.save_model(place / "base", eos_token_id=7)
    module = tiny.build(algorithm(Base(name=base, lora=LoRA(rank=4) if lora else None)))
    if template:
        module.tokenizer.chat_template = template
    ChatFormat(module.tokenizer)
    tiny.disturb(module, 0.05)
    module.eval()
    save_hf(module, place / "run" / "hf")
    return module


def code_of(folder: Path) -> str:
    block = re.search(r"## Use\n\n```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.S)
    assert block
    return block[1]


def printed_by(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What a card's code prints, run in its folder."""
    monkeypatch.chdir(folder)
    out = io.StringIO()
    with contextlib.redirect_stdout(out), torch.no_grad():
        exec(compile(code, "README.md", "exec"), {})
    return out.getvalue()


@pytest.mark.parametrize("kind", ["whole", "adapter", "merged"])
def test_a_policys_code_answers_as_we_do(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = saved(tmp_path, SFT, kind != "whole", None)
    export(str(tmp_path / "run"), merge=kind == "merged", to=str(tmp_path / "out"))
    text = (tmp_path / "out" / "README.md").read_text()
    assert "- answers end with `<eos>` (2), `w7` (7); " in text
    code = code_of(tmp_path / "out").replace("Hello!", "w3 w4").replace("max_new_tokens=256", "max_new_tokens=30")
    assert len(code.split("\n\n")[-1].strip().splitlines()) == 7
    chat = ChatFormat(module.tokenizer)
    tokens = chat.prompt([Message("user", "w3 w4")])
    prompts = Sequences.pad([tokens], [[False] * len(tokens)])
    model = module.roles.policy
    found = sample(model, prompts, None, Sampling(max_new_tokens=30), (tiny.EOS, 7)).sequences
    expected = module.tokenizer.decode(found.tokens[0][found.mask[0]].tolist(), skip_special_tokens=True)
    assert printed_by(code, tmp_path / "out", monkeypatch) == expected + "\n"


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.parametrize("template", [None, CHATML, CHATML.replace("<eos>", "w9")], ids=["plain", "eos", "none"])
@pytest.mark.parametrize("kind", ["whole", "adapter", "merged"])
def test_a_reward_models_code_scores_as_we_do(
    tmp_path: Path, kind: str, template: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = saved(tmp_path, RewardModel, kind != "whole", template)
    export(str(tmp_path / "run"), merge=kind == "merged", to=str(tmp_path / "out"))
    code = code_of(tmp_path / "out").replace("Hello! How can I help?", "w5 w6 w7").replace("Hello!", "w3 w4")
    pair = [Message("user", "w3 w4")], [Message("assistant", "w5 w6 w7")]
    (side,) = ChatFormat(module.tokenizer).answers(pair[0], [pair[1]])
    with torch.no_grad():
        expected = float(module.scores(Sequences.pad([side.tokens], [side.mask]))[0])
    assert float(printed_by(code, tmp_path / "out", monkeypatch)) == pytest.approx(expected, abs=1e-5)


def test_the_card_names_the_data_and_none_of_the_machines_folders(tmp_path: Path) -> None:
    saved(tmp_path, SFT, True, None)
    sources = [
        {"path": "trl-lib/tldr", "split": "train[:100]", "name": None, "weight": 2.0, "columns": {}, "limit": None},
        {"path": "/home/me/secret/rows.jsonl.gz", "split": "train", "columns": {"prompt": "question"}, "weight": 1.0},
        {"path": "/home/me/a folder", "split": None, "limit": 500},
        {"path": "playground", "split": "train"},
        {"path": "reasoning-gym:leg_counting?size=10", "split": "train"},
    ]
    (tmp_path / "run" / "config.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "rlhf_lit.algorithms.SFT", "init_args": {"base": {"name": "base"}}},
                "data": {"class_path": "SFTDataModule", "init_args": {"train": sources}},
            }
        )
    )
    export(str(tmp_path / "run"), to=str(tmp_path / "out"))
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.datasets == ["trl-lib/tldr"]
    assert card.data.library_name == "peft"
    facts = card.text.split("## ")[0]
    assert [line.removeprefix("- trained on: ") for line in facts.splitlines() if line.startswith("- trained on")] == [
        "`trl-lib/tldr` (split train[:100]; weight 2)",
        "`rows.jsonl.gz` (split train; columns prompt from question)",
        "`a folder` (limit 500)",
        "`playground` (split train)",
        "`reasoning-gym:leg_counting?size=10` (split train)",
    ]
    assert "/home/me" not in facts
