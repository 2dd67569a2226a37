"""What decides a reference's log-probs: a digest of its weights, adapters, architecture and number formats.

Nothing else enters it: no name, path, version, seed, batch size, learning rate or loss. Attention implementations and
devices, which differ by rounding alone, do not either.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import xxhash
from torch import Tensor, nn

from rlhf_lit.models.adapter_names import copied_modules, plain_name
from rlhf_lit.models.anatomy import unwrapped

# Part of the digest: raise it when the same model would give other log-probs.
VERSION = 1
# Bytes of a weight that are copied to the host at once.
PIECE = 2**26
# Kinds of devices that may have an autocast in force.
DEVICES = ("cuda", "cpu", "xpu", "mps")

# Of a model's configuration: names, bookkeeping, how it is trained, initialised or sampled from. What is not listed
# counts, so that a field of a new architecture costs a needless pass at worst.
WITHOUT_EFFECT = {
    "architectures",
    "attention_dropout",
    "attn_pdrop",
    "auto_map",
    "bos_token_id",
    "chunk_size_feed_forward",
    "dtype",
    "embd_pdrop",
    "eos_token_id",
    "hidden_dropout",
    "id2label",
    "initializer_range",
    "label2id",
    "output_attentions",
    "output_hidden_states",
    "pad_token_id",
    "problem_type",
    "quantization_config",
    "resid_pdrop",
    "return_dict",
    "task_specific_params",
    "tie_word_embeddings",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


@dataclass(frozen=True)
class ReferenceIdentity:
    """A reference, told apart from every other one.

    Attributes:
        digest: 32 hexadecimal digits, the same in every process.
        description: for people: model, dtype, quantization, adapter, compute, weights.
    """

    digest: str
    description: dict[str, Any]

    @property
    def words(self) -> str:
        """The description in a few words."""
        return in_words(self.description)


def in_words(description: dict[str, Any]) -> str:
    """A description in a few words."""
    if not description:
        return "a reference without a description"
    parts = [str(description.get("model")), str(description.get("dtype"))]
    parts += [f"{key} {description[key]}" for key in ("quantization", "adapter", "compute") if description.get(key)]
    return ", ".join(parts)


@torch.no_grad()
def identify(model: nn.Module) -> ReferenceIdentity:
    """The identity of the model as it would compute now: adapters in force, autocast in force.

    Every byte of every weight is read, a piece at a time through the host: no second copy of the model is made.

    Args:
        model: a transformers model, in a PEFT wrapper or not, on any device.
    """
    inner = unwrapped(model)
    adapters = _adapters(inner)
    inside_adapters = {id(weight) for adapter in adapters for weight in adapter.everything}
    digest = xxhash.xxh3_128()

    def add(*facts: Any) -> None:
        digest.update((json.dumps(facts, sort_keys=True, default=str) + "\n").encode())

    compute = _compute()
    add(VERSION, _function(inner.config.to_dict()), compute)
    weights = {
        plain_name(name): weight for name, weight in _once(_in_force(inner)) if id(weight) not in inside_adapters
    }
    for name, weight in sorted(weights.items()):
        add(name, *_content(weight))
    for name, module in inner.named_modules():
        if hasattr(module, "compute_dtype"):  # what 4-bit weights are dequantised to
            add(plain_name(name), module.compute_dtype)
    for adapter in adapters:
        for place, settings, tensors in adapter.in_force:
            add(adapter.layer, place, settings, [(name, *_content(tensor)) for name, tensor in tensors])
    return ReferenceIdentity(digest.hexdigest(), _description(inner, weights, adapters, compute))


def _function(config: dict[str, Any]) -> dict[str, Any]:
    """Of a configuration, nested ones included, what the function depends on."""
    return {
        key: _function(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in WITHOUT_EFFECT and not key.startswith("_")
    }


def _compute() -> dict[str, Any]:
    """The number formats of the forward pass, beside those of the weights."""
    # Of any device: a model is asked who it is before it is moved to where it will compute.
    autocast = [str(torch.get_autocast_dtype(kind)) for kind in DEVICES if torch.is_autocast_enabled(kind)]
    return {"autocast": autocast[0] if autocast else None, "float32_products": _float32_products()}


def _float32_products() -> str:
    """How float32 matrix products are computed: in full, or with TF32 or bfloat16 inside."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set through torch's newer interface, which this one refuses to read
        return str(torch.backends.cuda.matmul.fp32_precision)


def _once(named: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tied weights under the first of their names alone."""
    seen: set[int] = set()
    for name, value in named.items():
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield name, value


def _in_force(inner: Any) -> dict[str, Any]:
    """The state of a model by name: of a module that an adapter has a copy of, the one that is in force."""
    chosen = {}
    for path, wrapper in copied_modules(inner):
        active = () if wrapper.disable_adapters else (n for n in wrapper.active_adapters if n in wrapper._adapters)
        copy = next(iter(active), None)
        chosen[path] = f"{path}.original_module." if copy is None else f"{path}.modules_to_save.{copy}."
    state = {}
    for name, weight in inner.state_dict(keep_vars=True).items():
        inside = next((path for path in chosen if name.startswith(f"{path}.")), None)
        if inside is None:
            state[name] = weight
        elif name.startswith(chosen[inside]):
            state[f"{inside}.{name.removeprefix(chosen[inside])}"] = weight
    return state


def _content(weight: Tensor) -> tuple[list[int], str, str]:
    """Shape, dtype, and a digest of every byte."""
    digest = xxhash.xxh3_128()
    flat = weight.detach().reshape(-1)
    for piece in flat.split(max(1, PIECE // flat.element_size())):
        digest.update(piece.contiguous().cpu().view(torch.uint8).numpy())
    return list(weight.shape), str(weight.dtype), digest.hexdigest()


@dataclass(frozen=True)
class _Adapters:
    """The adapters of one layer.

    Attributes:
        layer: its name.
        everything: the tensors of all of them.
        in_force: for each one that is active: its place in the sum, what it is multiplied with and its variant, and its
            tensors by name. Empty where adapters are off.
        rank: of the first in force.
    """

    layer: str
    everything: list[Tensor]
    in_force: list[tuple[int, dict[str, Any], list[tuple[str, Tensor]]]]
    rank: int | None


def _adapters(inner: nn.Module) -> list[_Adapters]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [
        _adapters_of(plain_name(name), module)
        for name, module in inner.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]


def _adapters_of(name: str, layer: Any) -> _Adapters:
    assert not layer.merged, f"{name}: a merged adapter cannot be told from its base"
    kinds = sorted(set(layer.adapter_layer_names))  # lora_A, lora_B, the magnitudes of DoRA, …
    held = {kind: getattr(layer, kind) for kind in kinds}
    everything = [tensor for kind in kinds for tensor in held[kind].state_dict(keep_vars=True).values()]
    active = [] if layer.disable_adapters else layer.active_adapters
    in_force = []
    for place, adapter in enumerate(active):
        tensors = [
            (f"{kind}{inside}", tensor)
            for kind in kinds
            if adapter in held[kind]
            for inside, tensor in _tensors(held[kind][adapter])
        ]
        if tensors:
            variant = layer.lora_variant.get(adapter)
            settings = {
                "scaling": layer.scaling[adapter],  # α/r, or α/√r
                "variant": type(variant).__name__ if variant else None,
            }
            in_force.append((place, settings, tensors))
    rank = next((layer.r[adapter] for adapter in active if adapter in layer.r), None)
    return _Adapters(name, everything, in_force, rank)


def _tensors(held: Any) -> list[tuple[str, Tensor]]:
    """One adapter's tensors of one kind, a bare parameter or a module's, by what follows the adapter's name."""
    if isinstance(held, Tensor):
        return [("", held)]
    return [(f".{name}", tensor) for name, tensor in held.state_dict(keep_vars=True).items()]


def _description(
    inner: Any, weights: dict[str, Tensor], adapters: list[_Adapters], compute: dict[str, Any]
) -> dict[str, Any]:
    quantised = [weight.quant_state for weight in weights.values() if hasattr(weight, "quant_state")]
    formats: Counter[str] = Counter()
    for weight in weights.values():
        if weight.is_floating_point():
            formats[str(weight.dtype).removeprefix("torch.")] += weight.numel()
    shapes = [getattr(weight, "quant_state", weight).shape for weight in inner.parameters()]
    ours = sum(tensor.numel() for adapter in adapters for tensor in adapter.everything)
    force = [adapter for adapter in adapters if adapter.in_force]
    products = compute["float32_products"]
    formats_of_compute = [
        f"{compute['autocast'].removeprefix('torch.')} autocast" if compute["autocast"] else None,
        f"float32 products {products}" if products != "highest" else None,
    ]
    return {
        "model": inner.config.name_or_path or inner.config.model_type,
        "dtype": formats.most_common(1)[0][0],
        "quantization": quantised[0].quant_type + (" double" if quantised[0].nested else "") if quantised else None,
        "adapter": f"rank {force[0].rank} on {len(force)} layers" if force else None,
        "compute": ", ".join(part for part in formats_of_compute if part) or None,
        "weights": sum(torch.Size(shape).numel() for shape in shapes) - ours,
    }
