"""A user's own kind of batch, made by a data module and learnt from by an algorithm of their own, all in one file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from rlhf_lit.__main__ import main

OWN = """
from __future__ import annotations
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar
import torch
from torch import Tensor
from rlhf_lit.algorithms.algorithm import Algorithm, Optimizer, Schedule, StepLoss
from rlhf_lit.algorithms.policy import Writer
from rlhf_lit.batches import Batch, Sequences
from rlhf_lit.batches.micro_batches import Layout, cut_by_tokens
from rlhf_lit.data.modules import SFTDataModule
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.base import Base
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.roles import Roles
from rlhf_lit.rollout.engine import Sampling


@dataclass(frozen=True)
class WeightedBatch(Batch):
    kind: ClassVar[str] = "weighted demonstrations"
    data_module: ClassVar[str] = "WeightedDataModule"
    sequences: Sequences
    weight: Tensor
    micro_batch_tokens: int

    def answers(self) -> tuple[Sequences, ...]:
        return (self.sequences,)

    def dummy(self) -> WeightedBatch:
        return replace(self, sequences=Sequences.dummy(self.weight.device), weight=self.weight.new_ones(1))

    def micro_batches(self, layout: Layout = "padded") -> Iterator[WeightedBatch]:
        for rows in cut_by_tokens(self.sequences.lengths, self.micro_batch_tokens, layout):
            yield self.select(rows)

    def __len__(self) -> int:
        return len(self.weight)


class WeightedDataModule(SFTDataModule):
    gives = WeightedBatch

    def collate(self, examples: list[dict[str, Any]]) -> WeightedBatch:
        batch = super().collate(examples)
        return WeightedBatch(batch.sequences, torch.ones(len(examples)), batch.micro_batch_tokens)


class WeightedSFT(Writer, Algorithm):
    learns_from = (WeightedBatch,)
    averaged_over = "rows"

    def __init__(self, base: Base, learning_rate: float = 1e-3, sampling: Sampling = Sampling()) -> None:
        super().__init__(base, learning_rate, Optimizer(), Schedule())
        self.sampling = sampling

    def build(self) -> None:
        self.roles = Roles(self.base)

    def set_train_mode(self) -> None:
        self.roles.train()

    def denominators(self, batch: WeightedBatch) -> dict[str, Tensor]:
        return {"rows": batch.weight.sum()}

    def losses(self, batch: WeightedBatch, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        with self.roles.acting("policy") as model:
            sums = row_sums(token_logprobs(model, batch.sequences), batch.sequences.mask)
            yield StepLoss(-(batch.weight * sums).sum() / denominators["rows"], {})
"""
SETTINGS = [
    "--model.base.name=playground", "--model.base.fresh=true", "--data.train.path=playground",
    "--data.train.world.demonstrations=64", "--data.batch_size=8", "--data.cache=null", "--trainer.accelerator=cpu",
    "--trainer.enable_progress_bar=false",
]  # fmt: skip


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the user's file, from which commands are run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own", raising=False)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def call(*argv: str) -> int:
    status = main(list(argv))
    torch.set_grad_enabled(True)
    return status


def test_it_is_checked_trained_on_and_measured(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = ["--model=own.WeightedSFT", "--data=own.WeightedDataModule", *SETTINGS]
    assert call("fit", *both, "--trainer.max_steps=2") == 0
    said = capsys.readouterr().out
    assert "preflight: 7 checks passed" in said
    assert "EOS supervised        in every row" in said
    assert call("memory", *both) == 0
    assert "largest data.micro_batch_tokens within" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "data", "line"),
    [
        (
            "own.WeightedSFT",
            "SFTDataModule",
            "data: SFTDataModule gives demonstrations, and WeightedSFT learns from weighted demonstrations "
            "(WeightedDataModule)",
        ),
        (
            "SFT",
            "own.WeightedDataModule",
            "data: WeightedDataModule gives weighted demonstrations, and SFT learns from demonstrations "
            "(SFTDataModule)",
        ),
    ],
)
def test_who_does_not_know_it_says_so(
    own: Path, capsys: pytest.CaptureFixture[str], model: str, data: str, line: str
) -> None:
    assert call("fit", f"--model={model}", f"--data={data}", *SETTINGS, "--trainer.max_steps=2") == 2
    assert f"error: {line}\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        (
            "    def answers(self)",
            "    def other(self)",
            "WeightedBatch has no answers(), which every kind of batch must have (see Batch)",
        ),
        (
            "class WeightedBatch(Batch)",
            "class WeightedBatch",
            "data: WeightedDataModule makes WeightedBatch, which is no kind of batch: derive it from "
            "rlhf_lit.batches.Batch",
        ),
        (
            "return (self.sequences,)",
            "return (self.sequences.join(self.sequences),)",
            "WeightedBatch.answers(): 128 sequences for 64 rows; say in WeightedBatch.rows_of_answers() which row each "
            "belongs to",
        ),
    ],
)
def test_what_it_leaves_out_is_said_in_one_line(
    own: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, line: str
) -> None:
    assert OWN.count(old) == 1
    own.write_text(OWN.replace(old, new))
    options = ["--model=own.WeightedSFT", "--data=own.WeightedDataModule", *SETTINGS, "--trainer.max_steps=2"]
    assert call("fit", *options) == 2
    assert f"error: {line}\n" in capsys.readouterr().err


def test_memory_asks_for_rows_of_an_own_shape(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own.write_text(OWN.replace("(SFTDataModule)", "(TextDataModule)").replace("import SFTD", "import TextD"))
    assert call("memory", "--model=own.WeightedSFT", "--data=own.WeightedDataModule", *SETTINGS) == 2
    assert "error: data: memory does not know what a row of WeightedDataModule is made of" in capsys.readouterr().err
