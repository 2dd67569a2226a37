"""Base weights in 4 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

Dtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Quantization:
    """4-bit base weights through bitsandbytes (QLoRA: Dettmers et al. 2023, arXiv 2305.14314).

    Args:
        type: the 4-bit data type, nf4 or fp4.
        double: quantise the quantisation constants too (0.37 bit per parameter less).
        compute_dtype: what the weights are dequantised to for a matrix product; float16 for models that do not learn
            alone.
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
        # Heads stay in full precision; `score` is not among those transformers leaves out by itself.
        llm_int8_skip_modules=["lm_head", "score"],
    )


def keep_4bit_layout(model: nn.Module) -> None:
    """Forbid the in-place repacking of 4-bit weights for AVX512-BF16, after which gradients are wrong or None."""
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = False
