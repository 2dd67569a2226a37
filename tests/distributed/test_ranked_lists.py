"""A reward model on ranked lists of unequal size makes the same steps by two processes as by one."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from processes import Run
from test_ddp import WORDS, metrics, weights


def write(folder: Path) -> None:
    """Seven lists of two to four answers in batches of four and three; the last validation batch is one list."""
    rows = [
        {
            "prompt": " ".join(WORDS[: 1 + i % 5]),
            "answers": [" ".join(WORDS[k : k + 1 + i]) for k in range(2 + i % 3)],
            "scores": [(3 * k + i) % 4 for k in range(2 + i % 3)],
        }
        for i in range(7)
    ]
    (folder / "lists.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {
        "name": "ranked",
        "model": {
            "class_path": "RewardModel",
            "init_args": {
                "base": {"name": "playground", "fresh": True}, "learning_rate": 1e-2,
                # Adam divides by the gradient's own size: rounding in one that is nearly 0 would become a step.
                "optimizer": {"eps": 1e-2}, "schedule": {"name": "constant"},
                "loss": {"use_margin": True}, "unit_variance": True,
            },
        },
        "data": {
            "class_path": "RankingDataModule",
            "init_args": {
                "train": {"path": "lists.jsonl"}, "validation": {"path": "lists.jsonl"},
                "batch_size": 4, "micro_batch_tokens": 64, "cache": None,
            },
        },
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }  # fmt: skip
    (folder / "ranked.yaml").write_text(yaml.safe_dump(config))


@pytest.mark.soak  # the steps of two ranks on other batches are compared in every run of the tests
def test_two_processes_make_the_steps_of_one(command, tmp_path):
    write(tmp_path)
    both = Run(
        "fit", "--config", "ranked.yaml", "--runs=two", "--trainer.strategy=ddp", "--trainer.devices=2",
        folder=tmp_path, ranks=2,
    )  # fmt: skip
    answer = command("fit", "--config", "ranked.yaml", "--runs=one", "--trainer.devices=1")
    assert answer.status == 0, answer.err
    both.wait()
    alone, together = (tmp_path / folder / "ranked" / "version_0" for folder in ("one", "two"))
    trained = weights(alone)
    assert trained.keys() == weights(together).keys()
    for key, value in weights(together).items():
        assert torch.allclose(trained[key], value, rtol=0, atol=1e-5), key
    numbers = [metrics(alone), metrics(together)]
    assert [len(rows) for rows in numbers] == [3, 3], "two steps and a validation"
    for a, b in zip(*numbers, strict=True):
        assert b == pytest.approx(a, rel=1e-4, abs=1e-5)
    constants = [json.loads((run / "hf" / "reward.json").read_text())["bias"] for run in (alone, together)]
    assert constants[1] == pytest.approx(constants[0], abs=1e-3)
