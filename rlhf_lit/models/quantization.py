"""Base weights in 4 bits."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_lit.errors import say

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Quantization:
    """4-bit base weights through bitsandbytes (QLoRA: Dettmers et al. 2023, arXiv 2305.14314).

    Args:
        type: the 4-bit data type, nf4 or fp4.
        double: quantise the quantisation constants too (0.37 bit per parameter less).
        compute_dtype: what the weights of linear layers are dequantised to for a matrix product (stacked experts: what
            the base is loaded in); float16 for models that do not learn alone.
    """

    type: Literal["nf4", "fp4"] = "nf4"
    double: bool = True
    compute_dtype: Dtype = "bfloat16"


def quantization_config(quantization: Quantization) -> Any:
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization.type,
        bnb_4bit_use_double_quant=quantization.double,
        bnb_4bit_compute_dtype=getattr(torch, quantization.compute_dtype),
        # Heads stay in full precision; `score` is not among those transformers leaves out by itself. Gemma 3n clamps
        # its layers' coefficients in place while it trains, which 4-bit weights cannot be.
        llm_int8_skip_modules=["lm_head", "score", "prediction_coefs", "correction_coefs"],
    )


def dequantized(packed: Tensor, state: Any) -> Tensor:
    """What a 4-bit weight stands for, in the width it had before it was quantised.

    Args:
        packed: its bytes.
        state: bitsandbytes' constants.
    """
    from bitsandbytes.functional import dequantize_4bit

    if len(state.shape) < 3:
        return dequantize_4bit(packed.data, state)
    # Stacked experts in one row: the CPU's kernel is wrong for rows of 32, 96, 160, … numbers, which hold half a block.
    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    return dequantize_4bit(packed.data, flat).view(state.shape)


def note_what_stays_wide(model: Any) -> None:
    """Say how much of a 4-bit model's layers is held as wide as before, where it is more than a tenth: neither linear
    layers nor experts, so that bitsandbytes has no 4 bits for it."""
    embeddings = {id(part.weight) for part in model.modules() if isinstance(part, nn.Embedding)}
    head = model.get_output_embeddings() or getattr(model, "score", None)
    left_out = embeddings | {id(weight) for weight in (head.parameters() if head is not None else ())}
    matrices = {name: w for name, w in model.named_parameters() if w.ndim > 1 and id(w) not in left_out}
    wide = {name: weight for name, weight in matrices.items() if not hasattr(weight, "quant_state")}
    numbers = sum(getattr(weight, "quant_state", weight).shape.numel() for weight in matrices.values())
    if sum(weight.numel() for weight in wide.values()) > numbers / 10:
        size = sum(weight.numel() * weight.element_size() for weight in wide.values())
        largest = max(wide, key=lambda name: wide[name].numel())
        say(
            f"note: base.quantization leaves {size / 1e6:.1f} MB of the layers in full width, such as {largest}: only "
            "linear layers and experts are held in 4 bits"
        )


def keep_4bit_layout(model: nn.Module) -> None:
    """Forbid the in-place repacking of 4-bit weights for AVX512-BF16, after which gradients are wrong or None."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
