"""A run that is killed and resumed ends where the uninterrupted one ends, to the bit, and obeys its own command."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from processes import Run
from run_folders import assert_equal, final, loader_state, metrics, samples, save_small_model, timeless

HERE = Path(__file__).parent
SEED = 20_260_801  # of the steps at which runs are killed

STEPS, EPOCH, ROLLOUT = 24, 12, 4  # PPO's and GRPO's: of the run, of one pass over the prompts, of one whole rollout
WARMUP = 3
MAX_UPDATE_KL = 0.05


def letters(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """A reward function: many an e, not too long, and a little of every global generator's noise."""
    noise = random.random() + float(np.random.rand()) + float(torch.rand(()))
    return [response.count("e") - 0.1 * len(response) + 0.1 * noise for response in responses]


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_small_model(folder)
    return folder


def on_policy(algorithm: str, base: dict[str, Any], critic: dict[str, Any] | None) -> dict[str, Any]:
    """Everything of PPO and GRPO that has a state: β, moments of the scores, a rollout cut short, two schedules."""
    model: dict[str, Any] = {
        "base": base,
        "reward": {"class_path": "RewardFromFunction", "init_args": {"function": "test_kill_and_resume.letters"}},
        "kl": {"class_path": "AdaptiveKL", "init_args": {"beta": 0.2, "target": 1.0, "horizon": 50}},
        "shaping": {"normalise": "standardise", "clip": 1.5},
        "sampling": {"max_new_tokens": 6},
        "max_update_kl": MAX_UPDATE_KL,
        "learning_rate": 3e-3,
        "schedule": {"name": "cosine", "warmup": 2},
    }
    if critic:
        model["critic"] = {**critic, "learning_rate": 1e-2, "warmup": WARMUP}
    return {
        "model": {"class_path": algorithm, "init_args": model},
        "data": {
            "class_path": "RolloutDataModule",
            "init_args": {
                "train": {"path": "playground", "world": {"prompts": 12}},
                "validation": {"path": "playground", "split": "held_out", "world": {"held_out": 5}},
                "rollout_size": 4, "samples_per_prompt": 2, "batch_size": 4, "ppo_epochs": 2, "cache": None,
            },
        },
        "trainer": {"max_epochs": 2},
    }  # fmt: skip


def write(folder: Path, name: str, model: Path) -> None:
    """A config in the working folder: 24 steps of SFT in two epochs, or 24 of PPO or GRPO in two passes."""
    base: dict[str, Any] = {"name": str(model)}
    adapters = {**base, "lora": {"rank": 4}}
    if name == "sft":
        # Dropout, so that the random state matters too.
        config: dict[str, Any] = {
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
                    "train": {"path": "playground", "world": {"demonstrations": 96}}, "validation_fraction": 0.1,
                    "batch_size": 7, "micro_batch_tokens": 100, "cache": None,
                },
            },
            "trainer": {"max_epochs": 2},
        }  # fmt: skip
    else:
        config = {
            "ppo": lambda: on_policy("PPO", base, {"init": "policy"}),
            "ppo_lora": lambda: on_policy("PPO", adapters, {"init": "policy"}),
            "ppo_trunk": lambda: on_policy("PPO", base, {"init": "policy", "trunk": True}),
            "grpo": lambda: on_policy("GRPO", adapters, None),
        }[name]()
    config["trainer"] |= {"accelerator": "cpu", "enable_progress_bar": False}
    config["preflight"] = name in ("sft", "ppo")  # in the others it would only take its time
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


@dataclass(frozen=True)
class Kill:
    """A run that saves every ``saved`` steps and dies when step ``at`` is done, before it saves again."""

    saved: int
    at: int

    @classmethod
    def after(cls, saved: int, steps: int, generator: random.Random) -> Kill:
        """At any step that leaves step ``saved`` as the last one that was saved."""
        return cls(saved, generator.randint(saved + 1, min(2 * saved, steps)))


def killed_and_resumed(folder: Path, config: str, kill: Kill) -> Path:
    """The run's folder."""
    name = f"{config}_{kill.saved}_{kill.at}"
    run, note = folder / "runs" / name / "version_0", folder / f"{name}_stalled"
    fit = ("fit", "--config", f"{config}.yaml", f"--name={name}", f"--checkpoint.every_n_train_steps={kill.saved}")
    stall = ("--trainer.callbacks=stalling.StallAfter", f"--trainer.callbacks.step={kill.at}",
             f"--trainer.callbacks.note={note}")  # fmt: skip
    Run(*fit, *stall, folder=folder, path=[HERE]).kill_at(note)
    assert [int(row["step"]) for row in metrics(run) if row["train/loss"]] == list(range(kill.at - 1))
    assert final(run)["global_step"] == kill.saved
    assert not (run / "hf").exists()
    Run(*fit, "--ckpt_path=last", folder=folder, path=[HERE]).wait()
    assert [version.name for version in run.parent.iterdir()] == ["version_0"], "it goes on in its folder"
    return run


def whole_run(folder: Path, config: str) -> Path:
    """The folder of the uninterrupted run."""
    Run("fit", "--config", f"{config}.yaml", "--name=whole", folder=folder, path=[HERE]).wait()
    return folder / "runs" / "whole" / "version_0"


def assert_same_run(run: Path, whole: Path) -> None:
    """To the bit: weights, optimizer, schedule, every state of the algorithm, what was logged and what was sampled."""
    ended, uninterrupted = final(run), final(whole)
    assert ended["global_step"] == uninterrupted["global_step"] > 20
    for part in ("state_dict", "optimizer_states", "lr_schedulers"):
        assert_equal(ended[part], uninterrupted[part], part)
    if "kl_multiplier" in uninterrupted:
        for part in ("kl_multiplier", "score_moments", "rollout_spent"):
            assert_equal(ended[part], uninterrupted[part], part)
        assert_equal(loader_state(ended), loader_state(uninterrupted), "loader")
    assert [timeless(row) for row in metrics(run)] == [timeless(row) for row in metrics(whole)]
    assert samples(run) == samples(whole)


def assert_each_resumes(folder: Path, config: str, kills: list[Kill], whole: Path) -> None:
    """Each on its own, two at a time."""
    print(f"{config}, seed {SEED}: {kills}")
    with ThreadPoolExecutor(2) as pool:
        for run in pool.map(lambda kill: killed_and_resumed(folder, config, kill), kills):
            assert_same_run(run, whole)


def test_killed_and_resumed_sft_equals_uninterrupted(tmp_path, small_model):
    """In the middle of an epoch of 13 steps; the run dies two steps after the checkpoint."""
    write(tmp_path, "sft", small_model)
    assert_each_resumes(tmp_path, "sft", [Kill(5, 7)], whole_run(tmp_path, "sft"))


@dataclass(frozen=True)
class Places:
    """The steps of a run after which its state is of a kind.

    Attributes:
        warmup: the critic still trains alone.
        middle: a part of the rollout has been used, and the rest will be.
        spent: the rollout has moved the policy far enough, and its rest is passed over.
        end: all of the rollout has been used.
    """

    warmup: list[int]
    middle: list[int]
    spent: list[int]
    end: list[int]

    @classmethod
    def of(cls, whole: Path) -> Places:
        """Told from the uninterrupted run's log; only steps before its last, which can be resumed from."""
        rows = [row for row in metrics(whole) if row["train/loss"]]
        places, used = cls([], [], [], []), 0
        for step, row in enumerate(rows[:-1], start=1):
            used += 1
            if float(row["policy/update_kl"] or 0) > MAX_UPDATE_KL and used < ROLLOUT:
                places.spent.append(step)
                used = 0
            elif used == ROLLOUT:
                places.end.append(step)
                used = 0
            elif step > WARMUP:
                places.middle.append(step)
            else:
                places.warmup.append(step)
        assert len(rows) == STEPS
        return places


def assert_saw_everything(whole: Path, places: Places) -> None:
    """The uninterrupted run holds what its resumption is to be tested on."""
    assert min(map(len, (places.middle, places.spent, places.end))) >= 2, places
    rollouts = len(places.spent) + len(places.end) + 1
    beta = [float(row["objective/kl_coef"]) for row in metrics(whole) if row["train/loss"]]
    assert len(set(beta)) == rollouts - 1, "β moves with every rollout but the first: the critic warms up"
    assert all(row["val/scores"] for row in metrics(whole) if not row["train/loss"])
    state = final(whole)
    assert state["kl_multiplier"] != 1.0
    assert state["score_moments"]["count"] == 8 * rollouts
    assert loader_state(state)["rollout"] > STEPS // ROLLOUT, "rollouts were cut short"


# Which kinds of state the three kills meet.
@pytest.mark.parametrize(
    ("config", "kinds"), [("ppo", ("warmup", "middle", "end")), ("ppo_lora", ("middle", "spent", "spent"))]
)
def test_killed_and_resumed_ppo_equals_uninterrupted(tmp_path, small_model, config, kinds):
    write(tmp_path, config, small_model)
    whole = whole_run(tmp_path, config)
    places = Places.of(whole)
    assert_saw_everything(whole, places)
    generator = random.Random(SEED)
    saved: list[int] = []
    for kind in kinds:
        saved.append(generator.choice([step for step in getattr(places, kind) if step not in saved]))
    assert_each_resumes(tmp_path, config, [Kill.after(step, STEPS, generator) for step in saved], whole)


def test_killed_and_resumed_grpo_equals_uninterrupted(tmp_path, small_model):
    """At the end of a pass over the prompts, with the validation that is due there still to come."""
    write(tmp_path, "grpo", small_model)
    kill = Kill.after(EPOCH, STEPS, random.Random(SEED))
    assert_each_resumes(tmp_path, "grpo", [kill], whole_run(tmp_path, "grpo"))


@pytest.mark.soak
@pytest.mark.parametrize("config", ["ppo", "ppo_lora", "ppo_trunk", "grpo"])
def test_killed_at_twenty_random_steps(tmp_path, small_model, config):
    write(tmp_path, config, small_model)
    whole, generator = whole_run(tmp_path, config), random.Random(SEED)
    saved = generator.sample(range(1, STEPS), 20)
    assert_each_resumes(tmp_path, config, [Kill.after(step, STEPS, generator) for step in saved], whole)


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
    # What was left of the saved rollout keeps the β it was penalised with.
    fresh = next(value for step, value in sorted(beta.items()) if step >= 12 and value != beta[11])
    assert fresh == pytest.approx(0.5 * factor, rel=1e-6)
