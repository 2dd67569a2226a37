"""What a run leaves, read and compared; and a model small enough to train in a test."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import torch


def metrics(run: Path) -> list[dict[str, str]]:
    """The rows of ``metrics.csv``."""
    with (run / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def timeless(row: dict[str, Any]) -> dict[str, Any]:
    """Without the columns that measure this machine."""
    return {k: v for k, v in row.items() if "per_s" not in k and k != "train/mfu" and not k.startswith("time/")}


def final(run: Path) -> dict[str, Any]:
    """The last checkpoint."""
    state: dict[str, Any] = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    return state


def loader_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Where the training data stood."""
    (state,) = checkpoint["loops"]["fit_loop"]["state_dict"]["combined_loader"]
    return dict(state)


def samples(run: Path) -> list[dict[str, Any]]:
    """The lines of ``samples.jsonl``."""
    return [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]


def assert_equal(a: object, b: object, where: str = "checkpoint") -> None:
    """Equal to the bit, all the way down."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor), where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert isinstance(b, dict), where
        assert a.keys() == b.keys(), where
        for key, value in a.items():
            assert_equal(value, b[key], f"{where}.{key}")
    elif isinstance(a, list):
        assert isinstance(b, list), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def save_small_model(folder: Path, hidden: int = 32, intermediate: int = 48) -> None:
    """The built-in world's tokenizer with a Llama of some 20 000 weights, that ends its answers now and then."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from rlhf_lit.models.base import PLAYGROUND

    config = AutoConfig.from_pretrained(PLAYGROUND)
    config.update({"hidden_size": hidden, "intermediate_size": intermediate, "head_dim": hidden // 2})
    config.update({"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    tokenizer = AutoTokenizer.from_pretrained(PLAYGROUND)
    model.lm_head.weight.data[tokenizer.eos_token_id] *= 20
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_small_mixture(folder: Path) -> None:
    """The built-in world's tokenizer with a Mixtral of four experts, whose router tells them apart."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    from rlhf_lit.models.base import PLAYGROUND

    tokenizer = AutoTokenizer.from_pretrained(PLAYGROUND)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = MixtralConfig(
        vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4, initializer_range=0.1, **sizes, **ids
    )
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
