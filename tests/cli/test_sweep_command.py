"""Sweeps through the real parser and the real program, and W&B's logger in the hands of an agent."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from run_folders import assert_equal, final, metrics, timeless

from rlhf_lit.__main__ import main
from rlhf_lit.errors import UserError
from rlhf_lit.sweep import check
from rlhf_lit.sweep.file import SweepFile, read
from rlhf_lit.sweep.records import read_arms

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SHIPPED = sorted(ROOT.glob("sweeps/*.yaml"))
FIT = ["${env}", "${interpreter}", "-m", "rlhf_lit", "fit", "--config"]


def resolve(*commands: list[str]) -> list[dict[str, Any]]:
    return list(check.resolve({str(i): argv for i, argv in enumerate(commands)}))


def holder_of(config: dict[str, Any], key: str) -> tuple[dict[str, Any], str]:
    """Where a dotted key stands, as it is typed without init_args: the mapping, and its name there."""
    *parents, last = key.split(".")
    for part in parents:
        config = config[part] if part in config else config["init_args"][part]
    return (config if last in config else config["init_args"]), last


def at(config: dict[str, Any], key: str) -> Any:
    holder, last = holder_of(config, key)
    return holder[last]


# --- shipped files ---------------------------------------------------------------------------------------------------


def from_the_server(arm: dict[str, Any]) -> dict[str, Any]:
    """Values as they come back from W&B: 5.0 has become 5."""

    def number(text: str) -> float:
        return int(float(text)) if float(text).is_integer() else float(text)

    found: dict[str, Any] = json.loads(json.dumps(arm), parse_float=number)
    return found


def some_arms(file: SweepFile) -> list[dict[str, Any]]:
    """Those of one seed; of numbers, the last."""
    arms = [arm for arm in file.arms(0, None) if arm["seed_everything"] == 2]
    return arms if any(isinstance(value, str) for value in arms[0].values()) else arms[-1:]


@pytest.fixture(scope="module")
def resolved() -> dict[str, list[dict[str, Any]]]:
    """By file: what its command resolves to without any values, and each of some arms."""
    files = {path.stem: read(path) for path in SHIPPED}
    commands = {
        name: [file.argv({}), *(file.argv(from_the_server(arm)) for arm in some_arms(file))]
        for name, file in files.items()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        found = iter(resolve(*(command for group in commands.values() for command in group)))
    return {name: [next(found) for _ in group] for name, group in commands.items()}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_an_arm_of_a_shipped_file_is_its_base_with_the_arms_values(path, resolved):
    base, *found = resolved[path.stem]
    for arm, config in zip(some_arms(read(path)), found, strict=True):
        for key, value in arm.items():
            assert at(config, key) == (whole_class(at(config, key), value) if isinstance(value, str) else value)
            for either in (config, base):  # the values themselves are dealt with: the rest must be the same
                holder, last = holder_of(either, key)
                holder[last] = None
        assert check.difference(base, config) is None


def whole_class(resolved: dict[str, Any], text: str) -> dict[str, Any]:
    """What a class in one text resolves to: its own defaults beside what is written, and nothing of the base's."""
    given = yaml.safe_load(text)
    module, name = resolved["class_path"].rsplit(".", 1)
    assert name == given["class_path"]
    made = getattr(import_module(module), name)(**given["init_args"])
    return {"class_path": f"{module}.{name}", "init_args": dataclasses.asdict(made)}


def test_every_shipped_metric_is_documented_for_its_algorithm():
    """The names are W&B's keys too: a sweep that has run must stay comparable with the next."""
    text = (ROOT / "docs" / "sweeps.md").read_text()
    offered = {m[1]: m[2].split(", ") for m in re.finditer(r"^\| `([\w/]+)` \| ([\w, -]+) \|", text, re.M)}
    assert offered == {
        "val/accuracy": ["DPO", "RewardModel"],
        "val/loss": ["SFT", "RewardModel", "DPO"],
        "val/margin": ["RewardModel", "DPO"],
        "val/perplexity": ["SFT"],
        "val/calibration_error": ["RewardModel"],
        "val/length_correlation": ["RewardModel"],
        "val/scores": ["on-policy"],
        "val/kl_exact": ["on-policy"],
        "val/length": ["on-policy"],
        "val/eos_rate": ["on-policy"],
    }
    defined = (ROOT / "docs" / "metrics.md").read_text()
    for metric, names in offered.items():
        (cell,) = re.findall(rf"^\| `{metric}` \| ([^|]+) \|", defined, re.M)
        assert set(names) <= set(cell.strip().split(", ")), metric
    algorithms = {"dpo": "DPO", "ppo": "on-policy", "reward": "RewardModel"}
    for path in SHIPPED:
        file = read(path)
        config = next(word for word in file.command if word.startswith("configs/") and "overlays" not in word)
        assert algorithms[Path(config).parent.name] in offered[file.metric], path.name


def test_the_file_of_the_page_is_one(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    (block,) = re.findall(
        r"^```\n(# sweeps/mine.yaml\n.*?)^```", (ROOT / "docs" / "sweeps.md").read_text(), re.M | re.S
    )
    (tmp_path / "mine.yaml").write_text(block)
    file = read(tmp_path / "mine.yaml")
    arms = file.arms(0, None)
    assert len(arms) == 20
    kinds = {yaml.safe_load(arm["model.kl"])["class_path"]: arm for arm in arms}
    for (kind, arm), config in zip(kinds.items(), resolve(*map(file.argv, kinds.values())), strict=True):
        assert at(config, "model.kl")["class_path"].endswith(kind)
        assert at(config, "model.learning_rate") == pytest.approx(arm["model.learning_rate"], rel=1e-15)
    assert set(kinds) == {"FixedKL", "AdaptiveKL"}


# --- values ----------------------------------------------------------------------------------------------------------

VALUES: list[tuple[str, str, Any]] = [  # as YAML has them, and as the run gets them
    ("model.learning_rate", "1.0e-05", 1e-05),
    ("model.max_update_kl", "1e-05", 1e-05),  # a text to YAML 1.1
    ("model.advantages.whiten", "false", False),
    ("model.sampling.temperature", "0.7", 0.7),
    ("model.policy_loss.dual_clip", "'null'", None),
    ("model.optimizer.max_grad_norm", "'null'", None),
    ("model.optimizer.betas", "[0.8, 0.95]", [0.8, 0.95]),
    ("model.base.lora", "'{rank: 4, alpha: 8.0}'", {"rank": 4, "alpha": 8.0}),
    ("model.base.quantization", "'null'", None),
    ("model.shaping.missing_eos", "{rule: subtract, value: 1}", {"rule": "subtract", "value": 1.0}),
    ("model.kl", "AdaptiveKL", {"class_path": "rlhf_lit.losses.kl.AdaptiveKL"}),
    ("model.kl.beta", "0.2", 0.2),
    ("model.kl.target", "3", 3.0),
    ("data.validation.limit", "'null'", None),
    ("debug.dump_rollouts", "true", True),
    ("data.cache", "'null'", None),
    ("trainer.max_steps", "5", 5),
    ("trainer.limit_val_batches", "0.5", 0.5),
    ("seed_everything", "7", 7),
]


def test_values_survive_from_the_file_to_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    given = "".join(f"  {key}: {{value: {value}}}\n" for key, value, _ in VALUES)
    (tmp_path / "s.yaml").write_text(
        f"method: grid\ncommand: {[*FIT, 'configs/ppo/quickstart.yaml', '${args}']}\nparameters:\n{given}"
    )
    file = read(tmp_path / "s.yaml")
    (arm,) = file.arms(0, None)
    (config,) = resolve(file.argv(arm))
    for key, _, wanted in VALUES:
        found = at(config, key)
        if isinstance(wanted, dict):
            found = {name: found[name] for name in wanted}
        assert found == wanted, key
        assert type(found) is type(wanted), key


@pytest.mark.parametrize("key", ["model.optimizer.max_grad_norm", "model.init_args.optimizer.max_grad_norm"])
def test_null_survives_inside_a_mapping_and_a_text_stays_one(place, key):
    other = "model.optimizer={max_grad_norm: null, name: adamw}"
    for word in (f"--{key}=null", f"--{other}"):
        (config,) = resolve(["fit", "--config", "dpo.yaml", word, "--data.train.name=None of these"])
        assert at(config, "model.optimizer.max_grad_norm") is None
        assert at(config, "data.train.name") == "None of these"


# --- checked before anything starts ----------------------------------------------------------------------------------


def write(parameters: dict[str, Any], *more: str, config: str = "dpo.yaml", **top: Any) -> None:
    """A sweep file in the working folder."""
    content = {"method": "grid", "command": [*FIT, config, *more, "${args}"], "parameters": parameters, **top}
    Path("s.yaml").write_text(yaml.safe_dump(content))


BAD = [
    ({"model.loss.beta": {"values": [0.1, "much"]}}, "arm 001-beta=much: model.loss.beta: expected float, got 'much'"),
    ({"model.loss.beta": {"values": [0.1, -1.0]}}, "arm 001-beta=-1: .*loss.beta must be greater than 0, not -1"),
    ({"model.loss.bta": {"values": [0.1, 0.2]}}, "arm 000-bta=0.1: model.loss.bta: unknown key; DPOLoss has"),
    ({"model.loss": {"values": ["DPOLoss", "X"]}}, "arm 001-loss=X: model.loss: there is no class named 'X'"),
    (
        {"model.loss": {"value": "SimPOLoss"}, "model.loss.label_smoothing": {"value": 0.1}},
        "arm 000: model.loss.label_smoothing: unknown key",
    ),
    ({"trainer.gradient_clip_val": {"value": 1.0}}, "arm 000: trainer.gradient_clip_val is not for this"),
]


@pytest.mark.parametrize(("parameters", "line"), BAD, ids=range(len(BAD)))
def test_a_bad_arm_is_one_line_that_names_it_and_its_key(run, parameters, line):
    write(parameters)
    answer = run("sweep", "s.yaml", "--dry-run")
    assert (answer.status, answer.out) == (2, "")
    assert re.search(line, answer.err.splitlines()[-1]), answer.err
    assert re.fullmatch(r"checking \d arms", "\n".join(answer.err.splitlines()[:-1]))


def test_nothing_is_started_or_written_while_an_arm_is_bad(run):
    write(BAD[0][0])
    answer = run("sweep", "s.yaml")
    assert (answer.status, answer.out) == (2, "")
    assert "arm 001-beta=much" in answer.err
    assert not Path("runs").exists()


def test_an_option_that_a_later_class_drops_is_no_arm(place):
    """The parser leaves it out without a word; an arm of that name would be another run than it says."""
    with pytest.raises(UserError, match=r"arm 0: model\.loss\.label_smoothing: .* is not used"):
        resolve(["fit", "--config", "dpo.yaml", "--model.loss.label_smoothing=0.2", "--model.loss=IPOLoss"])


# --- arms that train -------------------------------------------------------------------------------------------------


def test_a_killed_and_resumed_sweep_ends_as_its_commands_do(run, monkeypatch):
    """Ended by SIGTERM when its first arm has made a step beyond its checkpoint, against the commands of a dry run."""
    parameters = {"model.loss.beta": {"values": [0.1, 0.5]}, "data.batch_size": {"value": 4}}
    saving = ("--checkpoint.every_n_train_steps=2", "--trainer.callbacks=ended_from_outside.StallAt")
    write(parameters, *saving, metric={"name": "val/loss"})
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(HERE)]))
    monkeypatch.syspath_prepend(HERE)
    lines = [shlex.split(line) for line in run("sweep", "s.yaml", "--dry-run", "--to=whole").out.splitlines()]
    assert len(lines) == 2
    monkeypatch.setenv("STALL_AT", "0")  # never
    for line in lines:
        assert main(line[line.index("rlhf_lit") + 1 :]) == 0

    monkeypatch.setenv("STALL_AT", "5")
    note = Path("runs/sweeps/s/000-beta=0.1/version_0/stalled")
    threading.Thread(target=terminate_when, args=(note,)).start()
    answer = run("sweep", "s.yaml")
    assert answer.status == 130, answer.out + answer.err
    arms = read_arms(Path("runs/sweeps/s"))
    assert [(arm.status, arm.attempts) for arm in arms] == [("interrupted", 1), ("waiting", 0)]
    assert final(note.parent)["global_step"] == 4

    monkeypatch.setenv("STALL_AT", "0")
    answer = run("sweep", "s.yaml", "--resume")
    assert answer.status == 0, answer.out + answer.err
    assert answer.out.count("from its last checkpoint") == 1
    for arm in read_arms(Path("runs/sweeps/s")):
        there, whole = Path("runs/sweeps/s", arm.name, arm.run), Path("whole", arm.name, "version_0")
        assert arm.status == "finished"
        assert [timeless(row) for row in metrics(there)] == [timeless(row) for row in metrics(whole)]
        assert arm.metric == float([row["val/loss"] for row in metrics(whole) if row["val/loss"]][-1])
        assert_equal(final(there)["state_dict"], final(whole)["state_dict"])


def terminate_when(note: Path) -> None:
    """SIGTERM to this process, where the sweep runs, as soon as its arm has left a note."""
    deadline = time.monotonic() + 300
    while not note.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_run_that_is_terminated_does_not_pass_for_a_finished_one(run, monkeypatch):
    """Lightning leaves with a SystemExit that has no status, which is 0."""
    monkeypatch.syspath_prepend(HERE)
    answer = run("fit", "--config", "dpo.yaml", "--trainer.callbacks=ended_from_outside.TerminateItself")
    assert answer.status == 143
    newest = "runs/dpo/version_0/checkpoints/step_0000001.ckpt"
    assert answer.err.splitlines()[-1].startswith(f"terminated; the newest whole checkpoint is {newest}: ")
    assert not Path("runs/dpo/version_0/hf").exists()


# --- Weights & Biases ------------------------------------------------------------------------------------------------

LOGGED = ("fit", "--config", "dpo.yaml", "--config", ROOT / "configs" / "overlays" / "wandb.yaml")


@pytest.fixture
def wandb_alone(monkeypatch, tmp_path):
    """wandb without an account, a network, or anything left from another test."""
    import wandb

    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name, value in {"HOME": "", "NETRC": "netrc", "WANDB_CONFIG_DIR": "wandb"}.items():
        monkeypatch.setenv(name, str(tmp_path / value))
    monkeypatch.setenv("WANDB_MODE", "offline")
    wandb.teardown()
    yield monkeypatch
    wandb.teardown()


def recorded(run: Path) -> list[str]:
    """Ids of the W&B runs in a run's folder, oldest first."""
    return [path.name.rsplit("-", 1)[-1] for path in sorted(run.glob("wandb/offline-run-*"))]


def test_a_resumed_run_keeps_its_wandb_id(run, wandb_alone):
    short = (*LOGGED, "--preflight=false", "--trainer.limit_val_batches=0", "--trainer.limit_train_batches=1")
    assert run(*short).status == 0
    time.sleep(1.1)  # W&B names the folders of offline runs by the second
    assert run(*short, "--trainer.max_epochs=2", "--ckpt_path=last").status == 0
    first, again = recorded(Path("runs/dpo/version_0"))
    assert first == again == Path("runs/dpo/version_0/wandb_id.txt").read_text().strip()


def test_an_agent_says_which_run_an_arm_is(run, wandb_alone, tmp_path):
    """Its environment, as `wandb agent` sets it; the id that an earlier run left in the folder has no say."""
    from wandb.sdk.lib import config_util

    parameters = tmp_path / "config-agents1.yaml"
    config_util.save_config_file_from_dict(str(parameters), {"model.loss.beta": {"value": 0.3}})
    for name, value in (("SWEEP_ID", "sweep1"), ("RUN_ID", "agents1"), ("SWEEP_PARAM_PATH", str(parameters))):
        wandb_alone.setenv(f"WANDB_{name}", value)
    answer = run(*LOGGED, "--config", ROOT / "configs" / "overlays" / "debug.yaml", "--model.loss.beta=0.3")
    assert answer.status == 0, answer.err
    assert "Ignoring" not in answer.err
    assert "W&B gave up" not in answer.err
    folder = Path("runs/dpo/version_0")
    assert recorded(folder) == ["agents1"]
    import wandb

    wandb.teardown()
    (log,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    assert b"model.loss.beta" in log.read_bytes(), "the sweep's parameter, by its own name"
    assert b"val/loss" in log.read_bytes()


def test_a_disabled_wandb_leaves_no_id_behind(run, wandb_alone):
    """Its id is made up: a later run that goes on with W&B would take it for one that is known there."""
    wandb_alone.setenv("WANDB_MODE", "disabled")
    assert run(*LOGGED, "--config", ROOT / "configs" / "overlays" / "debug.yaml").status == 0
    assert not Path("runs/dpo/version_0/wandb_id.txt").exists()
    assert not Path("runs/dpo/version_0/wandb").exists()
