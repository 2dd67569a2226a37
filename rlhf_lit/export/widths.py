"""The width that an export's weights are written in."""

from __future__ import annotations

import re
from typing import Any, Literal

import torch
from torch import nn

from rlhf_lit.errors import UserError

# Of an export alone: nothing is trained in float16.
Width = Literal["float32", "bfloat16", "float16"]


@torch.no_grad()
def in_width(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast a model's weights, in place.

    A reward model's head stays as wide as it is, and so do the weights that transformers itself holds in float32
    whatever a model is loaded in. Weights that others are tied to stay tied.

    Args:
        model: whole, of transformers.
        dtype: of its weights from now on.

    Raises:
        UserError: a weight is too large for float16.
    """
    wide: Any = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    if dtype == torch.float16:
        wide = {*wide, *(getattr(model, "_keep_in_fp32_modules", None) or ())}
    kept = re.compile("|".join(rf"(^|\.){name}($|\.)" for name in ("score", *sorted(wide))))
    for name, weight in model.named_parameters():
        if not weight.is_floating_point() or kept.search(name):
            continue
        cast = weight.data.to(dtype)
        if dtype == torch.float16 and cast.isinf().any() and not weight.isinf().any():
            largest = float(weight.abs().max())
            raise UserError(f"--dtype float16: {name} reaches {largest:.3g}, and float16 ends at 65504; use bfloat16")
        weight.data = cast
    return model
