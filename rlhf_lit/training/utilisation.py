"""How well a step uses the device: ``train/tflops_per_s``, and ``train/mfu``, its part of what the device could do."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_lit.models.base import Base
from rlhf_lit.models.flops import FlopCount


def log_rate(algorithm: Any, counted: FlopCount, seconds: float) -> None:
    """Log the rate of a step on this rank; nothing where no pass was counted."""
    if counted.total is None:
        return
    rate = counted.total / seconds
    algorithm.log("train/tflops_per_s", rate / 1e12)
    if peak := peak_flops(algorithm.device, algorithm.base, str(algorithm.trainer.precision)):
        algorithm.log("train/mfu", rate / peak)


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
