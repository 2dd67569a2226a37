"""Models whose weights are spread over the ranks by FSDP1 (``torch.distributed.fsdp.FullyShardedDataParallel``).

Each decoder layer is a unit, gathered for its forward and its backward pass; the algorithm around them is another, of
all that stands outside of the layers. A pass of the algorithm is one micro-batch's share of the loss, with the LM head
in it and everything else that reads a weight (``drawn``): outside of one, FSDP1 has nothing gathered. What is computed
without gradients therefore has all weights whole (``Flat.whole``).

A unit's weights are pieces of one flat tensor, of which each rank holds a stretch: a whole weight, a part, or nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy

from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import decoder_layers

# What FSDP1 puts between the names of a unit and of what is in it.
UNIT = "_fsdp_wrapped_module"


class HasLoss(Protocol):
    """What a pass gives."""

    @property
    def loss(self) -> Tensor: ...


Given = TypeVar("Given", bound=HasLoss)


class Flat:
    """An algorithm's models under FSDP1.

    Attributes:
        root: around the algorithm's unit. It holds no weights itself: FSDP1 lets a root keep what it gathered until the
            next backward pass, and an optimizer step may come before that.
        is_whole: whether all weights are gathered for now.
    """

    def __init__(self, root: FullyShardedDataParallel) -> None:
        self.root = root
        self.is_whole = False

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights gathered for the time of the block, in which ranks need not keep step. Nothing must learn in it;
        what is written to a weight is gone afterwards."""
        if self.is_whole:
            yield
            return
        # A unit's forward would let go of its weights: the modules in them are called in their place.
        units = [
            (parent, name, unit)
            for parent in self.root.modules()
            for name, unit in parent.named_children()
            if isinstance(unit, FullyShardedDataParallel)
        ]
        with FullyShardedDataParallel.summon_full_params(self.root, writeback=False):
            self.is_whole = True
            for parent, name, unit in units:
                setattr(parent, name, unit.module)
            try:
                yield
            finally:
                self.is_whole = False
                for parent, name, unit in units:
                    setattr(parent, name, unit)

    @torch.no_grad()
    def clip_grad_norm(self, weights: list[nn.Parameter], limit: float) -> Tensor:
        """Clip the weights' gradients, of which each rank has its pieces, to an L2 norm over all ranks.

        Returns:
            The norm before, in float32. (torch's own wants one dtype, but heads are in float32 whatever a model is in.)
        """
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        square = torch.stack([gradient.float().square().sum() for gradient in gradients]).sum()
        dist.all_reduce(square)
        norm = square.sqrt()
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # as torch.nn.utils.clip_grad_norm_ has it
        for gradient in gradients:
            gradient.mul_(scale)
        return norm


@dataclass(frozen=True)
class Piece:
    """What of a weight stands where.

    Attributes:
        flat: what it belongs to.
        shape: of the whole weight.
        sizes: how many of its numbers each rank holds, in the order of the weight.
    """

    flat: Flat
    shape: torch.Size
    sizes: tuple[int, ...]

    def gathered(self, own: Tensor) -> Tensor:
        """This rank's numbers → the whole weight. A collective."""
        if self.flat.is_whole:
            return own
        padded = own.new_zeros(max(self.sizes))
        padded[: own.numel()] = own.reshape(-1)
        every = [torch.empty_like(padded) for _ in self.sizes]
        dist.all_gather(every, padded)
        return torch.cat([part[:size] for part, size in zip(every, self.sizes, strict=True)]).view(self.shape)

    def share(self, value: Tensor) -> Tensor:
        """The whole weight → this rank's numbers."""
        if self.flat.is_whole:
            return value
        return value.reshape(-1).split(self.sizes)[dist.get_rank()].clone()  # the whole may go


def piece_of(weight: Tensor) -> Piece | None:
    """Of a weight under FSDP1; None of any other."""
    return getattr(weight, "piece", None)


def flat_of(module: nn.Module) -> Flat | None:
    """What a module under FSDP1 belongs to; None for any other."""
    return module.__dict__.get("flat")


def plain_name(name: str) -> str:
    """A weight's or module's name as it is without FSDP1."""
    return ".".join(part for part in name.split(".") if part != UNIT)


def shard_flat(algorithm: nn.Module, outer: nn.Parameter, device: torch.device) -> None:
    """Spread the weights of an algorithm's models over the ranks, if there are several (FSDP1 spreads nothing on one).
    Gradients are added up over them, not averaged.

    Args:
        algorithm: with its models built, on the device. Its forward calls what it is given (see ``drawn``).
        outer: a weight with the dtype of most that stands outside of the decoder layers.
        device: this rank's.

    Raises:
        UserError: there are weights that FSDP1 cannot spread.
    """
    for name, weight in algorithm.named_parameters():
        if not weight.is_floating_point():
            raise UserError("trainer.strategy fsdp: FSDP1 cannot spread 4-bit weights; use fsdp2")
        if "lora_magnitude_vector" in name or "lora_embedding_" in name:
            raise UserError(
                "trainer.strategy fsdp: FSDP1 cannot spread DoRA's weights, nor adapters of embeddings, which are read "
                "from outside of their modules; use ddp"
            )
    if dist.get_world_size() == 1:
        return
    weights = dict.fromkeys(algorithm.parameters())
    shapes = [weight.shape for weight in weights]
    modules = list(algorithm.modules())
    units = {algorithm, *_units(algorithm, outer.dtype)}
    root = FullyShardedDataParallel(
        nn.Sequential(algorithm),
        auto_wrap_policy=CustomPolicy(lambda module: module in units),
        device_id=device,
        use_orig_params=True,
    )
    root.register_comm_hook(None, _add_up)
    flat = Flat(root)
    for module in modules:
        module.flat = flat  # type: ignore[assignment]
    sizes: list[list[int]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(sizes, [weight.numel() for weight in weights])
    for weight, shape, held in zip(weights, shapes, zip(*sizes, strict=True), strict=True):
        weight.piece = Piece(flat, shape, held)  # type: ignore[attr-defined]


def _units(algorithm: nn.Module, outer: torch.dtype) -> Iterator[nn.Module]:
    """Decoder layers; and the single modules that are of another dtype than what is around them, which one unit cannot
    hold, or that train within what is frozen, since gradients are made for a whole unit."""
    from transformers import PreTrainedModel

    models = [part for part in algorithm.modules() if isinstance(part, PreTrainedModel)]
    layers = [layer for model in models for layer in decoder_layers(model)]
    yield from layers
    around = {part: next(layer.parameters()).dtype for layer in layers for part in layer.modules()}
    adapted = any(len({weight.requires_grad for weight in model.parameters()}) > 1 for model in models)
    for part in algorithm.modules():
        own = list(part.parameters(recurse=False))
        if own and not any(True for _ in part.children()):
            trains = any(weight.requires_grad for weight in own)
            if (adapted and trains) or own[0].dtype != around.get(part, outer):
                yield part


def _add_up(state: Any, whole: Tensor, own: Tensor) -> None:
    """The sum over the ranks: denominators are those of the whole batch."""
    reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # its name before 2.13
    reduce_scatter(own, whole)


def drawn(module: nn.Module, shares: Iterator[Given]) -> Iterator[Given]:
    """The shares one by one; of a module under FSDP1 each in a pass of the root, which gathers what it reads."""
    flat = flat_of(module)
    if flat is None:
        yield from shares
        return
    found: list[Given] = []

    def draw() -> Tensor | None:
        found[:] = itertools.islice(shares, 1)
        return found[0].loss if found else None

    call: Callable[..., Any] = flat.root
    while True:
        call(draw)
        if not found:
            return
        yield found[0]
