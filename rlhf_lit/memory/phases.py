"""Phases of a run as far as memory goes: in which one it ran out, and which setting to try then."""

from __future__ import annotations

import traceback
from typing import Literal

import torch
from jsonargparse import Namespace

Phase = Literal["load", "rollout", "score", "update", "optimizer", "validation"]
"""Where a run can be when memory runs out: loading models, sampling, scoring samples, forward and backward passes of an
update, the optimizer's own state, or an evaluation."""

# Functions that stand for a phase, in a traceback; the innermost of them counts.
_PHASES: dict[str, Phase] = {
    "configure_model": "load",
    "model_to_device": "load",
    "respond": "rollout",
    "rollout": "score",
    "training_step": "update",
    "validation_step": "validation",
    "test_step": "validation",
}
_WORDS: dict[Phase, str] = {
    "load": "while the models are loaded",
    "rollout": "in the rollout, while it samples",
    "score": "in the score pass of a rollout",
    "update": "in the update",
    "optimizer": "in the update, for the optimizer's state",
    "validation": "in the validation",
}
_SMALLER = "--config overlays/qlora trains adapters on a 4-bit base"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch had no memory left, on a GPU or in the host (where it raises a plain ``RuntimeError``)."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
    )


def phase_of(error: BaseException) -> Phase | None:
    """In which phase an error was raised, read from its traceback; None where that shows none."""
    phase: Phase | None = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__", "").startswith(("torch.optim.", "bitsandbytes.optim.")):
            phase = "optimizer"
        phase = _PHASES.get(frame.f_code.co_name, phase)
    return phase


def out_of_memory(phase: Phase | None, config: Namespace) -> str:
    """One line: where memory ran out, and which value to try.

    Args:
        phase: see ``phase_of``.
        config: of the command, resolved.
    """
    if phase is None:
        return f"out of memory outside of any step; {_SMALLER}"
    return f"out of memory {_WORDS[phase]}: {_advice(phase, config)}"


def _advice(phase: Phase, config: Namespace) -> str:
    if phase == "load":
        return f"try --model.base.dtype=bfloat16 (now {config.get('model.init_args.base.dtype')}); {_SMALLER}"
    if phase == "optimizer":
        return f"try --model.optimizer.name=paged_adamw_8bit; {_SMALLER}"
    if phase == "rollout" and (vllm := config.get("model.init_args.vllm")):
        return f"try another --model.vllm.gpu_memory_utilization (now {vllm.gpu_memory_utilization})"
    if phase == "rollout":
        rows = config.get("model.init_args.sampling.rows_at_once") or 1
        if rows > 1:
            return f"try --model.sampling.rows_at_once={rows // 2} (now {rows}), which changes no sample"
        return "one row is sampled at a time already; lower --model.sampling.max_new_tokens or --data.max_length"
    tokens, longest = (config.get(f"data.init_args.{key}") or 1 for key in ("micro_batch_tokens", "max_length"))
    if tokens > longest:
        return (
            f"try --data.micro_batch_tokens={tokens // 2} (now {tokens}), which changes no result; "
            "`python -m rlhf_lit memory` with the same options finds the largest that fits"
        )
    if phase == "update" and not config.get("model.init_args.base.gradient_checkpointing"):
        return "one row goes through at a time already; try --model.base.gradient_checkpointing=true"
    return f"one row goes through at a time already; try --data.max_length={max(1, longest // 2)} (now {longest})"
