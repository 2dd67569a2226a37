"""``memory``, and how ``fit`` ends when memory runs out, through the real command line."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from rlhf_lit.algorithms import PPO, SFT
from rlhf_lit.algorithms.algorithm import StepLoss
from rlhf_lit.losses.advantages import GAE
from rlhf_lit.memory.phases import is_out_of_memory

TOO_MUCH = 2**60


def exhaust() -> None:
    """Ask torch for more memory than there is."""
    torch.empty(TOO_MUCH, dtype=torch.uint8)


class HungrySFT(SFT):
    """Runs out of memory in the backward pass of its second update."""

    def losses(self, batch: Any, denominators: Any) -> Any:
        for share in super().losses(batch, denominators):
            if self.global_step == 1:
                share.loss.register_hook(lambda gradient: exhaust())
            yield StepLoss(share.loss, share.metrics)


class HungrySampler(PPO):
    """Runs out of memory while it samples, once the first rollout is used up."""

    def respond(self, prompts: Any, stream: int = 2**31, at_most: int | None = None) -> Any:
        if self.global_step == 4:
            self.roles.policy.register_forward_pre_hook(lambda module, inputs: exhaust())
        return super().respond(prompts, stream, at_most)


class HungryScorer(PPO):
    """Runs out of memory when the responses of its first rollout are scored."""

    def response_texts(self, samples: Any) -> Any:
        self.advantages = _Hungry()
        return super().response_texts(samples)


class _Hungry(GAE):
    """Runs out of memory when it is asked for advantages."""

    def __call__(self, rollout: Any) -> Any:
        exhaust()


class HungryLoader(SFT):
    """Runs out of memory while it loads."""

    def build(self) -> None:
        super().build()
        exhaust()


class HungryValidator(SFT):
    """Runs out of memory in a validation."""

    def evaluate(self, batch: Any, stage: str) -> None:
        exhaust()


class HungryOptimizer(Callback):
    """Lets the optimizer's state be too much."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def full(*arguments: Any) -> None:
            exhaust()

        trainer.optimizers[0]._init_group = full


def complaint(answer: Any) -> str:
    """The one line, without a traceback."""
    assert answer.status == 2, answer.err
    assert "Traceback" not in answer.err
    line = answer.err.splitlines()[-1]
    assert line.startswith("error: out of memory ")
    return str(line)


# --- how fit ends ----------------------------------------------------------------------------------------------------


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as raised:
        exhaust()
    assert is_out_of_memory(raised.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("DefaultCPUAllocator"))


SAMPLES = "in the rollout, while it samples:"
FULL = [
    ("sft", "HungrySFT", [], "in the update: try --data.micro_batch_tokens=4096 (now 8192), which changes no result; "),
    (
        "sft",
        "HungrySFT",
        ["--data.micro_batch_tokens=128", "--data.max_length=256"],
        "in the update: one row goes through at a time already; try --model.base.gradient_checkpointing=true",
    ),
    ("sft", "HungryValidator", [], "in the validation: try --data.micro_batch_tokens=4096 (now 8192)"),
    ("sft", "HungryLoader", [], "while the models are loaded: try --model.base.dtype=bfloat16 (now float32); "),
    ("ppo", "HungrySampler", [], f"{SAMPLES} try --model.sampling.rows_at_once=32 (now 64)"),
    ("ppo", "HungrySampler", ["--model.sampling.rows_at_once=1"], f"{SAMPLES} one row is sampled at a time already"),
    ("ppo", "HungryScorer", [], "in the score pass of a rollout: try --data.micro_batch_tokens=4096 (now 8192)"),
]


@pytest.mark.parametrize(("config", "kind", "options", "said"), FULL)
def test_one_line_says_where_and_what_to_try(
    run: Callable, config: str, kind: str, options: list[str], said: str
) -> None:
    line = complaint(run("fit", f"--config={config}.yaml", f"--model=test_memory_command.{kind}", *options))
    assert line.startswith(f"error: out of memory {said}")


def test_the_optimizers_state(run: Callable) -> None:
    line = complaint(run("fit", "--config=sft.yaml", "--trainer.callbacks+=test_memory_command.HungryOptimizer"))
    assert line.startswith("error: out of memory in the update, for the optimizer's state: try --model.optimizer.name=")


def test_nothing_is_half_written_and_the_run_goes_on(run: Callable, place: Path) -> None:
    answer = run("fit", "--config=sft.yaml", "--model=test_memory_command.HungrySFT",
                 "--checkpoint.every_n_train_steps=1", "--trainer.max_steps=3")  # fmt: skip
    complaint(answer)
    folder = place / "runs/hungrysft/version_0"
    assert not (folder / "hf").exists()
    assert [path.name for path in (folder / "checkpoints").iterdir() if not path.is_symlink()] == ["step_0000001.ckpt"]
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 1
    assert len((folder / "metrics.csv").read_text().splitlines()) == 2
    again = run("fit", "--config=sft.yaml", "--name=hungrysft", "--ckpt_path=last", "--trainer.max_steps=3")
    assert again.status == 0, again.err
    assert (folder / "hf").exists()


# --- the command -----------------------------------------------------------------------------------------------------

SIZES = re.compile(r"^(.*?)  +([\d.]+) (MiB|GiB)$", re.M)


def table(text: str) -> dict[str, float]:
    """Lines of the table, in MiB."""
    return {name: float(size) * (1024 if unit == "GiB" else 1) for name, size, unit in SIZES.findall(text)}


@pytest.mark.parametrize(("name", "steps"), [("sft", 1), ("reward", 1), ("dpo", 1), ("ppo", 3)])
def test_every_algorithm_is_measured_and_nothing_is_written(run: Callable, place: Path, name: str, steps: int) -> None:
    before = sorted(place.rglob("*"))
    answer = run("memory", f"--config={name}.yaml", "--data.batch_size=4", "--data.max_length=32", "--limit_gb=1")
    assert answer.status == 0, answer.err
    assert sorted(place.rglob("*")) == before
    found = table(answer.out)
    phases = [line.removeprefix("peak, ") for line in found if line.startswith("peak, ")]
    assert phases == ["loading", *(["rollout (sampling)", "score pass"] if name == "ppo" else []), "update"]
    assert found["held: optimizer state"] == pytest.approx(2 * found["held: gradients, within a step"], abs=0.11)
    assert found["peak, update"] > sum(size for line, size in found.items() if line.startswith("held"))
    assert "within 1.00 GiB: 8192 (the whole batch at once; more changes nothing)" in answer.out


def test_the_search_names_the_largest(run: Callable) -> None:
    options = ["--config=sft.yaml", "--data.batch_size=16", "--data.max_length=64", "--data.micro_batch_tokens=64"]
    line = run("memory", *options, "--limit_gb=0.003").out.splitlines()[-1]
    found = re.fullmatch(r"largest data.micro_batch_tokens within 3.1 MiB: (\d+), peak ([\d.]+) MiB", line)
    assert found, line
    assert 64 < int(found[1]) < 16 * 64
    assert float(found[2]) <= 3.1


def test_what_cannot_fit_is_one_line(run: Callable) -> None:
    line = complaint(run("memory", "--config=sft.yaml", "--limit_gb=0.0005", "--data.max_length=128"))
    assert line.startswith("error: out of memory in the update: one row goes through at a time already; ")
    line = complaint(run("memory", "--config=ppo.yaml", "--limit_gb=0.001", "--data.rollout_size=64"))
    assert "rows_at_once=32 (now 64)" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--limit_gb=0"], "limit_gb must be greater than 0 or null, not 0"),
        (["--limit_gb=lots"], "limit_gb: expected float or null, got 'lots'"),
        (["--model.learning_rat=1"], "model.learning_rat: unknown key"),
        (["--trainer.gradient_clip_val=1"], "trainer.gradient_clip_val is not for this"),
    ],
)
def test_it_refuses_as_fit_does(run: Callable, options: list[str], said: str) -> None:
    answer = run("memory", "--config=sft.yaml", *options)
    assert answer.status == 2
    assert answer.err.splitlines()[-1].startswith(f"error: {said}")


def test_a_reward_function_is_not_asked_about_rows_it_would_not_know(run: Callable) -> None:
    answer = run("memory", "--config=ppo.yaml", "--model.reward.function=test_memory_command.particular",
                 "--data.max_length=32", "--limit_gb=1")  # fmt: skip
    assert answer.status == 0, answer.err


def particular(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A reward function that reads a column of its data."""
    return [float(row["answer"]) for row in rows]
