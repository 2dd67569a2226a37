"""TRL's side, as a process of its own, by the peer's interpreter: `… trl_peer WORKLOAD.json RESULT.json SETTING`.

Settings: `defaults`, which recompute activations in the backward pass (gradient checkpointing); `plain`, without;
`grouped`, without and with batches of rows of similar length, which are then other batches than ours; and `liger`,
which is `grouped` with Liger's kernels for norms, rotations and the MLP (TRL has a chunked LM head of its own).
"""

from __future__ import annotations

import json
import random
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from experiments.benchmarks.throughput.workload import BETA, Measured, Workload, peak_bytes

IGNORED = -100  # a label that no loss counts
GROUPED = ("grouped", "liger")


class Watch(TrainerCallback):
    """Times the steps after the warm-up."""

    def __init__(self, workload: Workload) -> None:
        self.workload = workload
        self.losses: list[float] = []
        self.started = self.ended = 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The clock starts when the last step of the warm-up has ended."""
        if self.workload.device == "cuda":
            torch.cuda.synchronize()
        if state.global_step == self.workload.warm_up:
            self.started = time.perf_counter()
        self.ended = time.perf_counter()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """One log a step."""
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


class TokenisedDPO(DPOTrainer):
    """Takes rows that are token ids already, as TRL's other two trainers do."""

    def _prepare_dataset(self, dataset: Any, *_: Any, **__: Any) -> Any:
        return dataset


def batches_of(workload: Workload, setting: str) -> list[list[dict[str, Any]]]:
    """The workload's batches; of the settings `GROUPED` their rows in batches of similar length, in random order."""
    batches = workload.read_batches()
    if setting not in GROUPED:
        return batches
    rows = [row for batch in batches for row in batch]
    rows.sort(key=lambda row: max(len(side["tokens"]) for side in row.values()))
    batches = [rows[i : i + workload.batch_size] for i in range(0, len(rows), workload.batch_size)]
    random.Random(0).shuffle(batches)
    return batches


def columns(workload: Workload, batches: list[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The batches, one after another, in the columns of TRL's collators."""
    rows = [row for batch in batches for row in batch]
    if workload.task == "sft":
        sides = [row["sequence"] for row in rows]
        labels = [
            [token if counts else IGNORED for token, counts in zip(side["tokens"], side["mask"], strict=True)]
            for side in sides
        ]
        return [{"input_ids": side["tokens"], "labels": own} for side, own in zip(sides, labels, strict=True)]
    if workload.task == "reward":
        return [{f"{name}_ids": row[name]["tokens"] for name in ("chosen", "rejected")} for row in rows]
    found = []
    for row in rows:
        prompt = row["chosen"]["mask"].index(1)
        assert row["rejected"]["mask"].index(1) == prompt
        answers = {f"{name}_ids": row[name]["tokens"][prompt:] for name in ("chosen", "rejected")}
        found.append({"prompt_ids": row["chosen"]["tokens"][:prompt], **answers})
    return found


def four_bits() -> dict[str, Any]:
    """Our ``Quantization``'s defaults."""
    from transformers import BitsAndBytesConfig

    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return {"quantization_config": config, "dtype": torch.bfloat16}


def main(workload: Workload, setting: str) -> Measured:
    """Train for the workload's steps."""
    rows = workload.peer_rows or workload.batch_size
    options: dict[str, Any] = {
        "output_dir": str(Path(workload.folder, "trl")),
        "max_steps": workload.all_steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": workload.batch_size // rows,
        "learning_rate": workload.learning_rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "max_length": workload.max_length,
        "bf16": workload.precision == "bf16-mixed",
        "use_cpu": workload.device == "cpu",
        "train_sampling_strategy": "sequential",  # our batches, in our order
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": workload.device == "cuda",
        "gradient_checkpointing": setting == "defaults" or workload.qlora,
        "use_liger_kernel": setting == "liger",
    }
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    watch, batches = Watch(workload), batches_of(workload, setting)
    given: dict[str, Any] = {
        "train_dataset": Dataset.from_list(columns(workload, batches)),
        "processing_class": tokenizer,
        "callbacks": [watch],
    }
    match workload.task:
        case "sft":
            model = AutoModelForCausalLM.from_pretrained(workload.model, **(four_bits() if workload.qlora else {}))
            adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear") if workload.qlora else None
            trainer: Any = SFTTrainer(model=model, args=SFTConfig(**options), peft_config=adapter, **given)
        case "reward":
            model = AutoModelForSequenceClassification.from_pretrained(workload.model, num_labels=1)
            model.score.weight.data.copy_(torch.load(workload.head))
            trainer = RewardTrainer(model=model, args=RewardConfig(**options), **given)
        case "dpo":
            model = AutoModelForCausalLM.from_pretrained(workload.model)
            reference = AutoModelForCausalLM.from_pretrained(workload.model)
            trainer = TokenisedDPO(model=model, ref_model=reference, args=DPOConfig(beta=BETA, **options), **given)
    trainer.train()
    losses = [] if setting in GROUPED else watch.losses
    return Measured(watch.ended - watch.started, workload.amount(batches), losses, peak_bytes(workload.device))


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(asdict(main(Workload.load(sys.argv[1]), sys.argv[3]))))
