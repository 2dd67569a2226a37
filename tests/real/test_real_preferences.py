"""A real instruction-tuned model, its preferences: reward model and scores, DPO, KTO, and a sweep over β."""

from __future__ import annotations

import json
import math
import os
from typing import Any
from unittest import mock

import pytest
import torch
import yaml
from real_model import BASE, CPU, LORA, MODEL, ROOT, Place, Run, answer_logprob, needs_model, place, rendered

pytestmark = needs_model
__all__ = ["place"]  # a fixture

PAIRS = ("--data.train.path=pairs.jsonl", "--data.batch_size=8", "--trainer.max_steps=3")
QUIET = "--model.sampling.max_new_tokens=8"
LN2 = math.log(2)


@pytest.fixture(scope="module")
def reward(place: Place) -> Run:
    return place.fit(
        "reward", "RewardModel", "PreferenceDataModule", *LORA, *PAIRS, "--model.learning_rate=1e-3",
        "--data.validation.path=pairs.jsonl",
    )  # fmt: skip


@pytest.fixture(scope="module")
def dpo(place: Place) -> Run:
    """In whole weights, beside a frozen copy."""
    loss = ("--model.loss=DPOLoss", "--model.loss.beta=0.1", "--model.learning_rate=5e-6")
    return place.fit("dpo", "DPO", "PreferenceDataModule", BASE, *PAIRS, *loss, QUIET)


@pytest.fixture(scope="module")
def kto(place: Place) -> Run:
    rows = ("--data.train.path=judged.jsonl", "--data.batch_size=6", "--trainer.max_steps=3")
    loss = ("--model.loss.beta=0.1", "--model.learning_rate=1e-4")
    return place.fit("kto", "KTO", "UnpairedDataModule", *LORA, *rows, *loss, QUIET)


def test_a_reward_model_learns_its_pairs(reward: Run) -> None:
    losses = reward.column("train/loss")
    assert losses[0] == pytest.approx(LN2, abs=0.3)
    assert losses[0] > losses[1] > losses[2]
    last = reward.validations[-1]
    assert last["val/accuracy"] == 1.0
    assert last["val/margin"] > reward.column("train/margin")[0] + 0.3


def test_scores_of_a_file_are_those_that_plain_transformers_gives(place: Place, reward: Run) -> None:
    """Each answer's, after training: the better above the worse; and the same from merged weights elsewhere."""
    from transformers import AutoModelForSequenceClassification

    said = place.command("score", "runs/reward", "pairs.jsonl", "--to=scores.jsonl")
    assert "accuracy 1.0000 on 8 pairs" in said.out
    found = [json.loads(line) for line in (place.folder / "scores.jsonl").read_text().splitlines()]
    chosen = [row["score_chosen"] for row in found]
    assert sum(chosen) / len(chosen) == pytest.approx(0, abs=1e-4), "chosen answers of the training rows average 0"
    assert all(row["score_chosen"] > row["score_rejected"] for row in found)

    place.command("export", "runs/reward", "--merge", "--to=judge", "--dtype=float32")
    judge = AutoModelForSequenceClassification.from_pretrained(place.folder / "judge", dtype=torch.float32).eval()
    bias = json.loads((place.folder / "judge" / "reward.json").read_text())["bias"]
    for row in found[:4]:
        for side in ("chosen", "rejected"):
            prompt, answer = rendered(row, row[side])
            tokens = torch.tensor([prompt + answer])
            with torch.no_grad():
                theirs = float(judge(input_ids=tokens).logits[0, 0]) + bias
            assert theirs == pytest.approx(row[f"score_{side}"], abs=2e-3)


def test_dpo_starts_at_ln_2_and_its_reference_stands_still(place: Place, dpo: Run) -> None:
    """log π₀ of the rows, told from policy and reward at every step, is what plain transformers computes."""
    from transformers import AutoModelForCausalLM

    losses, margins = dpo.column("train/loss"), dpo.column("train/margin")
    assert losses[0] == pytest.approx(LN2, abs=1e-6)
    assert margins[0] == 0
    assert losses[0] > losses[1] > losses[2]
    assert margins[0] < margins[1] < margins[2]
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    for side in ("chosen", "rejected"):
        each = [answer_logprob(model, row, row[side])[0] for row in place.rows["pairs"]]
        expected = sum(each) / len(each)
        for logprob, implicit in zip(
            dpo.column(f"train/logprob_{side}"), dpo.column(f"train/reward_{side}"), strict=True
        ):
            assert logprob - implicit / 0.1 == pytest.approx(expected, abs=2e-3)


def test_kto_tells_good_answers_from_bad_ones(kto: Run) -> None:
    losses = kto.column("train/loss")
    assert losses[0] == pytest.approx(0.5, abs=1e-6), "half of its weights"
    good, bad = kto.column("train/reward_desirable"), kto.column("train/reward_undesirable")
    assert (good[0], bad[0]) == (0, 0)
    apart = [a - b for a, b in zip(good, bad, strict=True)]
    assert apart[0] < apart[1] < apart[2]
    assert losses[2] < losses[0]
    assert all(baseline >= 0 for baseline in kto.column("train/baseline"))


def test_a_sweep_of_two_betas(place: Place) -> None:
    """Adam's first step does not know β, which scales the whole gradient: after it both arms have the same log-ratio.
    They start at ln 2, and part from there."""
    command = [
        "${env}", "${interpreter}", "-m", "${program}", "fit", "--model=DPO", "--data=PreferenceDataModule", *LORA,
        *PAIRS[:2], "--trainer.max_steps=2", "--model.loss=DPOLoss", "--model.learning_rate=1e-4",
        "--model.schedule.name=constant", QUIET, *CPU, "--model.loss.beta=1", "${args}",
    ]  # fmt: skip
    file: dict[str, Any] = {
        "program": "rlhf_lit", "method": "grid", "command": command,
        "metric": {"name": "train/margin", "goal": "maximize"},
        "parameters": {"model.loss.beta": {"values": [0.05, 0.5]}},
    }  # fmt: skip
    (place.folder / "betas.yaml").write_text(yaml.safe_dump(file))
    with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT)):
        place.command("sweep", "betas.yaml")
    runs = [Run(path.parent) for path in sorted((place.folder / "runs/sweeps/betas").rglob("metrics.csv"))]
    betas = [
        yaml.safe_load((run.folder / "config.yaml").read_text())["model"]["init_args"]["loss"]["init_args"]["beta"]
        for run in runs
    ]
    assert betas == [0.05, 0.5]
    for run in runs:
        assert run.column("train/loss")[0] == pytest.approx(LN2, abs=1e-6)
    small, large = (run.column("train/margin")[1] / beta for run, beta in zip(runs, betas, strict=True))
    assert small == pytest.approx(large, rel=0.02)
    assert small > 0.5
    assert runs[1].column("train/loss")[1] < runs[0].column("train/loss")[1]
