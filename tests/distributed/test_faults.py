"""A rank that dies ends the others at once, with one line and a whole checkpoint; a scheduler's notice ends all of them
after the same step; and both runs are continued to the bit. Ranks that were not given the same run do not begin it."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import PATIENCE, Run
from run_folders import assert_equal, final, loader_state, metrics, samples, save_small_model, timeless

HERE = Path(__file__).parent
STRATEGIES = ("ddp", "fsdp2")  # of trainer.strategy
STEPS, EVERY = 24, 2  # of a run, and between two of its checkpoints
LOST, TERMINATED = 75, 128 + signal.SIGTERM
SEED = 20_260_801  # of the points at which runs are killed


def letters(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A reward function: many an e, and not too long."""
    return [response.count("e") - 0.1 * len(response) for response in responses]


def config(model: str) -> dict[str, Any]:
    """PPO, with all that has a state: β, moments of the scores, a rollout that is used for several steps."""
    return {
        "model": {
            "class_path": "PPO",
            "init_args": {
                "base": {"name": model},
                "reward": {"class_path": "RewardFromFunction", "init_args": {"function": "test_faults.letters"}},
                "kl": {"class_path": "AdaptiveKL", "init_args": {"beta": 0.2, "target": 1.0, "horizon": 50}},
                "shaping": {"normalise": "standardise"},
                "critic": {"init": "policy", "learning_rate": 1e-2},
                "sampling": {"max_new_tokens": 6},
                "learning_rate": 3e-3,
            },
        },
        "data": {
            "class_path": "RolloutDataModule",
            "init_args": {
                "train": {"path": "playground", "world": {"prompts": 12}},
                "validation": {"path": "playground", "split": "held_out", "world": {"held_out": 4}},
                "rollout_size": 4, "samples_per_prompt": 2, "batch_size": 4, "ppo_epochs": 2, "cache": None,
            },
        },
        "checkpoint": {"every_n_train_steps": EVERY},
        "preflight": False,  # which takes longer than half of the run
        "trainer": {"max_epochs": 2, "accelerator": "cpu", "devices": 2, "enable_progress_bar": False},
    }  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small model and the configuration."""
    folder = tmp_path_factory.mktemp("faults")
    save_small_model(folder / "model")
    (folder / "ppo.yaml").write_text(yaml.safe_dump(config(str(folder / "model"))))
    return folder


def fit(strategy: str, name: str, *options: object) -> list[str]:
    return ["fit", "--config=ppo.yaml", f"--trainer.strategy={strategy}", f"--name={name}", *map(str, options)]


def start(folder: Path, strategy: str, name: str, *options: object, last: tuple[Path, list[str]] | None = None) -> Run:
    """Two processes that are told their ranks."""
    return Run(*fit(strategy, name, *options), folder=folder, path=[HERE], ranks=2, last=last)


def run_of(folder: Path, name: str) -> Path:
    return folder / "runs" / name / "version_0"


def unharmed(folder: Path, strategy: str) -> Path:
    """The run that nothing ended; made where it is asked for first."""
    run = run_of(folder, f"whole_{strategy}")
    if not run.exists():
        start(folder, strategy, f"whole_{strategy}").wait()
        assert final(run)["global_step"] == STEPS
    return run


def dying(where: str, step: int, rank: int) -> list[str]:
    fields = {"place": where, "step": step, "rank": rank}
    return ["--trainer.callbacks=dying.DieIn", *(f"--trainer.callbacks.{key}={value}" for key, value in fields.items())]


def assert_one_line(said: str, begin: str) -> str:
    """The line that starts so, which is the last; and nothing like a traceback."""
    assert "Traceback" not in said, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, said
    assert lines[0].startswith(begin), said
    return lines[0]


def assert_resumes(folder: Path, strategy: str, name: str) -> None:
    """In its own folder, to the bit: weights, optimizer, every state, and what was logged and sampled."""
    start(folder, strategy, name, "--ckpt_path=last").wait()
    run, whole = run_of(folder, name), unharmed(folder, strategy)
    assert [version.name for version in run.parent.iterdir()] == ["version_0"]
    ended, uninterrupted = final(run), final(whole)
    for part in ("global_step", "state_dict", "optimizer_states", "lr_schedulers", "kl_multiplier", "score_moments"):
        assert_equal(ended[part], uninterrupted[part], part)
    assert_equal(loader_state(ended), loader_state(uninterrupted), "loader")
    assert [timeless(row) for row in metrics(run)] == [timeless(row) for row in metrics(whole)]
    assert samples(run) == samples(whole)
    assert not list(run.rglob("*.partial")), "nothing half-written is left"


def killed(folder: Path, strategy: str, where: str, step: int, rank: int) -> str:
    """The run's name. It is killed at the given place, and what is left of it is looked at."""
    name = f"{strategy}_{where}_{step}_{rank}"
    run = start(folder, strategy, name, *dying(where, step, rank))
    statuses = run.statuses()
    assert statuses[rank] == -signal.SIGKILL, run.said()
    assert statuses[1 - rank] == LOST, run.said()
    line = assert_one_line(run.said(), f"error: rank {rank} of 2 was killed or lost its machine; ")
    saved = final(run_of(folder, name))["global_step"]  # it loads, and is no older than what had been saved by then
    assert saved == (step - 1) // EVERY * EVERY or (where != "checkpoint" and saved == step // EVERY * EVERY)
    assert f"checkpoints/step_{saved:07d}.ckpt: the same command with --ckpt_path=last goes on from it" in line
    return name


@pytest.mark.parametrize(
    ("strategy", "where", "step", "rank"),
    [
        pytest.param(strategy, *place, marks=[pytest.mark.soak] * ((strategy, place[0]) == ("fsdp2", "rollout")))
        for strategy in STRATEGIES
        for place in (("step", 5, 1), ("rollout", 8, 0), ("checkpoint", 6, 0))
    ],
)
def test_a_killed_rank_ends_the_other_and_the_run_goes_on_to_the_bit(place, strategy, where, step, rank):
    """A step is a collective away from the other rank, a rollout is not; and half a checkpoint is none."""
    assert_resumes(place, strategy, killed(place, strategy, where, step, rank))


@pytest.mark.soak
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("where", ["step", "rollout", "checkpoint"])
def test_killed_at_five_random_points(place, strategy, where):
    generator = random.Random(f"{SEED} {where}")
    points = generator.sample([(step, rank) for step in steps_of(where) for rank in (0, 1)], 5)
    print(f"{strategy}, {where}: (step, rank) {points}")
    for step, rank in points:
        assert_resumes(place, strategy, killed(place, strategy, where, step, rank))


def steps_of(where: str) -> range:
    """After which a run can die there, with a checkpoint behind it."""
    return {"step": range(EVERY, STEPS), "rollout": range(4, STEPS, 4), "checkpoint": range(2 * EVERY, STEPS, EVERY)}[
        where
    ]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_signal_to_one_rank_ends_all_after_the_same_step_and_the_run_goes_on_to_the_bit(place, strategy):
    """SIGTERM reaches rank 1 alone, in its seventh step: in the middle of a rollout, and between checkpoints."""
    name = f"{strategy}_signal"
    run = start(place, strategy, name, *signalled(signal.SIGTERM, 6, [1]))
    assert run.statuses() == [TERMINATED] * 2, run.said()
    (line,) = [line for line in run.said().splitlines() if "terminated" in line]
    assert line.startswith("terminated; the newest whole checkpoint is ")
    assert "step_0000007.ckpt" in line
    assert "Traceback" not in run.said()
    state = final(run_of(place, name))
    assert state["global_step"] == 7, "not the last multiple of two"
    assert [row["step"] for row in metrics(run_of(place, name))] == [str(step) for step in range(7)]
    assert_resumes(place, strategy, name)


def signalled(number: int, step: int, ranks: list[int]) -> list[str]:
    fields = {"number": int(number), "step": step, "ranks": ranks}
    return [
        "--trainer.callbacks=dying.SignalIn", *(f"--trainer.callbacks.{key}={value}" for key, value in fields.items())
    ]  # fmt: skip


def test_each_signal_ends_a_single_process_where_it_can_go_on(place):
    """SIGUSR1 between two checkpoints, SIGTERM at the end of a pass over the prompts, and one that changes nothing."""
    alone = ["--trainer.devices=1"]
    whole = Run(*fit("auto", "whole_one"), *alone, folder=place, path=[HERE])
    first = Run(*fit("auto", "one"), *alone, *signalled(signal.SIGUSR1, 2, [0]), folder=place, path=[HERE])
    assert first.statuses() == [TERMINATED], first.said()
    assert final(run_of(place, "one"))["global_step"] == 3
    again = Run(*fit("auto", "one", "--ckpt_path=last-or-none"), *alone, *signalled(signal.SIGTERM, 11, [0]),
                folder=place, path=[HERE])  # fmt: skip
    assert again.statuses() == [TERMINATED], again.said()
    last = Run(*fit("auto", "one", "--ckpt_path=last-or-none"), *alone, *signalled(signal.SIGTERM, STEPS - 1, [0]),
               folder=place, path=[HERE])  # fmt: skip
    assert last.statuses() == [0], "the last step is made already: the run ends by itself, model and all"
    whole.wait()
    a, b = run_of(place, "one"), run_of(place, "whole_one")
    assert (a / "hf").is_dir()
    assert_equal(final(a)["state_dict"], final(b)["state_dict"])
    assert_equal(final(a)["optimizer_states"], final(b)["optimizer_states"])
    assert [timeless(row) for row in metrics(a)] == [timeless(row) for row in metrics(b)]


def nothing_on_one_rank(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A reward function that breaks on the second rank."""
    return [float("nan") if os.environ["LOCAL_RANK"] == "1" else 0.0] * len(responses)


def test_an_error_of_one_rank_ends_the_other(place):
    """The rank with the error says what it was, with its own status; the other, where the run can be continued."""
    run = start(place, "ddp", "nan", "--model.reward.function=test_faults.nothing_on_one_rank")
    assert run.statuses() == [LOST, 2], run.said()
    said = sorted(line for line in run.said().splitlines() if line.startswith("error: "))
    left = "runs/nan/version_0 has no checkpoint yet: start again"
    assert said[0] == f"error: rank 1 of 2 ended with an error, which it reported; {left}"
    assert said[1].startswith("error: reward.function: nothing_on_one_rank returned nan")
    assert len(said) == 2
    assert "Traceback" not in run.said()


def test_last_or_none_starts_a_run_where_there_is_none(place):
    run = start(place, "ddp", "afresh", "--trainer.max_steps=1", "--ckpt_path=last-or-none")
    run.wait()
    assert final(run_of(place, "afresh"))["global_step"] == 1


@pytest.mark.parametrize(
    ("words", "difference"),
    [
        (["--model.learning_rate=1e-3"], "model.learning_rate is 0.001 there and 0.003 on rank 0"),
        (["--trainer.log_every_n_steps=7"], "trainer.log_every_n_steps is 7 there and 1 on rank 0"),
        (["--data.cache=elsewhere"], None),
    ],
)
def test_ranks_with_different_configurations_do_not_begin(place, words, difference):
    """Where a rank's cache lies is its own affair."""
    name = f"apart_{words[0].split('=')[0][2:]}"
    run = start(place, "ddp", name, "--trainer.max_steps=1", last=(place, words))
    if difference is None:
        run.wait()
        return
    assert run.statuses() == [2, 2], run.said()
    line = assert_one_line(run.said(), "error: rank 1 is not set up as rank 0 is: ")
    assert difference in line
    assert not list(run_of(place, name).iterdir()), "nothing was written"


def test_ranks_with_different_rows_do_not_begin(place, tmp_path):
    """The same command, on machines whose file of the same name holds another row."""
    for folder, word in ((place, "one"), (tmp_path, "two")):
        (folder / "rows.jsonl").write_text('{"prompt": "three"}\n' + f'{{"prompt": "{word}"}}\n')
        (folder / "ppo.yaml").write_text((place / "ppo.yaml").read_text())
    rows = ["--data.train.path=rows.jsonl", "--data.train.world=null", "--data.validation=null"]
    run = start(place, "ddp", "rows", *rows, last=(tmp_path, []))
    assert run.statuses() == [2, 2], run.said()
    line = assert_one_line(run.said(), "error: rank 1 is not set up as rank 0 is: the data of train is ")
    assert line.count("2 rows with the digest ") == 2


LAUNCHERS = {
    "lightning": [sys.executable, "-m", "rlhf_lit"],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "rlhf_lit"],
}


@pytest.mark.parametrize(("launcher", "rank"), [("lightning", 1), ("torchrun", 1)])
def test_a_killed_rank_under_a_launcher(place, launcher, rank):
    """By Lightning, which watches the processes it starts and would kill the first without a word; and by torchrun,
    whose own report is the last that is said."""
    name = f"launched_{launcher}_{rank}"
    process = subprocess.Popen(
        [*LAUNCHERS[launcher], *fit("ddp", name), *dying("rollout", 4, rank)],
        cwd=place,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent, HERE)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=PATIENCE)  # the other rank sleeps for an hour, unless it is woken
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == (LOST if launcher == "lightning" else 1), said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: rank {rank} of 2 was killed or lost its machine; ")
    assert "step_0000004.ckpt" in line
    if launcher == "lightning":
        assert said.splitlines()[-1] == line
    assert_resumes(place, "ddp", name)
