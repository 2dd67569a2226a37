"""PPO on what a real vLLM draws, where there is one and a GPU."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: pip install 'rlhf-lit[vllm]'")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM samples on a GPU, and there is none")

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests" / "unit"))

import tiny  # noqa: E402

OPTIONS = (
    "--model=PPO", "--data=RolloutDataModule", "--model.base.name=model", "--model.kl=FixedKL", "--model.kl.beta=0.1",
    "--model.reward=RewardFromFunction", "--model.reward.function=tiny.word_count", "--model.critic.init=policy",
    "--model.sampling.max_new_tokens=16", "--model.sampling.temperature=0.7", "--model.learning_rate=1e-3",
    "--data.train.path=prompts.txt", "--data.template=none", "--data.rollout_size=32", "--data.batch_size=32",
    "--data.ppo_epochs=1", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--name=vllm",
)  # fmt: skip


@pytest.mark.parametrize("lora", [(), ("--model.base.lora.rank=8",)], ids=["whole", "lora"])
def test_two_rollouts(command: Callable[..., Any], lora: tuple[str, ...]) -> None:
    """Its log-probs are the training forward's to bfloat16's rounding, on the second rollout's new weights too."""
    size = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 64, "num_attention_heads": 2}
    tiny.save_model(Path("model"), **size, max_position_embeddings=256)
    Path("prompts.txt").write_text("".join(f"w{3 + i} w{4 + i}\n" for i in range(32)))
    answer = command("fit", *OPTIONS, *lora, "--config", ROOT / "configs" / "overlays" / "vllm.yaml")
    assert answer.status == 0, answer.err
    with Path("runs/vllm/version_0/metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["rollout/sampler_gap"]]
    assert len(rows) == 2
    for row in rows:
        assert 0 < float(row["rollout/sampler_gap"]) < 0.2
        assert float(row["policy/importance"]) == pytest.approx(1, abs=0.02)
