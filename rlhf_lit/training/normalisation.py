"""What is done to a reward model's scores after training: score = scale · (the trained head's) + bias.

A checkpoint holds the head as it was trained, and the normalisation beside it: a run that goes on is the same to the
bit as one that was not interrupted, and an evaluation of the checkpoint gives the exported model's scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.errors import say
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.heads import reward_bias
from rlhf_lit.parallel.sharding import sharding_of


@dataclass(frozen=True)
class Normalisation:
    """A normalisation that is in force.

    Attributes:
        scale: what the head was multiplied by.
        bias: the constant that is added to every score.
        head: the head's parameters as they were trained, by their names in the module.
        trained_bias: the constant that was added in training (of a base that was a reward model already).
    """

    scale: float
    bias: float
    head: dict[str, Tensor]
    trained_bias: float


@torch.no_grad()
def normalise(
    module: nn.Module, scores: Tensor, preferred: Tensor, unit_variance: bool, before: Normalisation | None
) -> Normalisation | None:
    """Shift, and on request scale, the scores of the reward model in a module.

    Args:
        module: with the reward model as its ``scorer``.
        scores: [responses] its present scores.
        preferred: [responses] bool, the responses whose scores shall average 0.
        unit_variance: scale them too, so that all have standard deviation 1 (population).
        before: the normalisation in force.

    Returns:
        What is in force now: ``before``, with a note on stderr, where the scores are no numbers or all the same.
    """
    mean, spread = float(scores[preferred].mean()), float(scores.std(correction=0))
    if not torch.isfinite(scores).all() or (unit_variance and not spread > 0):
        what = "all the same" if torch.isfinite(scores).all() else "not finite"
        say(f"note: the scores of {len(scores)} responses are {what}: they were not normalised")
        return before
    scale = 1 / spread if unit_variance else 1.0
    head = {name: sharding_of(module).gathered(parameter).clone() for name, parameter in head_of(module).items()}
    bias = reward_bias(unwrapped(module.scorer))  # type: ignore[arg-type]
    _put(module, {name: value * scale for name, value in head.items()}, (bias - mean) * scale)
    return Normalisation(
        scale * (before.scale if before else 1.0),
        (bias - mean) * scale,
        before.head if before else head,
        before.trained_bias if before else bias,
    )


def undo(module: nn.Module, normalisation: Normalisation) -> None:
    """Put the head back as it was trained."""
    _put(module, normalisation.head, normalisation.trained_bias)


def save(checkpoint: dict[str, Any], normalisation: Normalisation) -> None:
    """Write the head as it was trained, and the normalisation beside it, into a Lightning checkpoint."""
    checkpoint["state_dict"].update(normalisation.head)
    checkpoint["normalisation"] = {"scale": normalisation.scale, "bias": normalisation.bias}


def load(module: nn.Module, checkpoint: dict[str, Any]) -> Normalisation | None:
    """Apply a checkpoint's normalisation to the weights in it, which are about to be loaded; None if it has none."""
    found = checkpoint.get("normalisation")
    if not found:
        return None
    head = {name: checkpoint["state_dict"][name] for name in head_of(module)}
    checkpoint["state_dict"].update({name: value * found["scale"] for name, value in head.items()})
    inner = unwrapped(module.scorer)  # type: ignore[arg-type]
    normalisation = Normalisation(found["scale"], found["bias"], head, reward_bias(inner))
    inner.config.reward_bias = found["bias"]
    return normalisation


def head_of(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a reward model's head in force, by name."""
    return {name: p for name, p in module.named_parameters() if "score" in name.split(".") and p.requires_grad}


@torch.no_grad()
def _put(module: nn.Module, head: dict[str, Tensor], bias: float) -> None:
    for name, parameter in head_of(module).items():
        sharding_of(module).assign(parameter, head[name])
    unwrapped(module.scorer).config.reward_bias = bias  # type: ignore[arg-type]
