"""QLoRA through all four stages on one pre-trained base, through the command line: stories260K in 4 bits."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
QLORA = ("--config", str(CONFIGS / "overlays" / "qlora.yaml"), "--model.base.lora.rank=4")
CPU = (
    "--trainer.accelerator=cpu", "--trainer.max_steps=3", "--trainer.limit_val_batches=1", "--data.cache=null",
    "--data.train.limit=64", "--data.batch_size=8", "--trainer.enable_progress_bar=false",
)  # fmt: skip


@pytest.fixture
def stages(command: Callable[..., Any], real_data: Path) -> dict[str, Path]:
    """Three steps of each stage; later ones start from the first one's adapter and do not speak of bits."""
    instructions = real_data / "rasbt_llm_book" / "instruction-data-with-preference.json"
    pairs = f"--data.train.path={instructions}"
    sft = ("--model.base.name=runs/sft", "--data.template=plain", "--data.max_length=128")
    asked = {
        "sft": (
            *("--config", str(CONFIGS / "sft/stories260k_instructions.yaml"), *QLORA, pairs),
            f"--model.base.name={real_data / 'stories260k' / 'hf'}",
            *("--data.max_length=128", "--model.sampling.max_new_tokens=4"),
        ),
        "reward": (
            "--model=RewardModel",
            "--data=PreferenceDataModule",
            *sft,
            pairs,
            "--data.validation_fraction=0.02",
        ),
        "dpo": (
            *("--model=DPO", "--data=PreferenceDataModule", *sft, pairs, "--data.validation_fraction=0.02"),
            *("--model.loss=DPOLoss", "--model.loss.beta=0.1", "--model.sampling.max_new_tokens=4"),
        ),
        "ppo": (
            *("--model=PPO", "--data=RolloutDataModule", *sft, pairs, "--data.rollout_size=16"),
            *("--model.reward=RewardFromModel", "--model.reward.path=runs/reward"),
            *("--model.kl=FixedKL", "--model.kl.beta=0.1", "--model.sampling.max_new_tokens=8"),
        ),
    }
    for name, argv in asked.items():
        rate = () if name == "sft" else ("--model.learning_rate=1e-2",)
        answer = command("fit", *argv, *rate, *CPU, f"--name={name}")
        assert answer.status == 0, answer.err
    return {name: Path("runs", name, "version_0") for name in asked}


def adapter_bytes(folder: Path) -> int:
    return (folder / "hf" / "adapter_model.safetensors").stat().st_size


def test_all_stages_stand_on_one_base_in_4_bits(stages: dict[str, Path], real_data: Path) -> None:
    from bitsandbytes.nn import Linear4bit
    from peft import get_peft_model_state_dict

    from rlhf_lit.models.base import Base, LoRA
    from rlhf_lit.models.loading import load_causal_lm
    from rlhf_lit.models.quantization import Quantization

    bases = [json.loads((folder / "hf" / "base.json").read_text()) for folder in stages.values()]
    assert all(base == bases[0] for base in bases)
    assert bases[0]["quantization"]["type"] == "nf4"

    tokens = torch.tensor([[1, *range(300, 340)]])
    quantization = Quantization()
    bare: Any = load_causal_lm(
        Base(name=str(real_data / "stories260k" / "hf"), lora=LoRA(rank=4), quantization=quantization)
    )
    sft: Any = load_causal_lm(Base(name="runs/sft"))
    for name in ("dpo", "ppo"):
        model: Any = load_causal_lm(Base(name=f"runs/{name}"))
        assert any(isinstance(module, Linear4bit) for module in model.modules())
        with torch.no_grad():
            with model.disable_adapter():
                assert model(tokens).logits.equal(bare(tokens).logits), "adapters off are the base to the bit"
            moved = (model(tokens).logits - sft(tokens).logits).abs().max()
        assert float(moved) > 1e-3
        adapters = get_peft_model_state_dict(model)
        assert adapters.keys() == get_peft_model_state_dict(sft).keys()

    # What trains is in the checkpoint, with the optimizer's state and the unspent rollout; the base is not.
    checkpoint = (stages["ppo"] / "checkpoints" / "last.ckpt").resolve().stat().st_size
    held = adapter_bytes(stages["ppo"]) + adapter_bytes(stages["reward"])  # the policy's, and the critic's beside it
    assert checkpoint < 5 * held
    state = torch.load(stages["ppo"] / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {name.split(".")[-2] for name in state if "lora_" in name} == {"default", "value"}
