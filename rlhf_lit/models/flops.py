"""How many floating-point operations the forward passes ask for, and the backward passes after them.

``with count_flops() as counted:`` around a step makes the passes add themselves up: ``models.packing`` counts a body's
pass over sequences, ``models.logprobs`` the LM head at the positions where a log-prob is needed.

Per token a forward pass costs 2 for each weight of a matrix it goes through (a multiplication and an addition), and
attention 4·layers·width for each token attended to: half of the context on average, since it is causal. A backward pass
costs the same again for the gradient of the activations, and once more for that of the weights that are trained: 6N
for a whole model, 4N for a frozen one under adapters, and 6 for each weight of the adapters. (Kaplan et al. 2020, arXiv
2001.08361, §2.1; Chowdhery et al. 2022, "PaLM", arXiv 2204.02311, appendix B.)

A pass made with gradients enabled counts with the backward pass that will follow. Embeddings and scalar heads do not
count. Of a model whose tokens mix in another way than by attention (a state-space model), the matrices alone count.
Nothing counts that depends on how this machine carries the step out: padding, what gradient checkpointing computes
again, or whether a prompt is computed once for several sequences, each of which counts it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from rlhf_lit.models.adapter_names import copied_modules
from rlhf_lit.models.anatomy import adapter_in_force, body_of, unwrapped


@dataclass
class FlopCount:
    """Floating-point operations of the passes made so far.

    Attributes:
        total: float64 scalar on the CPU; None as long as no pass was counted.
        paused: whether passes are left out for now, as on dummy rows.
    """

    total: Tensor | None = None
    paused: bool = False

    def add(self, flops: Tensor) -> None:
        """Count a pass, unless paused."""
        if not self.paused:
            self.total = flops if self.total is None else self.total + flops


_COUNTING: ContextVar[FlopCount | None] = ContextVar("counting", default=None)


@contextmanager
def count_flops() -> Iterator[FlopCount]:
    """Count the passes made inside the block. A block inside another counts for itself alone."""
    token = _COUNTING.set(counted := FlopCount())
    try:
        yield counted
    finally:
        _COUNTING.reset(token)


@contextmanager
def uncounted(when: bool = True) -> Iterator[None]:
    """Leave passes inside the block out of the count: those over dummy rows."""
    counted = _COUNTING.get()
    if counted is None or not when:
        yield
        return
    before, counted.paused = counted.paused, True
    try:
        yield
    finally:
        counted.paused = before


def count_body(model: nn.Module, lengths: Tensor) -> None:
    """Count a pass of sequences through a model's body, if anything counts.

    Args:
        model: what they go through, with the adapter that is in force.
        lengths: [rows] real tokens of each, on the CPU (nothing waits for a device).
    """
    if counted := _COUNTING.get():
        body, _, width = _weights(model, adapter_in_force(model))
        backward = torch.is_grad_enabled()
        real = lengths.double()
        # QKᵀ and the sum over V, 2·width each, over half of the context; both factors of both products ask for
        # gradients.
        attention = real.square().sum() * (2 * width * (3 if backward else 1))
        counted.add(real.sum() * body.flops(backward) + attention)


def count_head(model: nn.Module, positions: int) -> None:
    """Count the LM head at so many positions, if anything counts; arguments as of ``count_body``."""
    if counted := _COUNTING.get():
        _, head, _ = _weights(model, adapter_in_force(model))
        counted.add(torch.tensor(float(positions * head.flops(torch.is_grad_enabled())), dtype=torch.float64))


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


_COUNTED: WeakKeyDictionary[nn.Module, dict[str | None, tuple[Weights, Weights, int]]] = WeakKeyDictionary()


def _weights(model: nn.Module, adapter: str | None) -> tuple[Weights, Weights, int]:
    """Of the body, of the LM head, and layers × width of the attention; counted once for each model and adapter."""
    known = _COUNTED.setdefault(model, {})
    if adapter not in known:
        inner = unwrapped(model)
        config = inner.config.get_text_config()
        body = body_of(inner)
        head = inner.get_output_embeddings()
        known[adapter] = (
            _matrices(body, adapter, config),
            Weights(0, 0) if head is None else _matrices(head, adapter, config),
            sum(_attention_width(layer) for layer in config.per_layer_config),  # Gemma 4's layers differ
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
    idle = set()  # of a module that adapters have copies of, one is in force
    for _, wrapper in copied_modules(module):
        copies: dict[str | None, nn.Module] = dict(wrapper.modules_to_save)
        used = copies.get(adapter, wrapper.original_module)
        idle |= {
            id(p) for copy in (wrapper.original_module, *copies.values()) if copy is not used for p in copy.modules()
        }
    for name, part in module.named_modules():
        if id(part) in idle or isinstance(part, nn.Embedding) or (".lora_" in name and name.split(".")[-1] != adapter):
            continue
        # 4-bit weights are stored as bytes; what they stand for their module knows: a linear layer, or stacked experts.
        packed = getattr(part, "quant_states", {"weight": getattr(part, "quant_state", None)})
        for kind, weight in part.named_parameters(recurse=False):
            shape = torch.Size(packed[kind].shape) if packed.get(kind) is not None else weight.shape
            if len(shape) > 1:
                yield shape, weight.requires_grad


def _used(shape: torch.Size, config: Any) -> int:
    """How many numbers of a weight one token meets; of experts in one tensor those that it is sent to."""
    experts = getattr(config, "num_experts_per_tok", None)
    return shape.numel() * experts // shape[0] if experts and len(shape) == 3 else shape.numel()
