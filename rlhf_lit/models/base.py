"""What a user writes under ``base:``: which weights, in which width, with which adapters."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_lit.errors import UserError
from rlhf_lit.models.quantization import Dtype, Quantization
from rlhf_lit.runs import resolve_model

PLAYGROUND = Path(__file__).parent / "playground"


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): only they train, the base is frozen.

    Args:
        rank: r, the rank of the update.
        alpha: the update is scaled by alpha/r (rsLoRA: alpha/√r).
        dropout: on the adapters' input. SFT and RewardModel only: the others run without dropout and refuse it.
        targets: "all-linear" (every linear layer but the heads, and but what no adapter is seen on: Mamba's projections
            that its kernels multiply by themselves, and routers that give more than a product), or the names of layers.
        modules_to_save: modules that train in full beside the adapters and are saved with them: `lm_head`,
            `embed_tokens`, `norm`. A name stands for every module whose path ends with it, as peft has it. They train
            in the base's dtype, and tied embeddings that are named come apart.
        dora: weight-decomposed adapters (Liu et al. 2024, arXiv 2402.09353).
        rslora: rank-stabilised scaling (Kalajdzievski 2023, arXiv 2312.03732).
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    modules_to_save: list[str] | None = None
    dora: bool = False
    rslora: bool = False


@dataclass(frozen=True)
class Base:
    """The model an algorithm starts from.

    Args:
        name: a hub name, a folder, a run folder of an earlier stage (`runs/<name>` means its newest version), or
            `playground` for the built-in world's small model.
        tokenizer: where the tokenizer is, if not with the model.
        dtype: of the base weights; float16 for models that do not learn alone. Adapters and heads are float32.
        attention: transformers' attention implementation; null lets transformers choose.
        gradient_checkpointing: recompute activations in the backward pass: less memory, about a third more time.
        compile: torch.compile the decoder layers of all models of the run, for training and scoring; sampling, whose
            cache grows token by token, stays as it is. The first steps take some tens of seconds more.
        lora: train low-rank adapters instead of all weights.
        quantization: load the base weights in 4 bits (needs `lora`, or an adapter folder). Where `name` is an adapter
            folder, null is what the adapter was trained on.
        router_loss: of a mixture of experts, the coefficient of the loss that keeps its experts evenly used (policy or
            reward model alone); 0 leaves it out, null is what the model's own config says: `router_aux_loss_coef` where
            `output_router_logits` is true, else 0.
        fresh: take only the configuration from `name` and start from random weights, drawn from the seed.
        adapter_base: where the base of the adapter in `name` is now; null is where the adapter says that it was. Its
            weights must be those that the adapter was trained on.
        revision: a branch, tag or commit on the hub.
        trust_remote_code: run model code that comes with the weights.
    """

    name: str
    tokenizer: str | None = None
    dtype: Dtype = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] | None = None
    gradient_checkpointing: bool = False
    compile: bool = False
    lora: LoRA | None = None
    quantization: Quantization | None = None
    router_loss: float | None = None
    fresh: bool = False
    adapter_base: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        if self.fresh and (self.lora or self.quantization):
            raise UserError("base.fresh: random weights cannot be frozen: leave out base.lora and base.quantization")
        if self.router_loss is not None and not self.router_loss >= 0:
            raise UserError(f"base.router_loss must be at least 0 or null, not {self.router_loss}")
        if self.name == "playground" and not self.fresh:
            raise UserError("base.name: playground has no weights of its own: set base.fresh: true")

    @property
    def folder(self) -> str:
        """Where the model really is: run folders resolved to their `hf/`, `playground` to the packaged folder."""
        return str(PLAYGROUND) if self.name == "playground" else resolve_model(self.name)

    @property
    def address(self) -> str:
        """The same, a folder by its absolute path: what a checkpoint remembers."""
        return str(Path(self.folder).absolute()) if Path(self.folder).is_dir() else self.folder

    def trainable(self) -> Base:
        """The same base, for a model that is to learn.

        Raises:
            UserError: it computes in float16. Nothing scales the loss up here, and a token's part of a batch's gradient
                is below what float16 holds: adapters on a frozen float16 base, or on 4-bit weights computed in it, have
                a gradient that is 36 % (31 %) off in a batch of 100 000 tokens; in bfloat16 it is 1 %.
        """
        if self.dtype == "float16":
            raise UserError("base.dtype: float16 weights do not train, small gradients become 0; set it to bfloat16")
        if self.quantization and self.quantization.compute_dtype == "float16":
            raise UserError(
                "base.quantization.compute_dtype: what is computed in float16 does not train, small gradients become "
                "0; set it to bfloat16"
            )
        return self


def require_no_dropout(base: Base, algorithm: str) -> None:
    """Refuse LoRA dropout: PPO, DPO and KTO compare log-probs of the same tokens in different passes."""
    if base.lora and base.lora.dropout:
        raise UserError(f"base.lora.dropout: {algorithm} runs without dropout; set it to 0")
