"""Experts in 4 bits.

transformers holds the experts of a layer stacked in one tensor, and bitsandbytes replaces linear layers alone: of a
mixture of experts nearly everything would stay as wide as it was. Here such tensors are quantised one at a time while
they are loaded, and dequantised to the width they came in for the forward pass of their layer, and again for its
backward pass: what autograd would keep for that is one dequantised copy of every layer.

A tensor keeps its name, and as a parameter it is what a linear layer's 4-bit weight is: bytes with a ``quant_state``.
Its module reads it dequantised.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor

from rlhf_lit.models.anatomy import read_directly
from rlhf_lit.models.quantization import dequantized


def stacked_weights(module: nn.Module) -> list[str]:
    """The names of a module's own stacked weights of experts; none where it is no such module."""
    if "Expert" not in type(module).__name__:
        return []
    own = module.named_parameters(recurse=False)
    return [name for name, weight in own if weight.ndim > 1 and "bias" not in name]


@contextmanager
def quantizing_experts() -> Iterator[None]:
    """transformers' 4-bit loading takes stacked experts for weights to quantise, inside the block."""
    from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

    plain = AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"]
    AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = _quantizer()
    try:
        yield
    finally:
        AUTO_QUANTIZER_MAPPING["bitsandbytes_4bit"] = plain


@cache
def _quantizer() -> type:
    """transformers' quantizer, for experts and linear layers."""
    from bitsandbytes.nn import Params4bit
    from transformers.integrations.bitsandbytes import Bnb4bitQuantize
    from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer

    class Quantize(Bnb4bitQuantize):
        def convert(self, input_dict: Any, full_layer_name: Any = None, model: Any = None, **options: Any) -> Any:
            (name, value), *others = input_dict.items()
            path, _, own = name.rpartition(".")
            if others or own not in stacked_weights(model.get_submodule(path)):
                return super().convert(input_dict, full_layer_name=full_layer_name, model=model, **options)
            value = value[0] if isinstance(value, list) else value
            settings = self.hf_quantizer.quantization_config
            weight = Params4bit(
                value,
                requires_grad=False,
                compress_statistics=settings.bnb_4bit_use_double_quant,
                quant_type=settings.bnb_4bit_quant_type,
            )
            return {name: weight.to(value.device)}

    class Quantizer(Bnb4BitHfQuantizer):
        def param_needs_quantization(self, model: Any, param_name: str, **options: Any) -> bool:
            path, _, own = param_name.rpartition(".")
            stacked = own in stacked_weights(model.get_submodule(path))
            return stacked or super().param_needs_quantization(model, param_name, **options)

        def get_quantize_ops(self) -> Any:
            return Quantize(self)

        def get_modules_to_not_convert(self, model: Any, *settings: Any, **options: Any) -> Any:
            """With the LM head under the family's name for it: with names given, transformers leaves out no others. And
            with the layers that a model multiplies by without calling them."""
            head = model.get_output_embeddings()
            own = [*read_directly(model), *(name for name, module in model.named_modules() if module is head)]
            return [*Bnb4BitHfQuantizer.get_modules_to_not_convert(model, *settings, **options), *own]

        def _process_model_before_weight_loading(self, model: Any, *settings: Any, **options: Any) -> Any:
            for module in model.modules():
                if type(module).__name__ == "FalconLinear":  # a plain one in other words, which would be passed by
                    module.__class__ = nn.Linear
            return super()._process_model_before_weight_loading(model, *settings, **options)

        def _process_model_after_weight_loading(self, model: Any, **options: Any) -> Any:
            for module in model.modules():
                if names := stacked_weights(module):
                    module.quant_states = {name: module._parameters[name].quant_state for name in names}
                    kind: Any = type(module)
                    module.__class__ = _read_in_full(kind, tuple(names))
            return super()._process_model_after_weight_loading(model, **options)

    return Quantizer


@cache
def _read_in_full(kind: type[nn.Module], names: tuple[str, ...]) -> type:
    """A class of experts that reads weights of these names dequantised."""

    def read(experts: Any, name: str) -> Tensor:
        if name not in experts._parameters:
            raise AttributeError(name)
        if isinstance(experts._parameters[name], DTensor):
            return experts._parameters[name]  # between the passes; FSDP2 asks for its shard
        inside: dict[str, Tensor] | None = vars(experts).get("dequantized")
        if inside is None:
            return _dequantized(experts, name)
        if name not in inside:
            inside[name] = _dequantized(experts, name)
        return inside[name]

    @torch.compiler.disable(reason="hooks on saved tensors")
    def forward(experts: Any, *args: Any, **options: Any) -> Any:
        inside: dict[str, Tensor] = {}

        def pack(tensor: Tensor) -> Tensor | _View:
            place = tensor.untyped_storage().data_ptr()
            for name, weight in inside.items():
                if place == weight.untyped_storage().data_ptr():
                    return _View(experts, name, tensor.size(), tensor.stride(), tensor.storage_offset())
            return tensor

        vars(experts)["dequantized"] = inside  # each weight once, however many experts read their part of it
        try:
            with saved_tensors_hooks(pack, _unpacked):
                return kind.forward(experts, *args, **options)
        finally:
            del vars(experts)["dequantized"]
            inside.clear()

    # An adapter on the weight itself (peft's ``ParamWrapper``) takes the parameter out for each forward pass, puts the
    # sum of weight and adapter in its place, and then what it read there back: the dequantised weight.
    def take_out(experts: Any, name: str) -> None:
        if name in names and name in experts._parameters:
            vars(experts).setdefault("taken_out", {})[name] = experts._parameters[name]
        kind.__delattr__(experts, name)

    def put_back(experts: Any, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        if name in names:
            experts.register_parameter(name, vars(experts)["taken_out"].pop(name))
        else:
            kind.register_buffer(experts, name, tensor, persistent)

    members = {name: property(partial(read, name=name)) for name in names}
    changed = {"forward": forward, "__delattr__": take_out, "register_buffer": put_back}
    return type(kind.__name__, (kind,), {**members, **changed, "__module__": kind.__module__})


@torch.no_grad()
def _dequantized(experts: Any, name: str) -> Tensor:
    packed = experts._parameters[name]
    # Gathered from shards the bytes come without their constants, which the module keeps (``parallel.sharding``).
    return dequantized(packed, getattr(packed, "quant_state", None) or experts.quant_states[name])


@dataclass(frozen=True)
class _View:
    """What autograd keeps of a part of a dequantised weight: where to find it again."""

    experts: Any
    name: str
    size: torch.Size
    stride: Sequence[int | torch.SymInt]
    offset: int | torch.SymInt


class _Backward:
    """The dequantised weights of the layer that the backward pass is at: each of its experts asks for its part."""

    experts: Any = None
    weights: dict[str, Tensor]

    def part(self, view: _View) -> Tensor:
        if self.experts is not view.experts:
            self.experts, self.weights = view.experts, {}
            torch.autograd.Variable._execution_engine.queue_callback(self.clear)
        if view.name not in self.weights:
            self.weights[view.name] = _dequantized(view.experts, view.name)
        return self.weights[view.name].as_strided(view.size, view.stride, view.offset)

    def clear(self) -> None:
        self.experts, self.weights = None, {}


_BACKWARD = _Backward()


def _unpacked(kept: Tensor | _View) -> Tensor:
    return _BACKWARD.part(kept) if isinstance(kept, _View) else kept
