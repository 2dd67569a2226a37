"""``torch.compile`` of what training and scoring passes go through."""

from __future__ import annotations

import torch
from torch import nn

from rlhf_lit.models.anatomy import decoder_layers


def compile_layers(module: nn.Module) -> None:
    """Compile the decoder layers of all transformers models in a module, each in place and under its own name.

    Layers of one shape share one graph, for batches of any length. The kernel of attention stays outside of it
    (``segments.register``): what is gained is in the norms, rotary embeddings and activations around it. Nothing is
    compiled before it is first called.

    Args:
        module: with its models built, not yet sharded.
    """
    from transformers import PreTrainedModel

    # Each role's adapters ask for graphs of their own, with gradients and without; dynamo would give up after 8.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    for layer in dict.fromkeys(layer for model in models for layer in decoder_layers(model)):
        layer.compile(dynamic=True)
