"""A model whose config asks for its routers, by the command line: their loss is logged, samples are written, and none
of it is in an evaluation."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from rlhf_lit.__main__ import main


@pytest.mark.parametrize("algorithm", ["sft", "ppo"])
def test_the_loss_is_logged_and_samples_are_written(
    algorithm: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    llama = AutoConfig.from_pretrained("tiny")
    config = AutoConfig.for_model(
        "mixtral", vocab_size=llama.vocab_size, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=256, bos_token_id=llama.bos_token_id,
        eos_token_id=llama.eos_token_id, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.25,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained("tiny")
    arguments = ["fit", "--config", f"{algorithm}.yaml", "--name=experts", "--trainer.max_steps=2"]
    assert main([*arguments, "--trainer.max_epochs=-1"]) == 0
    said = capsys.readouterr()
    assert "note: model.base.router_loss: 0.25, as the model's config says" in said.err
    run = place / "runs" / "experts" / "version_0"
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    losses = [float(row["train/router_loss"]) for row in rows if row["train/router_loss"]]
    assert len(losses) == 2
    assert all(2 <= loss <= 4 for loss in losses), "k = 2 where experts are used alike, at most E = 4"
    assert not any("router" in key for row in rows for key, value in row.items() if value and key.startswith("val/"))
    assert (run / "samples.jsonl").read_text().count("\n") > 0
    assert AutoConfig.from_pretrained(run / "hf").output_router_logits is True
