"""Sweep files: what is read, what is refused, and the command of an arm against the one wandb's agent makes."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lit.errors import UserError
from rlhf_lit.sweep.file import read

ROOT = Path(__file__).parents[3]
SHIPPED = sorted(ROOT.glob("sweeps/*.yaml"))

GOOD: dict[str, Any] = {
    "method": "grid",
    "program": "rlhf_lit",
    "command": ["${env}", "${interpreter}", "-m", "${program}", "fit", "--config", "a.yaml", "${args}"],
    "parameters": {"seed_everything": {"values": [0, 1]}, "model.kl.beta": {"value": 0.1}, "model.kl": {"value": "K"}},
}


def write(folder: Path, **changes: Any) -> Path:
    """The good file with some keys changed, or taken out where they are None."""
    content = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    path = folder / "s.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def test_parameters_follow_each_other_by_name(tmp_path):
    """As in W&B's search, so that a class stands before its arguments."""
    arms = read(write(tmp_path)).arms(0, None)
    assert [list(arm.items()) for arm in arms] == [
        [("model.kl", "K"), ("model.kl.beta", 0.1), ("seed_everything", seed)] for seed in (0, 1)
    ]


def test_the_number_of_arms(tmp_path):
    assert len(read(write(tmp_path)).arms(0, 1)) == 1
    assert len(read(write(tmp_path, run_cap=1)).arms(0, 5)) == 1
    random = write(tmp_path, method="random", run_cap=7)
    assert len(read(random).arms(0, None)) == 7
    assert len(read(random).arms(0, 3)) == 3
    with pytest.raises(UserError, match="a random search has no end"):
        read(write(tmp_path, method="random")).arms(0, None)


def agents_command(path: Path, parameters: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The words with which `wandb agent` would start a run: its own method, without a server or a process."""
    from wandb import wandb_agent

    started: list[list[str]] = []

    class Captured:
        def __init__(self, command: list[str], **_: Any) -> None:
            started.append(command)

    monkeypatch.setattr(wandb_agent, "AgentProcess", Captured)
    monkeypatch.setenv("WANDB_DIR", os.getcwd())
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")  # the agent sets both, for good
    content = yaml.safe_load(path.read_text())
    agent = wandb_agent.Agent(None, None, sweep_id="id")
    agent._sweep_command = content["command"]
    arguments = {name: {"value": value} for name, value in parameters.items()}
    agent._command_run({"run_id": "run", "program": content["program"], "args": arguments})
    return started[0]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_an_arm_has_the_command_of_an_agents_run(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = read(path)
    for parameters in (file.arms(0, None)[0], file.arms(0, None)[-1]):
        theirs = agents_command(path, parameters, monkeypatch)
        ours = file.words(parameters, "--runs=r")
        assert theirs[:2] == ["/usr/bin/env", "python"]
        assert ours[:2] == ["/usr/bin/env", sys.executable]
        assert ours[2:] == [*theirs[2:], "--runs=r"]
        assert file.argv(parameters) == theirs[4:]
        assert theirs[2:5] == ["-m", "rlhf_lit", "fit"]


def test_the_environment_is_filled_in_as_wandb_does_it(tmp_path, monkeypatch):
    monkeypatch.setenv("BASE", "b.yaml")
    command = ["rlhf-lit", "fit", "--config", "configs/${envvar:BASE}", "${args}"]
    file = read(write(tmp_path, command=command))
    for _ in range(2):
        words = file.words({"a": True, "b": [1, 2]})
        assert words == ["rlhf-lit", "fit", "--config", "configs/b.yaml", "--a=True", "--b=[1, 2]"]


def test_the_shipped_files_are_the_ones_that_are_documented():
    assert [path.stem for path in SHIPPED] == ["dpo_beta", "dpo_losses", "ppo_kl", "ppo_kl_controller", "reward_data"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_files_say_what_they_are(path):
    file = read(path)
    head = [line for line in file.text.splitlines() if line.startswith("#")]
    assert head[0].count("?") or head[1].count("?"), "the question"
    assert f"python -m rlhf_lit sweep sweeps/{path.name}" in file.text
    assert f"wandb sweep sweeps/{path.name}" in file.text
    seeds = next(p for p in file.parameters if p.name == "seed_everything").points()
    assert len(seeds) >= 3
    assert f"# {len(file.arms(0, None))} arms" in file.text
    assert file.command[-1] == "${args}"
    assert yaml.safe_load(file.text)["name"] == path.stem
    assert f"--name={path.stem}" in file.command


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"method": "bayes"}, "method: expected grid or random, not 'bayes' .*wandb agent"),
        ({"method": None}, "method: expected grid or random, not None"),
        ({"early_terminate": {"type": "hyperband"}}, "early_terminate: a local sweep runs every arm to its end"),
        ({"controller": {"type": "local"}}, "controller: "),
        ({"metrics": []}, "metrics: "),
        ({"job": "x"}, "job: this is a W&B Launch sweep"),
        ({"paramters": {}}, "paramters: unknown key"),
        ({"parameters": {}}, "parameters: expected dotted keys"),
        ({"parameters": {"ckpt_path": {"value": "last"}}}, "parameters.ckpt_path: the sweep sets this"),
        ({"parameters": {"a": {"distribution": "normal"}}}, "parameters.a: a grid has no points of normal"),
        ({"command": None}, "command: expected a list of words"),
        ({"command": ["python", "-m", "rlhf_lit", "fit"]}, r"\$\{args\} must stand there once"),
        ({"command": ["python", "-m", "rlhf_lit", "fit", "${args}", "--config", "a.yaml"]}, "put .* last"),
        ({"command": ["python", "-m", "rlhf_lit", "fit", "${args}", "--config=a.yaml"]}, "put .* last"),
        ({"command": ["python", "-m", "rlhf_lit", "fit", "x=${args}"]}, "as a word of its own"),
        ({"command": ["python", "-m", "rlhf_lit", "fit", "${args_json}"]}, "as a word of its own"),
        ({"command": ["python", "train.py", "${args}"]}, "only `python -m rlhf_lit fit"),
        ({"command": ["python", "-m", "rlhf_lit", "validate", "${args}"]}, "only `python -m rlhf_lit fit"),
        ({"command": ["rlhf-lit", "fit", "--runs=x", "${args}"]}, "--runs=x: the sweep sets this itself"),
        ({"program": None}, "program: expected a name"),
        ({"run_cap": 0}, "run_cap: expected a whole number above 0"),
        ({"metric": "val/loss"}, "metric: expected `name:`"),
        ({"metric": {"name": "val/loss", "goal": "min"}}, "metric.goal: expected minimize or maximize"),
    ],
)
def test_what_cannot_be_done_is_refused_in_one_line(tmp_path, changes, complaint):
    path = write(tmp_path, **changes)
    with pytest.raises(UserError, match=complaint) as refused:
        read(path)
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("text", "complaint"), [("a: [", "line 1: not YAML"), ("- a", "expected a W&B sweep file"), ("", "expected a W&B")]
)
def test_what_is_no_sweep_file(tmp_path, text, complaint):
    (tmp_path / "s.yaml").write_text(text)
    with pytest.raises(UserError, match=complaint):
        read(tmp_path / "s.yaml")


def test_no_file(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "s.yaml")
