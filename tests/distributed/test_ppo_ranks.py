"""On-policy learning on two ranks: the rollouts, steps and numbers of one process, from whichever checkpoint."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import Run
from run_folders import assert_equal, final, loader_state, metrics, samples, save_small_model, timeless

HERE = Path(__file__).parent
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
# A rollout is 3 prompts with 2 responses each: one rank has 4 of its 6 episodes, the other 2. Minibatches of 2 episodes
# leave now and then a rank without any.
PROMPTS, SAMPLES, MINIBATCH, STEPS = 3, 2, 2, 15
MAX_UPDATE_KL = 0.02
CONFIGS = ("ppo", "ppo_lora", "grpo")


def letters(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """A reward function: many an e, and not too long."""
    return [response.count("e") - 0.1 * len(response) for response in responses]


def config(name: str, base: str) -> dict[str, Any]:
    """Everything that ranks must agree on: β, moments of the scores, whitened advantages, a rollout cut short."""
    model: dict[str, Any] = {
        "base": {"name": base, **({"lora": {"rank": 4}} if name == "ppo_lora" else {})},
        "reward": {"class_path": "RewardFromFunction", "init_args": {"function": "test_ppo_ranks.letters"}},
        "kl": {"class_path": "AdaptiveKL", "init_args": {"beta": 0.2, "target": 1.0, "horizon": 50}},
        "shaping": {"normalise": "standardise", "clip": 1.5},
        "sampling": {"max_new_tokens": 8},
        "max_update_kl": MAX_UPDATE_KL,
        "learning_rate": 2e-3,
        # Adam divides by the gradient's own size: rounding in one that is nearly 0 would become a step.
        "optimizer": {"eps": 1e-2},
        "schedule": {"name": "linear", "warmup": 2},
    }
    if name != "grpo":
        model["critic"] = {"init": "policy", "learning_rate": 5e-3, "warmup": 2}
    return {
        "name": name,
        "model": {"class_path": "GRPO" if name == "grpo" else "PPO", "init_args": model},
        "data": {
            "class_path": "RolloutDataModule",
            "init_args": {
                "train": {"path": "prompts.jsonl"}, "validation": {"path": "held_out.jsonl"}, "cache": None,
                "rollout_size": PROMPTS, "samples_per_prompt": SAMPLES, "batch_size": MINIBATCH, "ppo_epochs": 2,
                "micro_batch_tokens": 64,
            },
        },
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "enable_progress_bar": False},
        "debug": {"dump_rollouts": True},
        "preflight": name == "ppo",  # of the others it takes as long as half of the run
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, ragged prompts, and each config carried out by one process and by two ranks."""
    folder = tmp_path_factory.mktemp("ranks")
    save_small_model(folder / "model")
    # Five held-out prompts in batches of two: the last batch leaves a rank without any.
    for name, count in (("prompts", 7), ("held_out", 5)):
        rows = [{"prompt": " ".join(WORDS[i : i + 1 + i % 4] * (1 + i % 3))} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in CONFIGS:
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config(name, str(folder / "model"))))
        one, two = fit(folder, name, 1, "one"), fit(folder, name, 2, "two")
        one.wait()
        two.wait()
    return folder


def fit(folder: Path, name: str, ranks: int, runs: str, *options: str) -> Run:
    devices = ("--trainer.devices=2", "--trainer.strategy=ddp") if ranks == 2 else ("--trainer.devices=1",)
    argv = ("fit", "--config", f"{name}.yaml", f"--runs={runs}", *devices, *options)
    return Run(*argv, folder=folder, path=[HERE], ranks=ranks)


def run_of(folder: Path, runs: str, name: str) -> Path:
    return folder / runs / name / "version_0"


def rollouts(run: Path) -> list[list[dict[str, Any]]]:
    """The parts of each rollout, one for each rank."""
    files = sorted((run / "rollouts").iterdir())
    numbers = sorted({file.name.split(".")[0] for file in files})
    return [[torch.load(file) for file in files if file.name.startswith(number)] for number in numbers]


def episodes(parts: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A rollout's episodes, prompt by prompt."""
    found = []
    for part in parts:
        for row, index in enumerate(part["prompt_index"].tolist()):
            length = int(part["lengths"][row])
            episode = {
                name: value[row, :length] if value.dim() == 2 else value[row]
                for name, value in part.items()
                if isinstance(value, torch.Tensor)
            }
            texts = {name: part[name][row] for name in ("prompts", "responses")}
            found.append((index, {**episode, **texts, "kl_coef": torch.tensor(part["kl_coef"])}))
    return [episode for _, episode in sorted(found, key=lambda item: item[0])]  # stable: samples stay in their order


def assert_close_run(a: Path, b: Path) -> None:
    """Weights and every number that was logged, to 1e-5."""
    first, second = final(a), final(b)
    assert first["global_step"] == second["global_step"] == STEPS
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for key, value in first["state_dict"].items():
        assert torch.allclose(value, second["state_dict"][key], rtol=0, atol=1e-5), key
    assert second["kl_multiplier"] == pytest.approx(first["kl_multiplier"], rel=1e-6)
    assert second["score_moments"] == pytest.approx(first["score_moments"], rel=1e-6)
    assert second["rollout_spent"] == first["rollout_spent"]
    assert_close_metrics(metrics(a), metrics(b))
    assert samples(a) == samples(b)


def assert_close_metrics(a: list[dict[str, str]], b: list[dict[str, str]]) -> None:
    assert len(a) == len(b) == STEPS + 1, "a row for each step, and one of the validation"
    clipped: dict[str, list[tuple[float, float]]] = {}
    for row, other in zip(a, b, strict=True):
        numbers = [{k: float(v) for k, v in timeless(r).items() if v} for r in (row, other)]
        # Counts of tokens beyond a threshold: rounding puts now and then one on its other side.
        for key in [key for key in numbers[0] if key.endswith("clipfrac")]:
            clipped.setdefault(key, []).append((numbers[0].pop(key), numbers[1].pop(key)))
        assert numbers[1] == pytest.approx(numbers[0], rel=1e-4, abs=1e-5), row["step"]
    assert clipped
    for key, pairs in clipped.items():
        means = [sum(side) / len(pairs) for side in zip(*pairs, strict=True)]
        assert means[1] == pytest.approx(means[0], abs=0.01), key


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_do_what_one_process_does(place, name):
    one, two = run_of(place, "one", name), run_of(place, "two", name)
    assert not (two.parent / "version_1").exists(), "one run, one folder"
    assert_close_run(one, two)

    alone, together = rollouts(one), rollouts(two)
    assert len(alone) == len(together) > 1 + STEPS * MINIBATCH // (2 * PROMPTS * SAMPLES), "some were cut short"
    lengths = set()
    for whole, parts in zip(alone, together, strict=True):
        assert [len(part["lengths"]) for part in parts] == [4, 2]
        for expected, found in zip(episodes(whole), episodes(parts), strict=True):
            lengths.add(int(expected["mask"].sum()))
            for key, value in expected.items():
                exact = not isinstance(value, torch.Tensor) or not value.is_floating_point()
                same = (found[key] == value) if exact else torch.allclose(found[key], value, rtol=1e-4, atol=1e-5)
                assert bool(torch.as_tensor(same).all()), key
    assert len(lengths) > 3, "ragged"


@pytest.mark.parametrize("name", CONFIGS)
def test_the_runs_can_tell(place, name):
    """The steps are large enough, and what must be shared by the ranks is in use."""
    run = run_of(place, "one", name)
    rows = [row for row in metrics(run) if row["train/loss"]]
    changes = [row["policy/update_kl"] for row in rows if row["policy/update_kl"]]
    assert max(map(float, changes)) > MAX_UPDATE_KL
    assert min(abs(float(change) - MAX_UPDATE_KL) for change in changes) > 1e-4, "rounding decides nothing"
    assert 0 < float(rows[0]["rollout/eos_rate"]) < 1
    state = final(run)
    assert abs(state["kl_multiplier"] - 1) > 0.01
    assert moved(place, state["state_dict"]) > 1e-3, "the steps are large enough"


def moved(folder: Path, weights: dict[str, torch.Tensor]) -> float:
    """How far training has brought a weight of the policy at most."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    begun = {f"roles.models.policy.{key}": value.detach() for key, value in model.named_parameters()}
    changes = [value - begun[key] for key, value in weights.items() if key in begun]
    adapters = [value for key, value in weights.items() if "lora_B.default" in key]  # begin at 0
    return max(float(change.abs().max()) for change in changes or adapters)


# All are saved in the middle of a rollout, and killed before it is used up.
@pytest.mark.parametrize(
    ("name", "before", "after"),
    [("ppo", 2, 1), ("ppo", 1, 2), ("ppo", 2, 2), ("ppo_lora", 2, 1), ("ppo_lora", 1, 2), ("grpo", 2, 1)],
)
def test_killed_and_resumed_by_other_ranks(place, name, before, after):
    saved, killed = 10, 12
    runs = f"{before}_then_{after}"
    run, note = run_of(place, runs, name), place / f"{name}_{runs}"
    stall = ("--trainer.callbacks=stalling.StallAfter", f"--trainer.callbacks.step={killed}",
             f"--trainer.callbacks.note={note}")  # fmt: skip
    every = f"--checkpoint.every_n_train_steps={saved}"
    fit(place, name, before, runs, every, *stall).kill_at(note)
    state = loader_state(final(run))
    assert final(run)["global_step"] == saved
    assert len(state["buffer"]["sequences"]["lengths"]) == PROMPTS * SAMPLES, "the rollout of all ranks"

    fit(place, name, after, runs, every, "--ckpt_path=last").wait()
    assert_close_run(run_of(place, "one", name), run)
    if before == after == 2:
        same = final(run_of(place, "two", name)), final(run)
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "kl_multiplier", "score_moments"):
            assert_equal(same[1][part], same[0][part], part)
        rows = [[timeless(row) for row in metrics(run_of(place, folder, name))] for folder in ("two", runs)]
        assert rows[0] == rows[1]
