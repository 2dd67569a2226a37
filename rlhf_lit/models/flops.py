"""How many floating-point operations a step's passes ask for: the model's own, whatever this machine did to make them.

Per token a forward pass costs 2 for each weight of a matrix it goes through (a multiplication and an addition), and
attention 4·layers·width for each token attended to: half of the context on average, since it is causal. A backward pass
costs the same again for the gradient of the activations, and once more for that of the weights that are trained: 6N
for a whole model, 4N for a frozen one under adapters, and 6 for each weight of the adapters. (Kaplan et al. 2020, arXiv
2001.08361, §2.1; Chowdhery et al. 2022, "PaLM", arXiv 2204.02311, appendix B.)

The LM head counts at the positions where a log-prob is needed, embeddings and scalar heads not at all. Of a model whose
tokens mix in another way than by attention (a state-space model), the matrices alone count. Nothing counts
that another machine would spare: padding, what gradient checkpointing computes again. A prompt that a pair shares
counts for both of its sides, computed twice or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.loading import Base


@dataclass(frozen=True)
class Pass:
    """One forward pass over a batch, and the backward pass where one follows.

    Attributes:
        model: what the sequences go through.
        adapter: the LoRA adapter in force, by name; None: none.
        sequences: the rows; the LM head is applied where their mask is.
        backward: whether a gradient is asked for.
        head: whether the LM head is applied.
    """

    model: nn.Module
    adapter: str | None
    sequences: Sequences
    backward: bool = True
    head: bool = True


@dataclass(frozen=True)
class Weights:
    """Weights that a token is multiplied with.

    Attributes:
        all: how many.
        trained: how many of them are trained.
    """

    all: int
    trained: int

    def flops(self, backward: bool) -> int:
        """Of one token."""
        return 2 * self.all + (2 * self.all + 2 * self.trained if backward else 0)


def flops(passes: Iterable[Pass]) -> Tensor:
    """Σ over the passes, as a float32 scalar on the device of the sequences (nothing waits for it)."""
    return torch.stack([_of(one) for one in passes]).sum()


def _of(one: Pass) -> Tensor:
    body, head, width = _weights(one.model, one.adapter)
    lengths = one.sequences.lengths.float()
    total = lengths.sum() * body.flops(one.backward)
    # QKᵀ and the sum over V, 2·width each, over half of the context; both factors of both products ask for gradients.
    total = total + lengths.square().sum() * (2 * width * (3 if one.backward else 1))
    return total + one.sequences.mask.sum() * head.flops(one.backward) if one.head else total


def peak_flops(device: torch.device, base: Base, precision: str) -> int | None:
    """Operations per second that a device is made for, in the dtype of the matrix products; None where not known.

    Args:
        device: which.
        base: the model, whose products are in its dtype or in that of its quantisation.
        precision: the trainer's.
    """
    from lightning.fabric.utilities.throughput import get_available_flops

    dtype = base.quantization.compute_dtype if base.quantization else base.dtype
    return get_available_flops(device, getattr(torch, "bfloat16" if precision == "bf16-mixed" else dtype))


_COUNTED: WeakKeyDictionary[nn.Module, dict[str | None, tuple[Weights, Weights, int]]] = WeakKeyDictionary()


def _weights(model: nn.Module, adapter: str | None) -> tuple[Weights, Weights, int]:
    """Of the body, of the LM head, and layers × width of the attention; counted once for each model and adapter."""
    known = _COUNTED.setdefault(model, {})
    if adapter not in known:
        inner = unwrapped(model)
        config = inner.config.get_text_config()
        body = getattr(inner, inner.base_model_prefix)
        head = inner.get_output_embeddings()
        known[adapter] = (
            _matrices(body, adapter, config),
            Weights(0, 0) if head is None else _matrices(head, adapter, config),
            config.num_hidden_layers * _attention_width(config),
        )
    return known[adapter]


def _attention_width(config: Any) -> int:
    heads = getattr(config, "num_attention_heads", None)
    if not heads:
        return 0
    return heads * (getattr(config, "head_dim", None) or config.hidden_size // heads)


def _matrices(module: nn.Module, adapter: str | None, config: Any) -> Weights:
    counts = [(_used(shape, config), trained) for shape, trained in _multiplied(module, adapter)]
    return Weights(sum(n for n, _ in counts), sum(n for n, trained in counts if trained))


def _multiplied(module: nn.Module, adapter: str | None) -> Iterator[tuple[torch.Size, bool]]:
    """The shapes of the matrices of a module and of one adapter in it, and whether they train; no embeddings, which
    are looked up."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding) or (".lora_" in name and name.split(".")[-1] != adapter):
            continue
        packed = getattr(part, "quant_state", None)  # 4-bit weights are stored as bytes
        for kind, weight in part.named_parameters(recurse=False):
            shape = torch.Size(packed.shape) if packed is not None and kind == "weight" else weight.shape
            if len(shape) > 1:
                yield shape, weight.requires_grad


def _used(shape: torch.Size, config: Any) -> int:
    """How many numbers of a weight one token meets; of experts in one tensor those that it is sent to."""
    experts = getattr(config, "num_experts_per_tok", None)
    return shape.numel() * experts // shape[0] if experts and len(shape) == 3 else shape.numel()
