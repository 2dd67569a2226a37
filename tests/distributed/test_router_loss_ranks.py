"""The loss of the routers on two processes, replicated and sharded, is that of one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from processes import Run
from run_folders import final, metrics, save_small_model

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def save_experts(folder: Path) -> None:
    """A small Mixtral, with the small model's tokenizer, whose config asks for the loss."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    save_small_model(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = AutoConfig.for_model(
        "mixtral", vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=128, output_router_logits=True, router_aux_loss_coef=0.5, initializer_range=0.15,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=None, bos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


@pytest.mark.soak
@pytest.mark.parametrize("algorithm", ["SFT", "DPO"])
def test_two_processes_have_the_loss_of_one(algorithm: str, tmp_path: Path) -> None:
    save_experts(tmp_path / "model")
    rows = [{"prompt": " ".join(WORDS[: 1 + i % 5]), "completion": " ".join(WORDS[i:] * (1 + i % 3))} for i in range(9)]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": " ".join(WORDS[: 1 + i])}
        for i, row in enumerate(rows)
    ]
    lines = rows if algorithm == "SFT" else pairs
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = {
        "base": {"name": "model", "gradient_checkpointing": True},
        "learning_rate": 2e-3, "optimizer": {"eps": 1e-2}, "schedule": {"name": "constant"},
        "sampling": {"max_new_tokens": 8},
    }  # fmt: skip
    if algorithm == "DPO":
        model["loss"] = {"class_path": "DPOLoss", "init_args": {"beta": 0.5}}
    config = {
        "name": "routers",
        "model": {"class_path": algorithm, "init_args": model},
        "data": {
            "class_path": "SFTDataModule" if algorithm == "SFT" else "PreferenceDataModule",
            "init_args": {"train": {"path": "rows.jsonl"}, "cache": None, "batch_size": 4, "micro_batch_tokens": 64},
        },
        "trainer": {"max_steps": 5, "accelerator": "cpu", "enable_progress_bar": False, "max_epochs": -1},
    }
    (tmp_path / "routers.yaml").write_text(yaml.safe_dump(config))
    runs = []
    for way, ranks in (("auto", 1), ("ddp", 2), ("fsdp2", 2)):
        options = (f"--trainer.strategy={way}", f"--trainer.devices={ranks}", f"--runs={way}")
        run = Run("fit", "--config", "routers.yaml", *options, folder=tmp_path, ranks=ranks)
        run.wait()
        runs.append(tmp_path / way / "routers" / "version_0")
    one, *others = runs
    found = [[float(row["train/router_loss"]) for row in metrics(run) if row.get("train/router_loss")] for run in runs]
    assert len(found[0]) == 5
    assert max(found[0]) - min(found[0]) > 1e-3
    for run, losses in zip(others, found[1:], strict=True):
        assert losses == pytest.approx(found[0], rel=1e-5)
        for name, weight in final(one)["state_dict"].items():
            assert torch.allclose(weight, final(run)["state_dict"][name], rtol=0, atol=2e-5), name
