"""New heads of reward models and critics: their first scores lie no further apart than 1, whatever the body's size."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from rlhf_lit.algorithms import PPO, RewardModel
from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.data.modules import PreferenceDataModule, RankingDataModule, RolloutDataModule, TextDataModule
from rlhf_lit.data.records import Source
from rlhf_lit.losses.kl import FixedKL
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.heads import token_values
from rlhf_lit.models.loading import load_scorer
from rlhf_lit.models.roles import Critic
from rlhf_lit.models.saving import save_hf
from rlhf_lit.preflight.callback import Preflight
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import RewardFromFunction
from rlhf_lit.training.head_start import ROWS, measured
from rlhf_lit.training.normalisation import head_of
from rlhf_lit.training.optimizer import Schedule

GAIN = 30.0  # of the last norm
WORDS = [f"w{3 + i}" for i in range(30)]
LORAS = pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])


def texts(count: int, shift: int) -> list[str]:
    return [" ".join(WORDS[(i * shift + j * (i + 1)) % len(WORDS)] for j in range(3 + i % 5)) for i in range(count)]


@pytest.fixture
def models(tmp_path: Path) -> dict[float, str]:
    """The same small model with a last norm of gain 1, and of ``GAIN``."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    plain = tiny.save_model(tmp_path / "plain")
    model: Any = AutoModelForCausalLM.from_pretrained(plain)
    model.model.norm.weight.data.mul_(GAIN)
    model.save_pretrained(tmp_path / "large")
    tokenizer = AutoTokenizer.from_pretrained(plain)
    for folder in ("plain", "large"):
        tokenizer.save_pretrained(tmp_path / folder)
    return {1.0: plain, GAIN: str(tmp_path / "large")}


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Folder with pairs.jsonl and lists.jsonl."""
    found = list(zip(texts(40, 1), texts(40, 7), texts(40, 11), texts(40, 13), strict=True))
    pairs = [{"prompt": p, "chosen": a, "rejected": b} for p, a, b, _ in found]
    lists = [{"prompt": p, "ranked": answers} for p, *answers in found]
    for name, rows in (("pairs", pairs), ("lists", lists)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def data(kind: type[TextDataModule], rows: Path, **settings: Any) -> TextDataModule:
    name = "lists" if kind is RankingDataModule else "pairs"
    return kind(
        Source(str(rows / f"{name}.jsonl")), batch_size=8, template="none", cache=None, max_length=64, **settings
    )


class Head(Callback):
    """The head before the first step, the scores of the first rows and their loss."""

    weight: Tensor
    scores: Tensor
    loss: float

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        rows = datamodule.examples["train"][:ROWS]
        if isinstance(pl_module, RewardModel):
            self.weight = next(iter(head_of(pl_module).values())).detach().clone()
            batch = datamodule.collate(rows)
            compared = batch.comparisons()
            self.scores = pl_module.eval().scores(compared.answers)
            pl_module.set_train_mode()
            losses = pl_module.loss(self.scores[compared.better], self.scores[compared.worse], compared.margin)
            self.loss = float((losses / compared.siblings).sum()) / len(batch)
        else:
            # Of the states after each token of a prompt, but for the first token's.
            self.weight = pl_module.roles.heads["value"].weight.detach().clone()
            prompts = datamodule.first_seen(rows, range(len(rows))).prompts
            places = torch.arange(prompts.tokens.shape[1])
            mask = (places > 1) & (places < prompts.lengths[:, None])
            with pl_module.roles.acting("value") as model:
                found = token_values(model, pl_module.roles.heads["value"], replace(prompts, mask=mask))
            self.scores = found[mask]


def fit(module: Algorithm, rows: TextDataModule, folder: Path, steps: int = 1, **options: Any) -> tuple[Head, str]:
    """The head before the first step, and the checkpoint after the last."""
    torch.manual_seed(0)
    head = Head()
    trainer = Trainer(
        accelerator="cpu", max_steps=steps, max_epochs=-1, logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        use_distributed_sampler=False, callbacks=[head, Preflight()],
    )  # fmt: skip
    trainer.fit(module, datamodule=rows, **options)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return head, str(folder / f"{steps}.ckpt")


def as_drawn(folder: str) -> Tensor:
    """A new head by the seed's rule."""
    return unwrapped(load_scorer(Base(folder))).score.weight.detach()


@LORAS
@pytest.mark.parametrize("kind", [PreferenceDataModule, RankingDataModule], ids=["pairs", "lists"])
def test_first_scores_of_a_large_body(
    kind: Any,
    lora: LoRA | None,
    models: dict[float, str],
    rows: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = models[GAIN]
    head, _ = fit(RewardModel(Base(folder, lora=lora)), data(kind, rows), tmp_path)
    said = capsys.readouterr()
    assert float(head.scores.std(correction=0)) == pytest.approx(1, rel=1e-4)
    assert head.loss < math.log(2) + 0.6
    assert "note: model.head: scores of the first rows have a standard deviation of " in said.err
    drawn = as_drawn(folder)
    factor = float((head.weight / drawn).mean())
    torch.testing.assert_close(head.weight, factor * drawn)
    line = next(line for line in said.out.splitlines() if " starting loss " in line)
    assert line.startswith("ok ")
    assert line.endswith("of equal scores 0.6931")
    by_seed = RewardModel(Base(folder, lora=lora), head="seed")
    head, _ = fit(by_seed, data(kind, rows), tmp_path)
    assert head.weight.equal(drawn)
    assert float(head.scores.std(correction=0)) == pytest.approx(1 / factor, rel=1e-4)
    assert 1 / factor > 10
    said = capsys.readouterr()
    assert "model.head" not in said.err
    assert next(line for line in said.out.splitlines() if " starting loss " in line).startswith("warning ")


def test_a_body_of_ordinary_size_keeps_the_drawn_head(models: dict[float, str], rows: Path, tmp_path: Path) -> None:
    """To the bit, so that results from before stand."""
    head, _ = fit(RewardModel(Base(models[1.0])), data(PreferenceDataModule, rows), tmp_path)
    assert float(head.scores.std(correction=0)) < 1
    assert head.weight.equal(as_drawn(models[1.0]))


@LORAS
def test_a_trained_head_is_left_alone(lora: LoRA | None, models: dict[float, str], rows: Path, tmp_path: Path) -> None:
    """That of a run that goes on, which is the same to the bit as one that was not interrupted."""

    def run(steps: int, **options: Any) -> tuple[Tensor, Head, str]:
        module = RewardModel(Base(models[GAIN], lora=lora), learning_rate=1e-2, schedule=Schedule("constant"))
        head, checkpoint = fit(module, data(PreferenceDataModule, rows), tmp_path, steps, **options)
        return next(iter(head_of(module).values())).detach().clone(), head, checkpoint

    trained, _, checkpoint = run(2)
    again, head, _ = run(3, ckpt_path=checkpoint)
    assert head.weight.equal(trained)
    assert float(head.scores.std(correction=0)) > 1, "which would be scaled if it were new"
    straight, _, _ = run(3)
    assert again.equal(straight)


def test_a_reward_model_that_is_trained_on_keeps_its_head(models: dict[float, str], rows: Path, tmp_path: Path) -> None:
    module = RewardModel(Base(models[GAIN]), head="seed")
    module.configure_model()
    save_hf(module, tmp_path / "trained")
    head, _ = fit(RewardModel(Base(str(tmp_path / "trained"))), data(PreferenceDataModule, rows), tmp_path)
    assert head.weight.equal(as_drawn(models[GAIN]))
    assert float(head.scores.std(correction=0)) > 10


@pytest.mark.parametrize("critic", [Critic(init="policy"), Critic(init="policy", trunk=True)], ids=["own", "trunk"])
@LORAS
def test_first_values_of_a_large_body(
    critic: Critic, lora: LoRA | None, models: dict[float, str], rows: Path, tmp_path: Path
) -> None:
    def run(critic: Critic, gain: float) -> Head:
        reward, sampling = RewardFromFunction(tiny.word_count), Sampling(max_new_tokens=4)
        module = PPO(Base(models[gain], lora=lora), reward, FixedKL(0.1), sampling, critic=critic)
        return fit(module, data(RolloutDataModule, rows, rollout_size=8), tmp_path)[0]

    scaled = run(critic, GAIN)
    assert float(scaled.scores.std(correction=0)) == pytest.approx(1, rel=1e-4)
    drawn = run(Critic(init="policy", trunk=critic.trunk, head="seed"), GAIN)
    assert float(drawn.scores.std(correction=0)) > 10
    factor = float((scaled.weight / drawn.weight).mean())
    torch.testing.assert_close(scaled.weight, factor * drawn.weight)


def test_how_many_rows_are_measured() -> None:
    assert measured([10] * ROWS) == ROWS
    assert measured([1000, 900, 200]) == 2
    assert measured([1000, 900, 100, 100]) == 3
    assert measured([3000, 3000, 3000]) == 2
    assert measured([3000]) == 1
