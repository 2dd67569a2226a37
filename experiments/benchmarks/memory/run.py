"""What SFT, reward modelling, DPO and PPO hold and need, on Llamas with random weights. See README.md beside this."""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf_lit.algorithms import DPO, PPO, SFT, RewardModel
from rlhf_lit.algorithms.algorithm import Algorithm, Optimizer
from rlhf_lit.commands.training import quiet_libraries
from rlhf_lit.data.modules import PreferenceDataModule, RolloutDataModule, SFTDataModule, TextDataModule
from rlhf_lit.losses.kl import FixedKL
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.memory.bench import Bench, Machine
from rlhf_lit.memory.measurement import Measurement
from rlhf_lit.models.base import PLAYGROUND, Base, LoRA
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.models.roles import Critic
from rlhf_lit.models.saving import save_hf
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import RewardFromModel

FOLDER = Path(__file__).parent

SHAPES: dict[str, dict[str, int]] = {
    "0.1b": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4, "num_attention_heads": 16,
             "num_key_value_heads": 16, "vocab_size": 32_000},
    # As the Llamas 3.2 (1 B, 3 B) and 3.1 (8 B) are.
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24,
           "num_key_value_heads": 8, "vocab_size": 128_256, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 14_336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128_256},
}  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """What all rows of a table have in common.

    Attributes:
        lora: rank of the adapters.
        rows: of a batch, and of a rollout.
        length: tokens of a prompt, of a response, and half of those of a demonstration or of one side of a pair.
        budget: padded tokens of a micro-batch.
        dtype: of the base weights.
        compute: what 4-bit weights are dequantised to.
        precision: as the trainer takes it.
        device: cpu or cuda.
    """

    lora: int
    rows: int
    length: int
    budget: int
    dtype: Any
    compute: Any
    precision: str
    device: str


# Short rows, and float32 where bfloat16 is slow: on a CPU it is what stays that is measured.
CPU = Setting(
    lora=16, rows=4, length=8, budget=32, dtype="bfloat16", compute="float32", precision="32-true", device="cpu"
)
CUDA = Setting(
    lora=16, rows=16, length=512, budget=4096, dtype="bfloat16", compute="bfloat16", precision="bf16-mixed",
    device="cuda",
)  # fmt: skip


def save_llama(folder: Path, shape: dict[str, int], dtype: torch.dtype, device: str) -> str:
    """A Llama of that shape with random weights, and the built-in world's tokenizer. → the folder's name."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(PLAYGROUND)
    config = LlamaConfig(**shape, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id)  # type: ignore[arg-type]
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    with torch.device(device):
        model = LlamaForCausalLM(config)
    torch.set_default_dtype(before)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


class Stages:
    """The algorithms on one base, each stage starting from the one before, as in a real run.

    Args:
        base: folder of the language model.
        folder: where stages are written.
        setting: sizes.
    """

    def __init__(self, base: str, folder: Path, setting: Setting) -> None:
        self.base = base
        self.folder = folder
        self.setting = setting
        rows = {"batch_size": setting.rows, "micro_batch_tokens": setting.budget}
        self.demonstrations = SFTDataModule(max_length=2 * setting.length, **rows)
        self.pairs = PreferenceDataModule(max_length=2 * setting.length, **rows)
        self.prompts = RolloutDataModule(max_length=setting.length, rollout_size=setting.rows, **rows)

    def qlora(self, name: str | None = None) -> Base:
        """A new adapter on the base in 4 bits, or an earlier stage's."""
        if name is not None:
            return Base(name=str(self.folder / name), dtype=self.setting.dtype, gradient_checkpointing=True)
        lora = LoRA(rank=self.setting.lora, alpha=2 * self.setting.lora)
        return Base(
            name=self.base,
            dtype=self.setting.dtype,
            gradient_checkpointing=True,
            lora=lora,
            quantization=Quantization(compute_dtype=self.setting.compute),
        )

    def full(self, name: str | None = None) -> Base:
        """All weights, of the base or of an earlier stage."""
        return Base(
            name=str(self.folder / name) if name else self.base, dtype=self.setting.dtype, gradient_checkpointing=True
        )

    def sft(self) -> Algorithm:
        return SFT(self.qlora(), optimizer=Optimizer("paged_adamw_8bit"))

    def reward_model(self) -> Algorithm:
        return RewardModel(self.qlora(), optimizer=Optimizer("paged_adamw_8bit"))

    def dpo(self) -> Algorithm:
        return DPO(self.qlora("sft"), DPOLoss(beta=0.1), optimizer=Optimizer("paged_adamw_8bit"))

    def ppo(self, own_base: bool = False) -> Algorithm:
        reward = RewardFromModel(str(self.folder / "reward"), own_base=own_base, dtype=self.setting.dtype)
        return self._ppo(self.qlora("sft"), reward, Optimizer("paged_adamw_8bit", eps=1e-5))

    def full_reward_model(self) -> Algorithm:
        return RewardModel(self.full())

    def separate_ppo(self) -> Algorithm:
        """Four models that share nothing, all weights of two of them trained."""
        reward = RewardFromModel(str(self.folder / "full_reward"), dtype=self.setting.dtype)
        return self._ppo(self.full(), reward, Optimizer(eps=1e-5))

    def _ppo(self, base: Base, reward: RewardFromModel, optimizer: Optimizer) -> PPO:
        sampling = Sampling(max_new_tokens=self.setting.length, rows_at_once=self.setting.rows)
        return PPO(base, reward, FixedKL(0.05), sampling, critic=Critic(init="reward"), optimizer=optimizer)

    def rows(self) -> Iterator[tuple[str, Callable[[], Algorithm], TextDataModule, str | None]]:
        """(name, algorithm, data, where the stage is kept for a later one)."""
        yield "SFT, QLoRA", self.sft, self.demonstrations, "sft"
        yield "reward model, QLoRA", self.reward_model, self.pairs, "reward"
        yield "DPO, QLoRA", self.dpo, self.pairs, None
        yield "PPO, QLoRA: four roles on one base", self.ppo, self.prompts, None
        yield "PPO, QLoRA: the reward on a base of its own", lambda: self.ppo(own_base=True), self.prompts, None
        yield "reward model, all weights", self.full_reward_model, self.pairs, "full_reward"
        yield "PPO, all weights: four models", self.separate_ppo, self.prompts, None

    def measure(self, build: Callable[[], Algorithm], data: TextDataModule, keep: str | None) -> Measurement:
        """One row; the stage is saved where a later one starts from it."""
        module = build()
        bench = Bench(module, data, Machine(self.setting.device, self.setting.precision))
        found = bench.measure(self.setting.budget)
        if keep is not None:
            save_hf(module, self.folder / keep)
        del module, bench
        gc.collect()
        return found


def measure_shape(name: str, setting: Setting, most: int | None, report: Callable[[dict[str, Any]], None]) -> None:
    """All rows of one shape, told one by one.

    Args:
        name: of the shape.
        setting: sizes.
        most: the first so many rows; None all.
        report: gets each row when it is there.
    """
    with tempfile.TemporaryDirectory() as place:
        base = save_llama(Path(place, "base"), SHAPES[name], getattr(torch, setting.dtype), setting.device)
        stages = Stages(base, Path(place), setting)
        for title, build, data, keep in list(stages.rows())[:most]:
            found = stages.measure(build, data, keep)
            report(
                {
                    "shape": name,
                    "row": title,
                    "fits": found.fits,
                    "ran_out_in": None if found.fits else found.phase,
                    "held": asdict(found.held) if found.held else None,
                    "total_held": found.held.total if found.held else None,
                    "peaks": found.peaks,
                }
            )


def main() -> None:
    """Write ``results_<device>.json``, a row at a time, and print it."""
    quiet_libraries()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), help="default: 0.1b, on cuda 1b 3b 8b")
    arguments = parser.parse_args()
    cuda = arguments.device == "cuda"
    setting = CUDA if cuda else CPU
    results: list[dict[str, Any]] = []

    def report(row: dict[str, Any]) -> None:
        results.append(row)
        held, peak = row["total_held"], max(row["peaks"].values())
        said = f"{held / 2**20:.0f} MiB held" if held else f"ran out of memory in the {row['ran_out_in']}"
        print(f"{row['shape']:>6}  {row['row']:<45} {said}, {peak / 2**20:.0f} MiB at most", flush=True)
        content = {"setting": asdict(setting), "torch": torch.__version__, "rows": results}
        (FOLDER / f"results_{arguments.device}.json").write_text(json.dumps(content, indent=1) + "\n")

    for name in arguments.shapes or (["1b", "3b", "8b"] if cuda else ["0.1b"]):
        # All weights of an 8 B model, twice with gradients and Adam, are past any one card.
        measure_shape(name, setting, None if name in ("0.1b", "1b") else 5, report)


if __name__ == "__main__":
    main()
