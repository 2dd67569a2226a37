"""A model's weights as a plain checkpoint holds them, its adapter merged in: what another engine is given.

Nothing of the model is changed, and one merged weight at a time is made.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.errors import UserError
from rlhf_lit.models.adapter_names import adapter_of, copied_modules, plain_name
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.quantization import dequantized

ADAPTER = "default"  # the policy's, as ``Roles`` names it


@torch.no_grad()
def merged_weights(model: nn.Module, own_head: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Name and weight, as ``save_pretrained`` of the merged model would write them; tied weights come once.

    4-bit weights come dequantised: what they stand for in the forward pass. A sum of base and adapter comes in the
    wider of their two dtypes.

    Args:
        model: a causal language model, or one inside peft's wrapper, whose adapter ``default`` is merged.
        own_head: the reader holds the LM head apart from the embeddings: each comes by its own name and with its own
            adapter, also where they share a weight here.

    Raises:
        UserError: an adapter stands on the embeddings or the LM head, or has a copy of one of them, and these are tied
            for the reader too: merged it would act on both. Or it stands on the stacked weights of a mixture's experts,
            or adds a bias.
    """
    from peft.tuners.lora.layer import ParamWrapper
    from transformers.core_model_loading import revert_weight_conversion

    inner = unwrapped(model)
    layers = _adapted(inner)
    if stacked := [path for path, layer in layers.items() if isinstance(layer, ParamWrapper)]:
        raise UserError(
            f"base.lora.targets: an adapter on stacked experts ({stacked[0]}) cannot be merged for vLLM; name the "
            "attention's layers instead"
        )
    if biased := [path for path, layer in layers.items() if getattr(layer, "lora_bias", {}).get(ADAPTER)]:
        raise UserError(f"base.name: an adapter with a bias of its own ({biased[0]}) cannot be merged for vLLM")
    tied = inner.config.tie_word_embeddings and not own_head
    if tied and layers.keys() & _ends(inner):
        raise UserError(
            "base.lora.targets: the embeddings and the LM head share their weights, so an adapter on one of them "
            "cannot be merged for vLLM; leave both out of the targets"
        )
    copied = {path: module for path, module in copied_modules(inner) if ADAPTER in module.modules_to_save}
    if tied and _come_apart(inner, copied):
        raise UserError(
            "base.lora.modules_to_save: the embeddings and the LM head share their weights in the base, and here they "
            "do not, which cannot be merged for vLLM; leave both out"
        )
    saved = inner.state_dict().keys()
    buffers = ((name, buffer) for name, buffer in inner.named_buffers() if name in saved)
    seconds = _second_names(inner) if own_head else ()
    for name, weight in (*inner.named_parameters(), *seconds, *buffers):
        owner = adapter_of(name)
        if owner is None:
            if name.partition(".original_module.")[0] in copied:
                continue  # the adapter's copy stands for it
            path, _, kind = name.rpartition(".")
            layer = layers.get(path.removesuffix(".base_layer")) if kind == "weight" else None
            plain, value = plain_name(name), _plain(weight) if layer is None else _merged(layer, _plain(weight))
        elif owner == ADAPTER and f".modules_to_save.{ADAPTER}." in name:
            plain, value = name.replace(f".modules_to_save.{ADAPTER}.", "."), weight.detach()
        else:
            continue
        # The names and shapes of files are not always those of the module in memory (experts come stacked there).
        yield from revert_weight_conversion(inner, {plain: value}).items()


def _come_apart(inner: Any, copied: dict[str, Any]) -> bool:
    """Whether an adapter's copies of tied embeddings and LM head are not one any more."""
    ends = {path: copied[path].modules_to_save[ADAPTER].weight for path in _ends(inner) & copied.keys()}
    return bool(ends) and (len(ends) == 1 or len({id(weight) for weight in ends.values()}) > 1)


def _adapted(inner: Any) -> dict[str, Any]:
    """The layers that hold adapters, by their paths."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return {path: module for path, module in inner.named_modules() if isinstance(module, BaseTunerLayer)}


def _second_names(inner: Any) -> Iterator[tuple[str, Tensor]]:
    """Weights that embeddings and LM head share, by the name that ``named_parameters`` leaves out."""
    first = {name for name, _ in inner.named_parameters()}
    for path in _ends(inner):
        for kind, weight in inner.get_submodule(path).named_parameters(prefix=path, remove_duplicate=False):
            if kind not in first:
                yield kind, weight


def _ends(inner: Any) -> set[str]:
    """Paths of the embeddings and the LM head."""
    ends = (inner.get_input_embeddings(), inner.get_output_embeddings())
    return {path for path, module in inner.named_modules() if module in ends}


def _plain(weight: Tensor) -> Tensor:
    """What a weight stands for, where it is held in 4 bits."""
    state = getattr(weight, "quant_state", None)
    return weight.detach() if state is None else dequantized(weight, state)


def _merged(layer: Any, weight: Tensor) -> Tensor:
    """The weight of a layer with its adapter (DoRA's rescaling included) added."""
    if ADAPTER not in (*layer.lora_A, *layer.lora_embedding_A):
        return weight
    delta = layer.get_delta_weight(ADAPTER)
    weight = weight.to(torch.promote_types(weight.dtype, delta.dtype))
    if ADAPTER in layer.lora_variant:
        merged: Tensor = layer.lora_variant[ADAPTER].merge_safe(layer, ADAPTER, weight)
        return merged
    return weight + delta
