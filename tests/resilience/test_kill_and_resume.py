"""A run that is killed and resumed ends where the uninterrupted one ends, to the bit, and obeys its own command."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

HERE = Path(__file__).parent


def letters(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """A reward function: many an e, and not too long."""
    return [response.count("e") - 0.1 * len(response) for response in responses]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in world's tokenizer with a Llama of some 20 000 weights, saved so that adapters can go on it."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from rlhf_lit.models.loading import PLAYGROUND

    folder = tmp_path_factory.mktemp("model")
    config = AutoConfig.from_pretrained(PLAYGROUND)
    config.update({"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2})
    config.update({"num_key_value_heads": 2, "head_dim": 16})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(PLAYGROUND).save_pretrained(folder)
    return folder


def write(folder: Path, algorithm: str, model: Path) -> None:
    """A config in the working folder: 24 steps of SFT in two epochs, or 24 of PPO in six rollouts of four steps."""
    base = {"name": str(model)}
    world = {"demonstrations": 96, "prompts": 48, "held_out": 8}
    if algorithm == "sft":
        # Dropout, so that the random state matters too.
        config = {
            "model": {
                "class_path": "SFT",
                "init_args": {
                    "base": {**base, "lora": {"rank": 4, "dropout": 0.1}},
                    "learning_rate": 1e-2,
                    "schedule": {"name": "cosine", "warmup": 3},
                    "sampling": {"max_new_tokens": 4},
                },
            },
            "data": {
                "class_path": "SFTDataModule",
                "init_args": {
                    "train": {"path": "playground"}, "validation_fraction": 0.1, "world": world,
                    "batch_size": 7, "micro_batch_tokens": 100, "cache": None,
                },
            },
            "trainer": {"max_epochs": 2},
        }  # fmt: skip
    else:
        config = {
            "model": {
                "class_path": "PPO",
                "init_args": {
                    "base": base,
                    "reward": {
                        "class_path": "RewardFromFunction",
                        "init_args": {"function": "test_kill_and_resume.letters"},
                    },
                    "critic": {"init": "policy"},
                    "kl": {"class_path": "AdaptiveKL", "init_args": {"beta": 0.2, "target": 1.0, "horizon": 50}},
                    "sampling": {"max_new_tokens": 6},
                    "learning_rate": 3e-3,
                },
            },
            "data": {
                "class_path": "RolloutDataModule",
                "init_args": {
                    "train": {"path": "playground"},
                    "validation": {"path": "playground", "split": "held_out"}, "world": world,
                    "rollout_size": 16, "batch_size": 8, "ppo_epochs": 2, "cache": None,
                },
            },
            "trainer": {"max_epochs": 2},
        }  # fmt: skip
    config["trainer"]["accelerator"] = "cpu"
    config["checkpoint"] = {"every_n_train_steps": 5}
    (folder / f"{algorithm}.yaml").write_text(yaml.safe_dump(config))


def kill(
    start: Callable[..., subprocess.Popen[str]], place: Path, algorithm: str, name: str, after: int
) -> list[dict[str, str]]:
    """Start a run, kill it with SIGKILL when step ``after`` is done, and return the metrics it leaves."""
    note = place / f"{name}_stalled"
    process = start(
        "fit", "--config", f"{algorithm}.yaml", f"--name={name}",
        "--trainer.callbacks=stalling.StallAfter",
        f"--trainer.callbacks.step={after}", f"--trainer.callbacks.note={note}",
        path=(HERE,),
    )  # fmt: skip
    deadline = time.monotonic() + 240
    while not note.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "the run never reached the step it was to be killed at"
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return metrics(place / "runs" / name / "version_0")


def metrics(run: Path) -> list[dict[str, str]]:
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def timeless(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Without the columns that measure this machine."""
    return [{k: v for k, v in row.items() if "per_s" not in k and not k.startswith("time/")} for row in rows]


def final(run: Path) -> dict:
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def assert_equal(a: object, b: object, where: str = "checkpoint") -> None:
    """Equal to the bit, all the way down."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict), where
        assert a.keys() == b.keys(), where
        for key, value in a.items():
            assert_equal(value, b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert isinstance(b, list), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


# SFT saves at steps 5, 10, …, in epochs of 13; PPO likewise, in rollouts of 4 steps: step 5 and 15 leave a rollout
# half used. The run dies two steps after the checkpoint.
@pytest.mark.parametrize(("algorithm", "after"), [("sft", 7), ("ppo", 7)])
def test_killed_and_resumed_equals_uninterrupted(command, start, tmp_path, small_model, algorithm, after):
    write(tmp_path, algorithm, small_model)
    left = kill(start, tmp_path, algorithm, "killed", after)
    killed, whole = (tmp_path / "runs" / name / "version_0" for name in ("killed", "whole"))
    assert [int(row["step"]) for row in left if row["train/loss"]] == list(range(after - 1))
    assert final(killed)["global_step"] == 5
    assert not (killed / "hf").exists()
    if algorithm == "ppo":
        (state,) = list(final(killed)["loops"]["fit_loop"]["state_dict"]["combined_loader"])
        assert state["buffer"] is not None, "the checkpoint stands in the middle of a rollout"

    answer = command("fit", "--config", f"{algorithm}.yaml", "--name=killed", "--ckpt_path=last")
    assert answer.status == 0, answer.err
    answer = command("fit", "--config", f"{algorithm}.yaml", "--name=whole")
    assert answer.status == 0, answer.err

    assert [folder.name for folder in (tmp_path / "runs/killed").iterdir()] == ["version_0"], "it goes on in its folder"
    resumed, uninterrupted = final(killed), final(whole)
    assert resumed["global_step"] == uninterrupted["global_step"] > 20
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(resumed[part], uninterrupted[part], part)
    if algorithm == "ppo":
        assert resumed["kl_multiplier"] == uninterrupted["kl_multiplier"] != 1.0
    assert timeless(metrics(killed)) == timeless(metrics(whole))
    assert [json.loads(line) for line in (killed / "samples.jsonl").read_text().splitlines()] == [
        json.loads(line) for line in (whole / "samples.jsonl").read_text().splitlines()
    ]


def column(run: Path, name: str) -> dict[int, float]:
    return {int(row["step"]): float(row[name]) for row in metrics(run) if row[name]}


def test_a_resumed_command_uses_the_values_it_was_given(command, tmp_path, small_model):
    """Lightning puts the checkpoint's optimizer back, learning rate and all; the command line has the last word."""
    write(tmp_path, "sft", small_model)
    short = ("fit", "--config", "sft.yaml", "--trainer.limit_train_batches=6", "--model.schedule.name=constant")
    assert command(*short, "--model.schedule.warmup=0").status == 0
    answer = command(
        *short, "--model.schedule.warmup=0", "--ckpt_path=last", "--trainer.max_epochs=3",
        "--model.learning_rate=0.5", "--model.optimizer.weight_decay=0.25",
        "--model.optimizer.betas=[0.8,0.9]", "--model.optimizer.eps=1e-3",
    )  # fmt: skip
    assert answer.status == 0, answer.err
    run = tmp_path / "runs/sft/version_0"
    rates = column(run, "train/learning_rate")
    assert rates == pytest.approx({step: 0.01 if step < 12 else 0.5 for step in range(18)})
    (group,) = final(run)["optimizer_states"][0]["param_groups"]
    assert (group["lr"], group["weight_decay"], tuple(group["betas"]), group["eps"]) == (0.5, 0.25, (0.8, 0.9), 1e-3)
    config = yaml.safe_load((run / "config_resumed_1.yaml").read_text())
    assert config["model"]["init_args"]["learning_rate"] == 0.5


def test_a_resumed_schedule_goes_on_from_the_new_learning_rate(command, tmp_path, small_model):
    """Step 6 of a linear decay over 12 steps: half of whatever rate the command names."""
    write(tmp_path, "sft", small_model)
    half = ("fit", "--config", "sft.yaml", "--trainer.limit_train_batches=6", "--model.schedule.name=linear",
            "--model.schedule.warmup=0")  # fmt: skip
    assert command(*half, "--checkpoint.every_n_train_steps=6", "--checkpoint.keep_all=true").status == 0
    run = tmp_path / "runs/sft/version_0"
    checkpoint = run / "checkpoints/step_0000006.ckpt"
    assert command(*half, f"--ckpt_path={checkpoint}", "--model.learning_rate=0.24").status == 0
    rates = column(tmp_path / "runs/sft/version_1", "train/learning_rate")
    assert rates == pytest.approx({6 + i: 0.24 * (6 - i) / 12 for i in range(6)})


def test_a_resumed_ppo_uses_the_beta_it_was_given(command, tmp_path, small_model):
    """The adaptive controller's state is a factor on β₀, so that it outlives the change and the change is obeyed."""
    write(tmp_path, "ppo", small_model)
    one = ("fit", "--config", "ppo.yaml", "--trainer.limit_val_batches=0")
    assert command(*one, "--trainer.max_epochs=1").status == 0
    run = tmp_path / "runs/ppo/version_0"
    factor = final(run)["kl_multiplier"]
    assert factor != 1.0
    assert command(*one, "--ckpt_path=last", "--model.kl.beta=0.5").status == 0
    beta = column(run, "objective/kl_coef")
    assert beta[0] == pytest.approx(0.2)
    assert beta[12] == pytest.approx(0.5 * factor, rel=1e-6)
