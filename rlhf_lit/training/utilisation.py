"""What a device could do at most, which ``train/mfu`` compares a step with."""

from __future__ import annotations

import torch

from rlhf_lit.models.loading import Base


def peak_flops(device: torch.device, base: Base, precision: str) -> int | None:
    """Floating-point operations per second that a device can do, in the dtype of the matrix products; None if unknown.

    Args:
        device: the device.
        base: the model, whose products are in its dtype or in that of its quantisation.
        precision: the trainer's.
    """
    from lightning.fabric.utilities.throughput import get_available_flops

    dtype = base.quantization.compute_dtype if base.quantization else base.dtype
    return get_available_flops(device, getattr(torch, "bfloat16" if precision == "bf16-mixed" else dtype))
