"""Gradient checkpointing of a model that runs without dropout.

transformers checkpoints a layer only while the layer itself is in training mode. Its children can stay in eval mode,
but what the layer does by itself, such as ``dropout(…, training=self.training)`` (OPT, Falcon, XGLM, BioGPT), would
draw. So it is in training mode where that decision is made, and in eval mode in what is checkpointed: at the forward
pass and when the backward pass computes it again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def checkpoint_in_eval_mode(module: nn.Module) -> None:
    """Switch gradient checkpointing on in all layers that have it, in a module that is in eval mode."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    for layer in module.modules():
        if isinstance(layer, GradientCheckpointingLayer) and layer.gradient_checkpointing:
            layer.training = True
            known: Any = layer._gradient_checkpointing_func
            if not isinstance(known, _InEvalMode):
                layer._gradient_checkpointing_func = _InEvalMode(layer, known)


class _InEvalMode:
    """A layer's checkpointing function that runs the layer in eval mode, unless its parts are in training mode too.

    Args:
        layer: whose function it is.
        checkpoint: the function: (forward, *arguments) → what forward returns.
    """

    def __init__(self, layer: nn.Module, checkpoint: Callable[..., Any]) -> None:
        self.layer = layer
        self.checkpoint = checkpoint

    def __call__(self, forward: Callable[..., Any], *arguments: Any) -> Any:
        if any(part.training for part in self.layer.children()):
            return self.checkpoint(forward, *arguments)

        def in_eval_mode(*given: Any) -> Any:
            before, self.layer.training = self.layer.training, False
            try:
                return forward(*given)
            finally:
                self.layer.training = before

        return self.checkpoint(in_eval_mode, *arguments)
