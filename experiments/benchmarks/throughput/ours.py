"""Our side, as a process of its own: `python -m experiments.benchmarks.throughput.ours WORKLOAD.json RESULT.json`."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything

from experiments.benchmarks.throughput.workload import BETA, Measured, Workload, peak_bytes
from rlhf_lit.algorithms import DPO, SFT, RewardModel
from rlhf_lit.algorithms.base import Algorithm, Schedule
from rlhf_lit.batches import PreferenceBatch, Sequences, SupervisedBatch
from rlhf_lit.data.modules import PreferenceDataModule, SFTDataModule
from rlhf_lit.data.records import Source
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.models.loading import Base


class Watch(Callback):
    """Times the steps after the warm-up, and writes down losses and batches."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.losses: list[float] = []
        self.batches: list[list[dict[str, Any]]] = []
        self.started = self.ended = 0.0

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """A reward model's head is drawn at random: the peer begins with the same."""
        if self.workload.task == "reward":
            (head,) = (weight for name, weight in module.named_parameters() if name.endswith("score.weight"))
            torch.save(head.detach().cpu(), self.workload.head)

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, batch: Any, batch_idx: int) -> None:
        """What the peer will be given."""
        if isinstance(batch, SupervisedBatch):
            self.batches.append([{"sequence": side} for side in rows_of(batch.sequences)])
        elif isinstance(batch, PreferenceBatch):
            sides = zip(rows_of(batch.chosen), rows_of(batch.rejected), strict=True)
            self.batches.append([{"chosen": chosen, "rejected": rejected} for chosen, rejected in sides])

    def on_train_batch_end(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        """The clock starts when the last step of the warm-up has ended, and stops when the last step has."""
        self.losses.append(float(trainer.callback_metrics["train/loss"]))
        if self.workload.device == "cuda":
            torch.cuda.synchronize()
        self.ended = time.perf_counter()
        if trainer.global_step == self.workload.warm_up:
            self.started = self.ended


def rows_of(sequences: Sequences) -> list[dict[str, Any]]:
    """Token ids and masks without padding."""
    return [
        {"tokens": tokens[:length].tolist(), "mask": mask[:length].int().tolist()}
        for tokens, mask, length in zip(sequences.tokens, sequences.mask, sequences.lengths.tolist(), strict=True)
    ]


def algorithm(workload: Workload) -> Algorithm:
    """With AdamW, gradients clipped at 1 and a constant rate, which are the peer's settings too."""
    base = Base(name=workload.model)
    schedule, rate = Schedule(name="constant"), workload.learning_rate
    match workload.task:
        case "sft":
            return SFT(base, learning_rate=rate, schedule=schedule)
        case "reward":
            return RewardModel(base, learning_rate=rate, schedule=schedule)
        case "dpo":
            return DPO(base, loss=DPOLoss(beta=BETA), learning_rate=rate, schedule=schedule)


def main(workload: Workload) -> Measured:
    """Train for the workload's steps."""
    seed_everything(0, verbose=False)
    kind = SFTDataModule if workload.task == "sft" else PreferenceDataModule
    data = kind(
        train=Source(workload.pairs),
        batch_size=workload.batch_size,
        micro_batch_tokens=workload.micro_batch_tokens,
        max_length=workload.max_length,
        template="plain",
        cache=str(Path(workload.folder, "tokens")),
    )
    watch = Watch(workload)
    trainer = Trainer(
        max_steps=workload.all_steps,
        accelerator="gpu" if workload.device == "cuda" else "cpu",
        devices=1,
        precision=workload.precision,  # type: ignore[arg-type]
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        inference_mode=False,
        log_every_n_steps=1,
        limit_val_batches=0,
    )
    trainer.fit(algorithm(workload), data)
    workload.batches.write_text(json.dumps(watch.batches))
    return Measured(watch.ended - watch.started, watch.losses, peak_bytes(workload.device))


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(asdict(main(Workload.load(sys.argv[1])))))
