"""What an earlier version wrote: its keys and class paths are refused in one line that names their successor."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

OLD_PPO: dict[str, Any] = {  # as a config.yaml of commit d13ae99 has it, resolved
    "name": "old",
    "model": {
        "class_path": "rlhf_lit.algorithms.PPO",
        "init_args": {
            "base": {"name": "playground", "fresh": True},
            "reward": {
                "class_path": "rlhf_lit.rollout.rewards.RewardFromFunction",
                "init_args": {"function": "rlhf_lit.data.playground.gold_reward"},
            },
            "kl": {"class_path": "rlhf_lit.losses.kl.FixedKL", "init_args": {"beta": 0.1}},
            "critic": {"init": "policy"},
            "sampling": {"max_new_tokens": 4},
            "gamma": 1.0,
            "lam": 0.95,
            "whiten_advantages": True,
            "policy_loss": {"clip": 0.2, "dual_clip": None},
        },
    },
    "data": {
        "class_path": "rlhf_lit.data.modules.RolloutDataModule",
        "init_args": {
            "train": {"path": "playground"},
            "rollout_size": 4,
            "batch_size": 4,
            "ppo_epochs": 1,
            "episodes": 4,
            "world": {"seed": 0, "prompts": 8},
        },
    },
    "trainer": {"max_epochs": -1, "accelerator": "cpu", "logger": {"class_path": "rlhf_lit.tracking.WandB"}},
}
SUCCESSORS = {
    "model.gamma": "model.advantages.gamma",
    "model.lam": "model.advantages.lam",
    "model.whiten_advantages": "model.advantages.whiten",
    "model.policy_loss.clip": "model.policy_loss.clip_low",
    "data.world": "data.train.world",
    "rlhf_lit.data.playground.gold_reward": "rlhf_lit.playground.gold_reward",
    "rlhf_lit.tracking.WandB": "rlhf_lit.trainer.loggers.WandB",
}


def written(config: dict[str, Any], folder: Path) -> str:
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return f"--config={folder / 'config.yaml'}"


def test_all_of_a_file_is_told_in_one_line(command: Callable, tmp_path: Path) -> None:
    answer = command("fit", written(OLD_PPO, tmp_path))
    assert answer.status == 2
    assert answer.err.count("\n") == 1
    for old, new in SUCCESSORS.items():
        assert f"{old} is now {new}" in answer.err
    assert not (tmp_path / "runs").exists()


def test_the_file_runs_with_what_the_line_says(command: Callable, tmp_path: Path) -> None:
    config = copy.deepcopy(OLD_PPO)
    model, data = config["model"]["init_args"], config["data"]["init_args"]
    model["reward"]["init_args"]["function"] = SUCCESSORS["rlhf_lit.data.playground.gold_reward"]
    del config["trainer"]["logger"]
    model["advantages"] = {key: model.pop(key) for key in ("gamma", "lam")} | {"whiten": model.pop("whiten_advantages")}
    model["policy_loss"]["clip_low"] = model["policy_loss"].pop("clip")
    data["train"]["world"] = data.pop("world")
    answer = command("fit", written(config, tmp_path))
    assert answer.status == 0, answer.err


@pytest.mark.parametrize(
    ("model", "option", "new"),
    [
        ("PPO", "--model.gamma=0.9", "model.advantages.gamma"),
        ("PPO", "--model.policy_loss.clip=0.1", "model.policy_loss.clip_low"),
        ("GRPO", "--model.scale_advantages=false", "model.advantages.scale"),
        ("RewardModel", "--model.share_prompts=false", "models share prompts by themselves"),
    ],
)
def test_an_option_of_then_names_its_successor(command: Callable, model: str, option: str, new: str) -> None:
    answer = command("fit", f"--model={model}", option)
    assert answer.status == 2
    assert answer.err.count("\n") == 1
    assert new in answer.err


def test_the_world_of_then_names_its_successor(command: Callable) -> None:
    answer = command("fit", "--model=SFT", "--data=SFTDataModule", "--data.world.seed=3")
    assert answer.status == 2
    assert "data.train.world" in answer.err
    answer = command("evaluate", "runs/x", "--world.seed=3")
    assert answer.status == 2
    assert "prompts.world" in answer.err


def test_a_class_of_the_users_own_may_have_such_a_key(command: Callable, tmp_path: Path) -> None:
    config = {"model": {"class_path": "mine.Algorithm", "init_args": {"gamma": 0.5}}}
    answer = command("fit", written(config, tmp_path))
    assert answer.status == 2
    assert "earlier version" not in answer.err


def test_clipping_higher_needs_one_option(command: Callable, tmp_path: Path) -> None:
    """The fields of a family's default member are options without its class path."""
    options = ("--model=GRPO", "--model.base.name=playground", "--model.base.fresh=true", "--model.kl=FixedKL",
               "--model.kl.beta=0.1", "--model.reward=LengthReward", "--model.reward.target=4",
               "--data=RolloutDataModule", "--model.policy_loss.clip_high=0.28", "--print_config")  # fmt: skip
    answer = command("fit", *options)
    assert answer.status == 0, answer.err
    loss = yaml.safe_load(answer.out)["model"]["init_args"]["policy_loss"]
    assert loss["class_path"].endswith("ClippedPolicyLoss")
    assert loss["init_args"]["clip_high"] == 0.28
    assert loss["init_args"]["aggregation"] == "sequence_mean", "GRPO's own default stays"
