"""Two processes make the same steps as one, at the same global batch."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from processes import PATIENCE, Run

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
COMPARED = (
    "train/baseline",
    "train/loss",
    "train/grad_norm",
    "train/accuracy",
    "val/baseline",
    "val/loss",
    "val/accuracy",
    "val/perplexity",
    "val/reward_undesirable",
)


def write(folder: Path) -> None:
    """Nine ragged rows in batches of four: the last batch has one row, so that the second rank has none."""
    sft = [{"prompt": " ".join(WORDS[: 1 + i % 5]), "completion": " ".join(WORDS[i:] * (1 + i % 3))} for i in range(9)]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " ".join(WORDS[: 1 + i])}
        for i, row in enumerate(sft)
    ]
    judged = [{**row, "label": i % 3 != 0} for i, row in enumerate(sft)]
    for name, rows in (("sft", sft), ("dpo", pairs), ("kto", judged)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, model, data in (
        ("sft", "SFT", "SFTDataModule"),
        ("dpo", "DPO", "PreferenceDataModule"),
        ("kto", "KTO", "UnpairedDataModule"),
    ):
        config = {
            "name": name,
            "model": {
                "class_path": model,
                "init_args": {
                    "base": {"name": "playground", "fresh": True},
                    "learning_rate": 1e-2,
                    # Adam divides by the gradient's own size: rounding in one that is nearly 0 would become a step.
                    "optimizer": {"eps": 1e-2},
                    "schedule": {"name": "constant"},
                    "sampling": {"max_new_tokens": 2},
                },
            },
            "data": {
                "class_path": data,
                "init_args": {
                    "train": {"path": f"{name}.jsonl"}, "validation": {"path": f"{name}.jsonl"},
                    "batch_size": 4, "micro_batch_tokens": 64, "cache": None,
                },
            },
            "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
        }  # fmt: skip
        if name == "dpo":
            config["model"]["init_args"]["loss"] = {"class_path": "DPOLoss", "init_args": {"beta": 0.5}}
        if name == "kto":
            config["model"]["init_args"] |= {
                "loss": {"beta": 0.5},
                "reference": {"precompute": True, "cache": str(folder / "cache")},
            }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


def weights(run: Path) -> dict[str, torch.Tensor]:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


def metrics(run: Path) -> list[dict[str, float]]:
    with (run / "metrics.csv").open(newline="") as file:
        return [{k: float(row[k]) for k in COMPARED if row.get(k)} for row in csv.DictReader(file)]


def test_two_processes_make_the_steps_of_one(command, start, tmp_path):
    write(tmp_path)
    ddp = ("--runs=two", "--trainer.strategy=ddp", "--trainer.devices=2")
    launched = start("fit", "--config", "sft.yaml", *ddp)  # Lightning starts the second process
    told = Run("fit", "--config", "dpo.yaml", *ddp, folder=tmp_path, ranks=2)  # both are told their ranks
    for name in ("sft", "dpo", "kto"):
        live = ["--model.reference.precompute=false"] if name == "kto" else []
        answer = command("fit", "--config", f"{name}.yaml", "--runs=one", "--trainer.devices=1", *live)
        assert answer.status == 0, answer.err
    said, _ = launched.communicate(timeout=PATIENCE)
    assert launched.returncode == 0, said
    told.wait()
    # z is of the whole batch, where a rank has no row of it too; each rank computes its part of the reference.
    kto = Run("fit", "--config", "kto.yaml", *ddp, folder=tmp_path, ranks=2)
    kto.wait()
    assert "reference" in kto.said()
    for name in ("sft", "dpo", "kto"):
        runs = [tmp_path / folder / name / "version_0" for folder in ("one", "two")]
        assert not (runs[1].parent / "version_1").exists(), "one run, one folder"
        alone, together = map(weights, runs)
        fresh = weights_at_start()
        assert alone.keys() == together.keys()
        moved = max(float((alone[key] - fresh[key]).abs().max()) for key in fresh)
        assert moved > 1e-3, "the steps are large enough to tell"
        for key, value in alone.items():
            assert torch.allclose(value, together[key], rtol=0, atol=1e-5), key
        numbers = [metrics(run) for run in runs]
        assert [len(rows) for rows in numbers] == [4, 4], "three steps and a validation"
        for a, b in zip(*numbers, strict=True):
            assert b == pytest.approx(a, rel=1e-4, abs=1e-5)


def weights_at_start() -> dict[str, torch.Tensor]:
    from rlhf_lit.models.base import Base
    from rlhf_lit.models.loading import load_causal_lm

    model = load_causal_lm(Base(name="playground", fresh=True))
    return {f"roles.models.policy.{key}": value.detach() for key, value in model.named_parameters()}
