"""A tiny model, a few rows and four configs, and the command line run inside this process."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

ROOT = Path(__file__).parents[2]
OVERLAYS = ROOT / "configs" / "overlays"

SFT = {
    "model": {
        "class_path": "SFT",
        "init_args": {"base": {"name": "tiny"}, "learning_rate": 1e-3, "sampling": {"max_new_tokens": 4}},
    },
    "data": {
        "class_path": "SFTDataModule",
        "init_args": {
            "train": {"path": "sft.jsonl"},
            "validation": {"path": "sft.jsonl", "limit": 8},
            "batch_size": 8,
            "cache": None,
        },
    },
    "trainer": {"max_epochs": 2, "accelerator": "cpu"},
}
DPO = {
    "model": {
        "class_path": "DPO",
        "init_args": {
            "base": {"name": "tiny"},
            "loss": {"class_path": "DPOLoss", "init_args": {"beta": 0.1}},
            "learning_rate": 1e-3,
            "sampling": {"max_new_tokens": 4},
        },
    },
    "data": {
        "class_path": "PreferenceDataModule",
        "init_args": {
            "train": {"path": "pairs.jsonl"},
            "validation": {"path": "pairs.jsonl"},
            "batch_size": 8,
            "cache": None,
        },
    },
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
}
REWARD = {
    "model": {"class_path": "RewardModel", "init_args": {"base": {"name": "tiny"}}},
    "data": DPO["data"],
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
}
PPO = {
    "model": {
        "class_path": "PPO",
        "init_args": {
            "base": {"name": "tiny"},
            "reward": {"class_path": "RewardFromFunction", "init_args": {"function": "test_command_line.brevity"}},
            "critic": {"init": "policy"},
            "kl": {"class_path": "FixedKL", "init_args": {"beta": 0.1}},
            "sampling": {"max_new_tokens": 4},
        },
    },
    "data": {
        "class_path": "RolloutDataModule",
        "init_args": {"train": {"path": "sft.jsonl"}, "rollout_size": 8, "batch_size": 8, "cache": None},
    },
    "trainer": {"max_epochs": 1, "accelerator": "cpu"},
}


def make_tiny_model(folder: Path) -> None:
    """A Llama of 10 000 weights over bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [], trainers.BpeTrainer(special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def materials(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the model, the rows and the configs; copied for each test that writes."""
    folder = tmp_path_factory.mktemp("materials")
    make_tiny_model(folder / "tiny")
    rows = [{"prompt": f"add {i} and 1", "completion": f"it is {i + 1}"} for i in range(32)]
    pairs = [{"prompt": f"add {i} and 1", "chosen": f"it is {i + 1}", "rejected": f"no, {i}"} for i in range(32)]
    for name, content in (("sft", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    for name, config in (("sft", SFT), ("dpo", DPO), ("reward", REWARD), ("ppo", PPO)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture
def place(materials: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A fresh working folder with the materials in it."""
    folder = tmp_path / "place"
    shutil.copytree(materials, folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def run(command: Callable, place: Path) -> Callable:
    """``command``, at work in the folder with the materials (made after it, so that it is the working folder)."""
    return command
