"""The last PPO that TRL had (1.12.0, `trl.experimental.ppo`): `… trl_ppo_peer WORKLOAD.json RESULT.json SETTING`.

Policy, reference, reward model and critic are four models of their own. Settings as in ``trl_peer``.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl.experimental.ppo import PPOConfig, PPOTrainer

from experiments.benchmarks.throughput.trl_peer import Watch
from experiments.benchmarks.throughput.workload import (
    KL_COEFFICIENT,
    MINIBATCHES,
    NEW_TOKENS,
    PPO_EPOCHS,
    Measured,
    Workload,
    peak_bytes,
)


def main(workload: Workload, setting: str) -> Measured:
    """Train for the workload's rollouts."""
    tokenizer = AutoTokenizer.from_pretrained(workload.model, padding_side="left")
    (rows,) = workload.read_batches()
    options: dict[str, Any] = {} if setting == "defaults" else {"gradient_checkpointing": False}
    config = PPOConfig(
        output_dir=str(Path(workload.folder, "trl")),
        total_episodes=workload.all_steps * workload.rollout_size,
        per_device_train_batch_size=workload.batch_size,
        gradient_accumulation_steps=MINIBATCHES,  # in this trainer: the minibatches that a rollout is divided into
        num_mini_batches=MINIBATCHES,
        num_ppo_epochs=PPO_EPOCHS,
        response_length=NEW_TOKENS,
        temperature=1.0,
        kl_coef=KL_COEFFICIENT,
        stop_token="eos",
        learning_rate=workload.learning_rate,
        lr_scheduler_type="constant",
        num_sample_generations=0,
        bf16=workload.precision == "bf16-mixed",
        use_cpu=workload.device == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    watch = Watch(workload)
    policy, reference = (AutoModelForCausalLM.from_pretrained(workload.model) for _ in range(2))
    reward, critic = (AutoModelForSequenceClassification.from_pretrained(workload.reward) for _ in range(2))
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=Dataset.from_list([{"input_ids": row["prompt"]["tokens"]} for row in rows]),
        # It makes a loader for evaluation in any case, and reads nothing from it here.
        eval_dataset=Dataset.from_list([{"input_ids": rows[0]["prompt"]["tokens"]}]),
        callbacks=[watch],
    )
    trainer.train()
    return Measured(watch.ended - watch.started, workload.amount([]), [], peak_bytes(workload.device))


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(asdict(main(Workload.load(sys.argv[1]), sys.argv[3]))))
