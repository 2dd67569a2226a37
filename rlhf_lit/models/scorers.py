"""The score head of a reward model, and the constant that is added to its scores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rlhf_lit.errors import UserError


def stored_bias(folder: str) -> float | None:
    """The constant that a reward model's folder adds to its scores; None where it names none."""
    file = Path(folder) / "reward.json"
    return float(json.loads(file.read_text())["bias"]) if file.is_file() else None


def prepare_score_head(model: Any, new: bool) -> None:
    """The `score` head in float32, drawn anew unless it came with the weights; ``model.new_head`` tells which."""
    if not isinstance(getattr(model, "score", None), nn.Module):
        raise UserError(f"base.name: {type(model).__name__} has no `score` head; a decoder-only model is needed")
    head = model.score
    model.new_head = new
    if new:
        width = head.weight.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))
            values = torch.randn(head.weight.shape) / (width + 1) ** 0.5
        head.weight.data.copy_(values)
    head.float()
