"""Every shipped loss, by its config, through the real command line: it must learn the built-in world's preferences."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_folders import save_small_model

from rlhf_lit import playground

ROOT = Path(__file__).parents[2]
# Those whose names are of models are the same losses on other data.
CONFIGS = sorted(
    path
    for path in (ROOT / "configs" / "dpo").glob("*.yaml")
    if not path.stem.startswith(("qwen", "llama", "hh_small"))
)
# Losses whose β is of another unit, at rates and strengths that suit a model of 100 000 weights.
SETTINGS = {
    "orpo": ["--model.loss.beta=3"],
    "ipo": ["--model.loss.beta=0.05"],
    "tr_dpo": ["--model.reference.update.every=7"],
}


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and the world's answers against two ways to shirk, a part of them held out."""
    folder = tmp_path_factory.mktemp("losses")
    save_small_model(folder / "model")
    shirking = ("i cannot help with that.", "no.")
    pairs = [
        {"prompt": row["instruction"], "chosen": row["response"], "rejected": shirking[i % 2]}
        for i, row in enumerate(playground.demonstrations(playground.World(demonstrations=240)))
    ]
    for name, part in (("train", pairs[:-48]), ("held_out", pairs[-48:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in part))
    return folder


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_loss_learns(command: Callable, materials: Path, config: Path) -> None:
    answer = command(
        "fit", "--config", config, "--name=run", "--model.base.lora=null", f"--model.base.name={materials / 'model'}",
        f"--data.train.path={materials / 'train.jsonl'}", "--data.train.split=train",
        f"--data.validation.path={materials / 'held_out.jsonl'}", "--data.validation.split=train",
        "--data.max_length=96", "--data.batch_size=16", "--data.cache=null", "--model.learning_rate=1e-2",
        "--model.sampling.max_new_tokens=1", "--trainer.max_epochs=-1", "--trainer.max_steps=16",
        "--trainer.precision=32-true", "--trainer.accelerator=cpu", *SETTINGS.get(config.stem, []),
    )  # fmt: skip
    assert answer.status == 0, answer.err
    with Path("runs/run/version_0/metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(losses) == 16
    assert sum(losses[-4:]) < sum(losses[:4]), "the loss falls"
    held_out = rows[-1]
    if config.stem == "kto":
        assert float(held_out["val/reward_desirable"]) > float(held_out["val/reward_undesirable"])
    else:
        assert float(held_out["val/accuracy"]) > 0.75
        assert float(held_out["val/margin"]) > 0
