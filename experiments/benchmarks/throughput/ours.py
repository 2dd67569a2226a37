"""Our side, as a process of its own: `… ours WORKLOAD.json RESULT.json SETTING`.

Settings: `plain`; of PPO also `trunk`, whose critic is a head on the policy's own hidden states; of DPO also `cached`,
whose reference log-probs were computed by an earlier run; of DPO and reward models also `unshared`, which compute the
prompt of a pair for each side; of `generate` also `samples`, eight to each prompt. `compiled` is `plain` with compiled
decoder layers.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer, seed_everything

from experiments.benchmarks.throughput.workload import (
    BETA,
    KL_COEFFICIENT,
    LONGEST,
    MINIBATCHES,
    NEW_TOKENS,
    PPO_EPOCHS,
    STOP_TOKENS,
    Measured,
    Workload,
    peak_bytes,
    prompt_batches,
    random_rows,
)
from rlhf_lit.algorithms import DPO, PPO, SFT, RewardModel
from rlhf_lit.algorithms.algorithm import Algorithm, Schedule
from rlhf_lit.algorithms.offline import Reference
from rlhf_lit.batches import PreferenceBatch, Sequences, SupervisedBatch
from rlhf_lit.data.modules import PreferenceDataModule, RolloutDataModule, SFTDataModule
from rlhf_lit.data.records import Source
from rlhf_lit.data.text_module import TextDataModule
from rlhf_lit.losses.kl import FixedKL
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm
from rlhf_lit.models.packing import without_sharing
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.models.roles import Critic
from rlhf_lit.randomness import row_keys
from rlhf_lit.rollout.engine import Sampling, sample
from rlhf_lit.rollout.rewards import RewardFromModel

CRITICS = {"plain": Critic(init="reward"), "trunk": Critic(init="policy", trunk=True)}


class Watch(Callback):
    """Times the steps after the warm-up, and writes down losses and batches."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.losses: list[float] = []
        self.batches: list[list[dict[str, Any]]] = []
        self.started = self.ended = 0.0
        self.per_unit = MINIBATCHES * PPO_EPOCHS if workload.task == "ppo" else 1  # optimizer steps

    def on_fit_start(self, trainer: Trainer, module: LightningModule) -> None:
        """A reward model's head is drawn at random: the peer begins with the same."""
        if self.workload.task == "reward":
            (head,) = (weight for name, weight in module.named_parameters() if name.endswith("score.weight"))
            torch.save(head.detach().cpu(), self.workload.head)

    def on_train_start(self, trainer: Trainer, module: LightningModule) -> None:
        """The prompts, which come again in every rollout."""
        if self.workload.task == "ppo":
            rows = trainer.datamodule.examples["train"]  # type: ignore[attr-defined]
            self.batches = [[{"prompt": {"tokens": row["prompt"]}} for row in rows]]

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
        if trainer.global_step == self.workload.warm_up * self.per_unit:
            self.started = self.ended


class Prompts(RolloutDataModule):
    """The first prompts that are short enough, as many as a rollout has, so that every rollout answers the same."""

    def _load(self, name: str) -> None:
        super()._load(name)
        if name == "train":
            self.examples[name] = self.examples[name][: self.rollout_size]


class RandomRows(TextDataModule):
    """Rows of random tokens, of one length."""

    def __init__(self, workload: Workload, **common: Any) -> None:
        super().__init__(**common)
        self.workload = workload

    def _load(self, name: str) -> None:
        if name == "train":
            self.examples[name] = [self.example(row) for row in random_rows(self.workload)]

    def example(self, row: list[int]) -> dict[str, Any]:
        """The second half of a demonstration is the response; of a pair the prompt is followed by both responses."""
        length = self.workload.row_tokens or 0
        response = length // 2
        prompt = length - response
        common = {"prompt": row[:prompt], "text": "", "source": {}}
        mask = [False] * prompt + [True] * response
        if self.workload.task == "sft":
            return {"tokens": row, "mask": mask, **common}
        sides = {"chosen": row[:length], "rejected": row[:prompt] + row[length:]}
        return {**sides, "chosen_mask": mask, "rejected_mask": mask, "margin": 0.0, **common}


class RandomDemonstrations(RandomRows, SFTDataModule):
    """For SFT."""


class RandomPairs(RandomRows, PreferenceDataModule):
    """For DPO."""


def rows_of(sequences: Sequences) -> list[dict[str, Any]]:
    """Token ids and masks without padding."""
    return [
        {"tokens": tokens[:length].tolist(), "mask": mask[:length].int().tolist()}
        for tokens, mask, length in zip(sequences.tokens, sequences.mask, sequences.lengths.tolist(), strict=True)
    ]


def algorithm(workload: Workload, setting: str) -> Algorithm:
    """With AdamW, gradients clipped at 1 and a constant rate, which are the peer's settings too."""
    base = Base(name=workload.model, compile=setting == "compiled")
    if workload.qlora:
        adapters = {"lora": LoRA(), "quantization": Quantization(), "gradient_checkpointing": True}
        base = replace(base, dtype=workload.dtype, **adapters)
    schedule, rate = Schedule(name="constant"), workload.learning_rate
    match workload.task:
        case "sft":
            return SFT(base, learning_rate=rate, schedule=schedule)
        case "reward":
            return RewardModel(base, learning_rate=rate, schedule=schedule)
        case "dpo":
            reference = Reference(precompute=setting == "cached", cache=str(Path(workload.folder, "reference")))
            return DPO(
                base,
                loss=DPOLoss(beta=BETA),
                reference=reference,
                learning_rate=rate,
                schedule=schedule,
            )
        case "ppo":
            return PPO(
                base,
                reward=RewardFromModel(workload.reward),
                kl=FixedKL(beta=KL_COEFFICIENT),
                critic=CRITICS["trunk" if setting == "trunk" else "plain"],
                sampling=Sampling(max_new_tokens=NEW_TOKENS),
                learning_rate=rate,
                schedule=schedule,
            )
        case "generate":
            raise AssertionError("nothing is trained")


def data_module(workload: Workload) -> TextDataModule:
    """Rows that fit; of PPO, the prompts of one rollout; random ones where the workload says so."""
    common: dict[str, Any] = {
        "batch_size": workload.batch_size,
        "micro_batch_tokens": workload.micro_batch_tokens,
        "max_length": workload.max_length,
        "truncation": "drop",
        "template": "plain",
        "cache": str(Path(workload.folder, "tokens")),
    }
    if workload.task == "ppo":
        return Prompts(Source(workload.pairs), rollout_size=workload.rollout_size, ppo_epochs=PPO_EPOCHS, **common)
    if workload.row_tokens is not None:
        return (RandomDemonstrations if workload.task == "sft" else RandomPairs)(workload, **common)
    kind = SFTDataModule if workload.task == "sft" else PreferenceDataModule
    return kind(Source(workload.pairs), **common)


def generate(workload: Workload, setting: str) -> Measured:
    """Answer the workload's prompts, as a rollout does."""
    model = load_causal_lm(Base(name=workload.model, dtype=workload.dtype)).to(workload.device)
    settings, seconds, amount = Sampling(max_new_tokens=LONGEST), 0.0, 0
    for step, prompts in enumerate(prompt_batches(workload, setting)):
        tokens = Sequences.pad(prompts, [[False] * len(prompt) for prompt in prompts]).to(workload.device)
        started = time.perf_counter()
        keys = row_keys(step, torch.arange(len(prompts)), torch.zeros(len(prompts), dtype=torch.int64))
        samples = sample(model, tokens, keys.to(workload.device), settings, STOP_TOKENS)
        if workload.device == "cuda":
            torch.cuda.synchronize()
        if step >= workload.warm_up:
            seconds += time.perf_counter() - started
            amount += int(samples.sequences.mask.sum())
    return Measured(seconds, amount, [], peak_bytes(workload.device))


def main(workload: Workload, setting: str) -> Measured:
    """Train for the workload's steps."""
    if workload.task == "generate":
        return generate(workload, setting)
    seed_everything(0, verbose=False)
    watch = Watch(workload)
    trainer = Trainer(
        max_steps=workload.all_steps * watch.per_unit,
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
    with without_sharing() if setting == "unshared" else nullcontext():
        trainer.fit(algorithm(workload, setting), data_module(workload))
    workload.batches.write_text(json.dumps(watch.batches))
    losses = [] if workload.task == "ppo" else watch.losses
    amount = workload.amount(watch.batches)
    return Measured(watch.ended - watch.started, amount, losses, peak_bytes(workload.device))


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(asdict(main(Workload.load(sys.argv[1]), sys.argv[3]))))
