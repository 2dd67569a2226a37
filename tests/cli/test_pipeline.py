"""The whole pipeline as a user runs it: the quickstart's configs in a small world, adapters, 4 bits, every command."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from rlhf_lit.__main__ import main

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
OVERLAYS = CONFIGS / "overlays"
SHIPPED = sorted(path for path in CONFIGS.glob("*/*.yaml") if path.parent.name not in ("overlays", "evaluate"))
ALGORITHMS = ("sft", "reward", "ppo", "dpo")
WORLD = {"demonstrations": 1000, "prompts": 200, "held_out": 80}
STEPS = 32
# A few steps of everything; the world's sizes reach every stage through `quickstart --world.*`.
FEW = {
    "trainer": {"max_steps": STEPS, "limit_val_batches": 1, "enable_progress_bar": False},
    "data": {"init_args": {"cache": None}},
}


def world(prefix: str) -> list[str]:
    return [f"--{prefix}world.{name}={size}" for name, size in WORLD.items()]


def worlds(algorithm: str) -> list[str]:
    """The same, for the rows of a config that are the world's."""
    rows = ("train",) if algorithm == "sft" else ("train", "validation")
    return [] if algorithm in ("reward", "dpo") else [option for name in rows for option in world(f"data.{name}.")]


def command(*argv: object) -> tuple[str, str]:
    """A command that must end well: what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in argv])
    torch.set_grad_enabled(True)
    assert status == 0, err.getvalue()
    return out.getvalue(), err.getvalue()


def rows(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quickstart has run, small."""
    folder = tmp_path_factory.mktemp("pipeline")
    (folder / "few.yaml").write_text(yaml.safe_dump(FEW))
    before = os.getcwd()
    os.chdir(folder)
    try:
        (folder / "out.txt").write_text(command("quickstart", "--overlays", "few.yaml", *world(""))[0])
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(place)
    return place


def run_folder(place: Path, algorithm: str) -> Path:
    return place / "runs" / "quickstart" / algorithm / "version_0"


# --- the quickstart --------------------------------------------------------------------------------------------------


def test_the_scoreboard_has_the_promised_keys_and_nothing_but_numbers(place: Path) -> None:
    board = json.loads((place / "runs/quickstart/scoreboard.json").read_text())
    assert set(board["models"]) == {"base", "sft", "sft_best_of_4", "ppo", "dpo"}
    for columns in board["models"].values():
        assert set(columns) == {"gold_reward", "win_rate", "kl", "length"}
        for estimate in columns.values():
            assert set(estimate) == {"mean", "low", "high"}
            assert all(math.isfinite(number) for number in estimate.values())
            assert estimate["low"] <= estimate["mean"] <= estimate["high"]
        assert -1 <= columns["gold_reward"]["mean"] <= 1
        assert 0 <= columns["win_rate"]["mean"] <= 1
        assert 1 <= columns["length"]["mean"] <= 24
    assert board["prompts"] == WORLD["held_out"]
    assert 0 <= board["reward_model"]["accuracy"] <= 1
    assert board["seconds"] > 0


def test_kl_is_measured_to_sft(place: Path) -> None:
    models = json.loads((place / "runs/quickstart/scoreboard.json").read_text())["models"]
    assert models["sft"]["kl"] == {"mean": 0, "low": 0, "high": 0}
    assert models["sft_best_of_4"]["kl"]["mean"] == pytest.approx(0.63629, abs=1e-5)
    assert min(models[name]["kl"]["mean"] for name in ("base", "ppo", "dpo")) > 0


def test_there_is_a_picture_and_a_table_to_read(place: Path) -> None:
    picture = (place / "runs/quickstart/scoreboard.png").read_bytes()
    assert picture.startswith(b"\x89PNG\r\n\x1a\n")
    assert len(picture) > 10_000
    said = (place / "out.txt").read_text()
    for words in ("gold reward", "best-of-4", "side by side", "held-out pairs", "scoreboard.json"):
        assert words in said


def test_the_pairs_come_from_the_small_world(place: Path) -> None:
    for file in ("pairs.jsonl", "pairs_held_out.jsonl"):
        pairs = rows(place / "runs/quickstart" / file)
        assert pairs
        assert all(set(pair) == {"prompt", "chosen", "rejected"} for pair in pairs)
    prompts = {pair["prompt"] for pair in rows(place / "runs/quickstart/pairs_held_out.jsonl")}
    assert len(prompts) <= WORLD["held_out"]
    assert not prompts & {pair["prompt"] for pair in rows(place / "runs/quickstart/pairs.jsonl")}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_each_run_folder_is_complete(place: Path, algorithm: str) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    folder = run_folder(place, algorithm)
    assert yaml.safe_load((folder / "config.yaml").read_text())["name"] == f"quickstart/{algorithm}"
    assert json.loads((folder / "versions.json").read_text())["packages"]["torch"] == torch.__version__
    with (folder / "metrics.csv").open(newline="") as file:
        metrics = list(csv.DictReader(file))
    losses = [float(row["train/loss"]) for row in metrics if row["train/loss"]]
    assert all(map(math.isfinite, losses))
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == len(losses)
    assert len(losses) == STEPS or algorithm in ("reward", "dpo")  # two passes over the pairs, which may be fewer
    assert len(losses) > 2
    samples = rows(folder / "samples.jsonl") if algorithm != "reward" else []
    assert (algorithm == "reward") == (not samples)
    assert all({"step", "prompt", "response", "tokens", "ended"} <= set(sample) for sample in samples)

    kind = AutoModelForSequenceClassification if algorithm == "reward" else AutoModelForCausalLM
    model = kind.from_pretrained(folder / "hf")
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")
    text = tokenizer.apply_chat_template([{"role": "user", "content": "what is 1 plus 2?"}], tokenize=False)
    logits = model(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits
    assert logits.shape[-1] == (1 if algorithm == "reward" else len(tokenizer))
    assert logits.isfinite().all()


# --- the other commands ----------------------------------------------------------------------------------------------

HELD_OUT_PAIRS = "runs/quickstart/pairs_held_out.jsonl"
TEST_ROWS = {
    "sft": ["--data.test.path=playground", "--data.test.limit=20"],
    "reward": [f"--data.test.path={HELD_OUT_PAIRS}", "--data.test.limit=20"],
    "dpo": [f"--data.test.path={HELD_OUT_PAIRS}", "--data.test.limit=20"],
    "ppo": ["--data.test.path=playground", "--data.test.split=held_out", "--data.test.limit=20"],
}
MEASURED = {
    "sft": {"loss", "perplexity"},
    "reward": {"loss", "accuracy", "margin", "calibration_error", "length_correlation", "score_mean", "score_std"},
    "dpo": {"loss", "accuracy", "margin", "reward_chosen"},
    "ppo": {"scores", "kl", "kl_exact", "length", "eos_rate"},
}


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_validate_test_and_predict_mean_something(here: Path, algorithm: str) -> None:
    """On what the run has trained: its hf/ as the base."""
    common = [
        "--config", CONFIGS / algorithm / "quickstart.yaml", "--config", "few.yaml", *worlds(algorithm),
        f"--model.base.name=runs/quickstart/{algorithm}", "--model.base.fresh=false", f"--name=after/{algorithm}",
        *TEST_ROWS[algorithm],
    ]  # fmt: skip
    folder = here / "runs" / "after" / algorithm
    for version, (name, stage) in enumerate((("validate", "val"), ("test", "test"))):
        command(name, *common)
        with (folder / f"version_{version}" / "metrics.csv").open(newline="") as file:
            (row,) = csv.DictReader(file)
        measured = {key.removeprefix(f"{stage}/"): float(value) for key, value in row.items() if key.startswith(stage)}
        assert MEASURED[algorithm] <= set(measured)
        assert all(map(math.isfinite, (measured[key] for key in MEASURED[algorithm])))
    said, _ = command("predict", *common)
    assert "20 predictions in" in said
    predictions = rows(folder / "version_2" / "predictions.jsonl")
    assert len(predictions) == 20
    if algorithm == "reward":
        for row in predictions:
            assert row["correct"] == (row["score_chosen"] > row["score_rejected"])
    else:
        for row in predictions:
            assert set(row) == {"prompt", "response", "tokens", "ended"} | ({"score"} if algorithm == "ppo" else set())
            assert isinstance(row["prompt"], str)
            assert row["prompt"]
            assert 1 <= row["tokens"] <= 24
            assert "<eos>" not in row["response"]


def test_a_model_whose_answers_are_all_worth_the_same_makes_no_pairs(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM

    shutil.copytree(run_folder(here, "sft") / "hf", here / "dumb")
    model = AutoModelForCausalLM.from_pretrained(here / "dumb")
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    model.save_pretrained(here / "dumb")
    status = main(["playground", "--model", "dumb", "--to", "none.jsonl", "--world.prompts=10", "--max_new_tokens=2"])
    assert status == 2
    assert "error: dumb: no two of its answers to a prompt differ in worth" in capsys.readouterr().err
    assert not (here / "none.jsonl").exists()


def test_chat_answers_what_is_piped_in(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("what is 1 plus 2?\n\n/reset\nplural of cat?\n/quit\nnever read\n"))
    said, _ = command("chat", "runs/quickstart/sft", "--sampling.max_new_tokens=6")
    assert len(said.splitlines()) == 2


@pytest.mark.parametrize(
    ("algorithm", "checkpoint"), [("sft", "reward"), ("reward", "sft"), ("ppo", "sft"), ("dpo", "reward")]
)
def test_a_checkpoint_of_another_algorithm_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], algorithm: str, checkpoint: str
) -> None:
    """It loads nothing, and the base would be validated in its stead."""
    path = run_folder(here, checkpoint) / "checkpoints" / "last.ckpt"
    status = main(
        [
            *("validate", "--config", str(CONFIGS / algorithm / "quickstart.yaml"), "--config", "few.yaml"),
            *(*worlds(algorithm), "--name=refused", f"--ckpt_path={path}"),
        ]
    )
    torch.set_grad_enabled(True)
    assert status == 2
    assert "error: --ckpt_path" in capsys.readouterr().err


# --- adapters, in full precision and on 4 bits -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=["lora", "qlora"])
def adapters(request: pytest.FixtureRequest, place: Path) -> tuple[str, Path, dict[str, Path]]:
    """All four algorithms for two steps from the quickstart's SFT run, PPO's critic from the reward model's adapter."""
    kind, before = request.param, os.getcwd()
    os.chdir(place)
    folders = {}
    try:
        for algorithm in ALGORITHMS:
            name = f"{kind}/{algorithm}"
            extra = [f"--model.reward.path=runs/{kind}/reward"] if algorithm == "ppo" else []
            if algorithm == "sft":
                extra = ["--model.base.fresh=false"]
            command(
                "fit", "--config", CONFIGS / algorithm / "quickstart.yaml", "--config", "few.yaml",
                "--config", OVERLAYS / f"{kind}.yaml", *worlds(algorithm),
                "--model.base.name=runs/quickstart/sft", "--model.base.lora.rank=4", "--trainer.max_steps=2",
                f"--name={name}", *extra,
            )  # fmt: skip
            folders[algorithm] = place / "runs" / name / "version_0"
    finally:
        os.chdir(before)
    return kind, place, folders


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_adapters_train_and_load_in_plain_peft(
    adapters: tuple[str, Path, dict[str, Path]], algorithm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peft import AutoPeftModelForCausalLM, AutoPeftModelForSequenceClassification

    _, place, folders = adapters
    monkeypatch.chdir(place)
    folder = folders[algorithm]
    with (folder / "metrics.csv").open(newline="") as file:
        steps = [row for row in csv.DictReader(file) if row["train/loss"]]
    assert len(steps) == 2
    norm = "policy/grad_norm" if algorithm == "ppo" else "train/grad_norm"
    assert all(float(row[norm]) > 0 for row in steps)
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert all("lora_" in name or "score" in name or "heads.value" in name for name in weights)
    assert ("heads.value" in " ".join(weights)) == (algorithm == "ppo")

    assert not (folder / "hf" / "model.safetensors").exists()
    tokens = torch.tensor([[1, 20, 30, 40, 2]])
    if algorithm == "reward":
        model = AutoPeftModelForSequenceClassification.from_pretrained(folder / "hf", num_labels=1)
    else:
        model = AutoPeftModelForCausalLM.from_pretrained(folder / "hf")
    moved = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    assert moved
    assert any(parameter.any() for parameter in moved)
    assert model(input_ids=tokens).logits.isfinite().all()


def test_the_critic_took_over_the_reward_models_adapter(adapters: tuple[str, Path, dict[str, Path]]) -> None:
    """Two steps away from it, and nowhere near the policy's, which began at nothing."""
    from peft import load_peft_weights

    _, _, folders = adapters
    reward = load_peft_weights(str(folders["reward"] / "hf"), device="cpu")
    ppo = torch.load(folders["ppo"] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    start = torch.cat([w.flatten() for name, w in sorted(reward.items()) if "lora_A" in name])
    value = torch.cat([w.flatten() for name, w in sorted(ppo.items()) if "lora_A.value" in name])
    policy = torch.cat([w.flatten() for name, w in sorted(ppo.items()) if "lora_A.default" in name])
    assert start.shape == value.shape == policy.shape
    assert (value - start).norm() < 0.1 * start.norm()
    assert (policy - start).norm() > 0.5 * start.norm()
    (head,) = (weight for name, weight in ppo.items() if name.endswith("heads.value.weight"))
    (score,) = (weight for name, weight in reward.items() if "score" in name)
    assert (head - score).norm() < 0.1 * score.norm()


# --- every shipped config --------------------------------------------------------------------------------------------


def of_each_kind() -> list[Path]:
    """One of the shipped configs for each kind of model, data and base."""
    found: dict[tuple[object, ...], Path] = {}
    for path in SHIPPED:
        config = yaml.safe_load(path.read_text())
        model, data = config["model"], config["data"]
        found.setdefault((model["class_path"], data["class_path"], "lora" in model["init_args"]["base"]), path)
    return list(found.values())


@pytest.mark.parametrize("overlay", [None, "debug", "lora", "qlora", "12gb", "wandb"])
def test_every_shipped_config_prints_and_one_of_each_kind_with_every_overlay(
    here: Path, overlay: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(ROOT)  # as from the repository's root, where a config names a test's reward function
    for path in of_each_kind() if overlay else SHIPPED:
        extra = ["--config", OVERLAYS / f"{overlay}.yaml"] if overlay else []
        printed, _ = command("fit", "--config", path, *extra, "--print_config")
        config = yaml.safe_load(printed)
        assert config["model"]["class_path"].startswith("rlhf_lit.algorithms."), path
        if overlay in ("lora", "qlora"):
            assert config["model"]["init_args"]["base"]["lora"]["rank"] == 16, path
        if overlay == "qlora":
            assert config["model"]["init_args"]["base"]["quantization"]["type"] == "nf4", path


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, "rloo", "grpo"])
def test_the_debug_overlay_tries_a_quickstart_config_out(here: Path, algorithm: str) -> None:
    command(
        "fit", "--config", CONFIGS / algorithm / "quickstart.yaml", "--config", OVERLAYS / "debug.yaml",
        *worlds(algorithm), f"--name=debug/{algorithm}",
    )  # fmt: skip
    folder = here / "runs" / "debug" / algorithm / "version_0"
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2
    shutil.rmtree(folder)
