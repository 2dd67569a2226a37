"""The steps of one process, by two under DDP and by two or four whose weights are sharded (FSDP2 and its options); from
one to the other."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import Run
from run_folders import final, metrics, save_small_mixture, save_small_model, timeless

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
STEPS, HALF = 10, 5
# A reward model, the policy that learns from it, and what learns from files; a score is asked for before PPO begins.
NAMES = ("sft", "reward", "dpo", "ppo", "kto", "grpo")
LORA = {"lora": {"rank": 4}}
PARTS = {"lora": {"rank": 4, "modules_to_save": ["lm_head", "embed_tokens", "norm"]}}
QLORA = {**LORA, "quantization": {"type": "nf4", "compute_dtype": "float32"}}
# What of a model trains. Not GRPO with adapters: its first steps are so far that they blow rounding up to 1e-3, under
# DDP as under FSDP2.
WAYS_TO_TRAIN = {"": {}, "_lora": LORA, "_qlora": QLORA, "_parts": PARTS}
KINDS = [*NAMES, *(f"{name}_lora" for name in NAMES[:5]), *(f"{name}_qlora" for name in NAMES[:4]), "dpo_parts"]
OVERLAYS = Path(__file__).parents[2] / "configs" / "overlays"
OPTIONS = {"zero2": "fsdp2_zero2", "offload": "fsdp2_offload", "hsdp": "hsdp"}  # of FSDP2, by the overlay
WAYS: dict[str, tuple[int, tuple[str, ...]]] = {"one": (1, ()), "fsdp": (2, ("--trainer.strategy=fsdp",))}
for ranks in (1, 2, 4):
    suffix = "" if ranks == 2 else f"_{ranks}"
    WAYS |= {f"{strategy}{suffix}": (ranks, (f"--trainer.strategy={strategy}",)) for strategy in ("ddp", "fsdp2")}
    WAYS |= {f"{way}{suffix}": (ranks, (f"--config={OVERLAYS / overlay}.yaml",)) for way, overlay in OPTIONS.items()}


def scorer_of(name: str) -> str:
    """The reward model that a policy of this name learns from."""
    return "_".join(["reward", *name.split("_")[1:]])


def config(folder: Path, full: str) -> dict[str, Any]:
    name, lora = full.partition("_")[0], "_" in full
    scorer = str(run_of(folder, "one", scorer_of(full)))
    model: dict[str, Any] = {
        "base": {"name": str(folder / "model"), **WAYS_TO_TRAIN[full.removeprefix(name)]},
        "learning_rate": 1e-2 if lora and name != "ppo" else 2e-3,
        # Adam divides by the gradient's own size: rounding in one that is nearly 0 would become a step.
        "optimizer": {"eps": 1e-2},
        "schedule": {"name": "constant"},
    }
    kind, data = {
        "sft": ("SFT", "SFTDataModule"), "reward": ("RewardModel", "PreferenceDataModule"),
        "dpo": ("DPO", "PreferenceDataModule"), "kto": ("KTO", "UnpairedDataModule"),
        "ppo": ("PPO", "RolloutDataModule"), "grpo": ("GRPO", "RolloutDataModule"),
    }[name]  # fmt: skip
    options: dict[str, Any] = {"batch_size": 4, "micro_batch_tokens": 64}
    if name == "reward":
        model["centre_pairs"] = 4
    else:
        model["sampling"] = {"max_new_tokens": 8}
    if name == "sft":
        model["base"]["gradient_checkpointing"] = True
    if name == "dpo":
        model["loss"] = {"class_path": "DPOLoss", "init_args": {"beta": 0.5}}
    if name == "kto":
        model |= {"loss": {"beta": 0.5}, "reference": {"precompute": True, "cache": str(folder / "cache")}}
    if name in ("ppo", "grpo"):
        # Neither the 5 prompts nor the minibatches of 5 divide by the ranks.
        options = {"rollout_size": 5, "samples_per_prompt": 2, "batch_size": 5, "ppo_epochs": 2,
                   "micro_batch_tokens": 64}  # fmt: skip
        model |= {
            "reward": {"class_path": "RewardFromModel", "init_args": {"path": scorer}},
            "kl": {"class_path": "AdaptiveKL", "init_args": {"beta": 0.2, "target": 1.0, "horizon": 50}},
            "shaping": {"normalise": "standardise"},
        }
    if name == "grpo":
        model["kl"]["init_args"] |= {"estimator": "full", "placement": "loss"}
        model["advantages"] = {"scale": "none"}  # equal answers score alike but for rounding, which it would blow up
    if name == "ppo":
        model["critic"] = {"learning_rate": 5e-3, "warmup": 2}
    return {
        "name": full,
        "preflight": full in ("sft", "ppo"),  # in the others it would only take its time
        "model": {"class_path": kind, "init_args": model},
        "data": {
            "class_path": data,
            "init_args": {
                "train": {"path": f"{name}.jsonl"}, "validation": {"path": f"{name}.jsonl"}, "cache": None, **options,
            },
        },
        "trainer": {"max_steps": STEPS, "accelerator": "cpu", "enable_progress_bar": False, "max_epochs": -1},
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model, nine ragged rows of each kind (the last batch of four leaves a rank without any) and
    all configs."""
    folder = tmp_path_factory.mktemp("sharded")
    save_small_model(folder / "model")
    sft = [{"prompt": " ".join(WORDS[: 1 + i % 5]), "completion": " ".join(WORDS[i:] * (1 + i % 3))} for i in range(9)]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " ".join(WORDS[: 1 + i])}
        for i, row in enumerate(sft)
    ]
    prompts = [{"prompt": " ".join(WORDS[i : i + 1 + i % 4] * (1 + i % 3))} for i in range(5)]
    judged = [{**row, "label": i % 3 != 0} for i, row in enumerate(sft)]
    rows = {"sft": sft, "reward": pairs, "dpo": pairs, "kto": judged, "ppo": prompts, "grpo": prompts}
    for name in NAMES:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[name]))
    for full in KINDS:
        (folder / f"{full}.yaml").write_text(yaml.safe_dump(config(folder, full)))
    return folder


def fit(folder: Path, name: str, way: str, *options: str, runs: str | None = None) -> Run:
    ranks, chosen = WAYS[way]
    argv = ("fit", "--config", f"{name}.yaml", *chosen, f"--runs={runs or way}", f"--trainer.devices={ranks}")
    run = Run(*argv, *options, folder=folder, ranks=ranks)
    run.wait()
    return run


def run_of(folder: Path, runs: str, name: str) -> Path:
    return folder / runs / name / "version_0"


def alone(folder: Path, name: str) -> Path:
    """The run of one process; made where it is asked for first."""
    for wanted in [scorer_of(name), name] if name.startswith(("ppo", "grpo")) else [name]:
        if not run_of(folder, "one", wanted).exists():
            fit(folder, wanted, "one")
    return run_of(folder, "one", name)


def assert_same_run(a: Path, b: Path) -> None:
    """Losses, weights and optimizer state, to 1e-5; and every other number that was logged."""
    rows = [[{k: float(v) for k, v in timeless(row).items() if v} for row in metrics(run)] for run in (a, b)]
    assert len(rows[0]) == len(rows[1]) > STEPS
    for row, other in zip(*rows, strict=True):
        for key in [key for key in row if key.endswith(("clipfrac", "zero_advantages"))]:
            row[key], other[key] = 0, 0  # a count beyond a threshold, which rounding may decide
        for key in [key for key in row if key.endswith("loss")]:
            assert other.pop(key) == pytest.approx(row.pop(key), rel=1e-5, abs=1e-5), (key, row["step"])
        for key in [key for key in row if key == "policy/grad_norm"]:  # rounding may decide whether a token is clipped
            assert other.pop(key) == pytest.approx(row.pop(key), rel=1e-3), (key, row["step"])
        # Rewards and KL are differences of sums of log-probs near 100, of which float32 keeps five digits.
        assert other == pytest.approx(row, rel=1e-4, abs=1e-4), row["step"]
    assert_same_state(final(a), final(b))


def assert_same_state(first: Any, second: Any) -> None:
    assert first["state_dict"].keys() == second["state_dict"].keys()
    for key, value in first["state_dict"].items():
        assert torch.allclose(value, second["state_dict"][key], rtol=0, atol=1e-5), key
    for mine, yours in zip(first["optimizer_states"], second["optimizer_states"], strict=True):
        assert mine["param_groups"] == yours["param_groups"]
        assert mine["state"].keys() == yours["state"].keys()
        for number, values in mine["state"].items():
            for name, value in values.items():
                assert torch.allclose(value, yours["state"][number][name], rtol=1e-4, atol=1e-5), (number, name)


def exported(run: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    (file,) = (run / "hf").glob("*.safetensors")
    return load_file(file)


def moved(run: Path) -> float:
    """How far the run went from what it began as: by the change in its loss from step to step."""
    key = "policy/loss" if (run.parent.name.startswith(("ppo", "grpo"))) else "train/loss"
    losses = [float(row[key]) for row in metrics(run) if row.get(key)]
    return max(abs(b - a) for a, b in pairwise(losses))


def assert_way_is_that_of_one(folder: Path, name: str, way: str) -> None:
    """The same run, weights and model folder as of one process."""
    one, several = alone(folder, name), run_of(folder, way, name)
    assert moved(one) > 1e-3, "the steps are large enough to tell"
    fit(folder, name, way)
    assert not (several.parent / "version_1").exists(), "one run, one folder"
    assert_same_run(one, several)
    first, second = exported(one), exported(several)
    assert first.keys() == second.keys()
    for key, value in first.items():
        assert torch.allclose(value, second[key], rtol=0, atol=1e-5), key
    configs = [json.loads(next((run / "hf").glob("*config.json")).read_text()) for run in (one, several)]
    assert configs[0] == configs[1]


# Two processes take seconds for each: every run of the tests has what differs most, and `make soak` the rest.
QUICK = {
    "ddp": ("sft", "reward", "dpo", "ppo", "sft_lora", "ppo_lora"),
    # Every algorithm, and every way to train by SFT, PPO or DPO.
    "fsdp2": (*NAMES, "sft_lora", "ppo_lora", "sft_qlora", "ppo_qlora", "dpo_parts"),
    "zero2": ("ppo_lora",),
    "offload": ("sft_qlora", "ppo"),
}
ALL = {"ddp": [name for name in KINDS if name.partition("_")[0] in NAMES[:4] and "qlora" not in name]}


@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=[pytest.mark.soak] * (name not in quick))
        for way, quick in QUICK.items()
        for name in ALL.get(way, KINDS)
    ],
)
def test_two_ranks_make_the_steps_of_one(place, name, way):
    """KTO and GRPO under DDP are in files of their own."""
    assert_way_is_that_of_one(place, name, way)


@pytest.mark.parametrize("way", ["hsdp_4", *(pytest.param(w, marks=pytest.mark.soak) for w in ("ddp_4", "fsdp2_4"))])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.soak] * (name not in ("sft", "ppo"))) for name in KINDS]
)
def test_four_ranks_do_too(place, name, way):
    """A rank has a row of each batch, or none; under HSDP they are two replicas of two shards."""
    assert_way_is_that_of_one(place, name, way)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["ppo", "dpo_lora"])
def test_replicas_of_one_shard_each_do_too(place, name):
    assert_way_is_that_of_one(place, name, "hsdp")


@pytest.mark.parametrize("way", ["fsdp2_1", pytest.param("offload_1", marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", ["ppo", pytest.param("ppo_lora", marks=pytest.mark.soak)])
def test_one_rank_does_too(place, name, way):
    """As on a single GPU: nothing is spread."""
    assert_way_is_that_of_one(place, name, way)


@pytest.mark.soak
def test_fsdp_means_fsdp2(place):
    assert_way_is_that_of_one(place, "sft", "fsdp")


@pytest.mark.parametrize(
    ("name", "way"),
    [("dpo", "fsdp2"), *(pytest.param(*case, marks=pytest.mark.soak) for case in
                         (("dpo_lora", "fsdp2"), ("dpo", "offload"), ("dpo_lora", "hsdp_4")))],
)  # fmt: skip
def test_a_reference_that_moves_is_that_of_one_process(place, name, way):
    moving = ("--model.reference.update.every=2", "--model.reference.update.mix=0.5")
    for ranks in ("one", way):
        fit(place, name, ranks, *moving, runs=f"moving_{ranks}")
    assert_same_run(run_of(place, "moving_one", name), run_of(place, f"moving_{way}", name))
    still, moved = (metrics(run)[STEPS - 1] for run in (alone(place, name), run_of(place, "moving_one", name)))
    assert still["train/loss"] != moved["train/loss"]


@pytest.mark.parametrize("way", [pytest.param(way, marks=pytest.mark.soak) for way in ("fsdp2", "offload", "zero2")])
def test_a_policy_in_16_bits_beside_a_reward_model_in_32(place, way):
    """Heads and rewards have another dtype than the policy. 16 bits hold three digits."""
    alone(place, scorer_of("ppo"))
    firsts = []
    for strategy in ("ddp", way):
        fit(place, "ppo", strategy, "--model.base.dtype=bfloat16", "--trainer.max_steps=4", runs=f"narrow_{strategy}")
        firsts.append(next(row for row in metrics(run_of(place, f"narrow_{strategy}", "ppo")) if row["policy/loss"]))
    for key in ("policy/loss", "value/loss", "policy/grad_norm"):
        assert float(firsts[0][key]) == pytest.approx(float(firsts[1][key]), rel=0.02, abs=0.01), key


@pytest.mark.soak
@pytest.mark.parametrize("targets", ["all-linear", "[q_proj, v_proj]"])
def test_experts_in_4_bits_are_those_of_one_process(place, targets):
    """With adapters on the experts themselves, and beside them."""
    save_small_mixture(place / "mixture")
    options = [f"--model.base.name={place / 'mixture'}", f"--model.base.lora.targets={targets}"]
    for way in ("one", "fsdp2"):
        fit(place, "sft_qlora", way, *options, runs=f"mixture_{targets[:3]}_{way}")
    runs = [run_of(place, f"mixture_{targets[:3]}_{way}", "sft_qlora") for way in ("one", "fsdp2")]
    assert moved(runs[0]) > 1e-3
    assert any(".experts." in name for name in exported(runs[0])) == (targets == "all-linear")
    assert_same_run(*runs)


@pytest.mark.parametrize("way", ["fsdp2"])
def test_operations_are_counted_as_for_whole_weights(place, way):
    """On rank 0, which has the same rows as under DDP."""
    counts = []
    for strategy in ("ddp", way):
        run = run_of(place, strategy, "sft_lora")
        if not run.exists():
            fit(place, "sft_lora", strategy)
        rows = [row for row in metrics(run) if row["train/tokens_per_s"]]
        counts.append([float(row["train/tflops_per_s"]) / float(row["train/tokens_per_s"]) for row in rows])
    assert len(counts[0]) == STEPS
    assert counts[0] == pytest.approx(counts[1], rel=1e-5)


MOVES = [
    ("fsdp2", "one"), ("one", "fsdp2"), ("fsdp2", "ddp"), ("ddp", "fsdp2"), ("offload", "one"), ("one", "offload"),
    ("hsdp_4", "fsdp2"), ("fsdp2", "hsdp_4"), ("zero2", "offload"), ("offload", "hsdp_4"), ("hsdp_4", "offload"),
]  # fmt: skip
QUICK_MOVES = {
    "sft": [("fsdp2", "one"), ("ddp", "fsdp2"), ("zero2", "offload")],
    "ppo": [("one", "fsdp2"), ("fsdp2", "ddp"), ("offload", "hsdp_4")],
    "reward_lora": [],
}


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        pytest.param(name, *move, marks=[pytest.mark.soak] * (move not in quick))
        for name, quick in QUICK_MOVES.items()
        for move in MOVES
    ],
)
def test_a_checkpoint_goes_on_under_another_strategy(place, name, before, after):
    runs = f"{before}_{after}"
    alone(place, name)
    fit(place, name, before, f"--trainer.max_steps={HALF}", runs=runs)
    fit(place, name, after, "--ckpt_path=last", runs=runs)
    assert_same_state(final(run_of(place, "one", name)), final(run_of(place, runs, name)))


SABOTEUR = """
from lightning.pytorch import Callback
from safetensors.torch import load_file, save_file
from rlhf_lit.trainer import callbacks

class Harm(Callback):
    def on_fit_start(self, trainer, pl_module):
        save = callbacks.save_hf

        def harmful(module, folder, weights):
            save(module, folder, weights)
            file = folder / "model.safetensors"
            tensors = load_file(file)
            tensors["model.norm.weight"][0] += 1
            save_file(tensors, file, metadata={"format": "pt"})

        callbacks.save_hf = harmful
"""


def test_an_export_that_is_not_the_model_ends_every_rank(place):
    (place / "saboteur.py").write_text(SABOTEUR)
    argv = ("fit", "--config", "sft.yaml", "--runs=harmed", "--trainer.devices=2", "--trainer.strategy=fsdp2")
    run = Run(*argv, "--trainer.callbacks+=saboteur.Harm", folder=place, path=[place], ranks=2)
    assert run.statuses() == [2, 2], run.said()
    said = "hf.refused: what was saved is not the model that was trained: model.norm.weight is up to 1 away"
    assert said in run.said()
    assert "Traceback" not in run.said()
    assert not (run_of(place, "harmed", "sft") / "hf").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--trainer.strategy=fsdp_cpu_offload",), "trainer.strategy fsdp_cpu_offload: not supported; use fsdp2 (opt"),
        (
            ("--trainer.strategy=fsdp", "--model.optimizer.name=adamw_8bit"),
            "adamw_8bit knows no sharded weights; set it to adamw",
        ),
        (
            (f"--config={OVERLAYS / 'hsdp.yaml'}", "--trainer.strategy.replicas=3", "--trainer.devices=2"),
            "trainer.strategy.replicas: 2 ranks do not make 3 replicas of equal size; set it to a divisor",
        ),
        (
            (f"--config={OVERLAYS / 'hsdp.yaml'}", "--trainer.strategy.replicas=0"),
            "trainer.strategy.replicas must be at least 1, not 0",
        ),
    ],
)
def test_what_cannot_be_sharded_is_refused_in_one_line(place, options, said):
    argv = ("fit", "--config", "sft.yaml", "--runs=refused", "--trainer.devices=2")
    run = Run(*argv, *options, folder=place, ranks=2)
    assert run.statuses() == [2, 2], run.said()
    assert said in run.said()
    assert "Traceback" not in run.said()
