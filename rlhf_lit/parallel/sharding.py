"""Models whose weights are spread over the ranks (FSDP2: ``torch.distributed.fsdp.fully_shard``).

Each decoder layer is a group of its own, gathered for its forward and its backward pass and let go after each. What
stands outside of the layers (embeddings, last norm, LM head) is one group of the model, gathered at the body's forward
and kept until the backward pass or the loop around it ends, since the head is applied in pieces. Gathering is a
collective: **ranks must make the same number of passes**, which ``passes`` brings about; in ``whole`` they are free.

The base model is sharded, not PEFT's wrapper around it, which generation does not go through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf_lit.models.anatomy import decoder_layers, is_wrapped
from rlhf_lit.models.flat import flat_of, piece_of

Part = TypeVar("Part")


def shard(module: nn.Module, mesh: DeviceMesh) -> None:
    """Spread the weights of all transformers models in a module, and of the heads beside them.

    Gradients are added up over the ranks, not averaged: denominators are those of the whole batch.

    Args:
        module: with its models built, all on one device or on the CPU.
        mesh: of the ranks, one-dimensional.
    """
    from transformers import PreTrainedModel

    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    bodies = [getattr(model, model.base_model_prefix, None) for model in models]
    for model in models:
        if getattr(model, "is_quantized", False):
            _as_plain_bytes(model, mesh)
        if not any(model is body for body in bodies):
            _shard_model(model, mesh)
    for part in list(module.modules()):
        if isinstance(part, nn.Linear) and not _is_sharded(part.weight):
            fully_shard(part, mesh=mesh)
    for part in _groups(module):
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    alone = [name for name, weight in module.named_parameters() if weight.requires_grad and not _is_sharded(weight)]
    assert not alone, f"in no shard group, so that nothing would add up its gradients: {alone[0]}"


def _as_plain_bytes(model: nn.Module, mesh: DeviceMesh) -> None:
    """4-bit weights as the bytes they are packed in, which can be cut in any place.

    What was gathered is no ``Params4bit`` any more; bitsandbytes makes it one again, at each forward pass, with the
    constants that its module keeps. Those stay whole on every rank.
    """
    from bitsandbytes.nn import Linear4bit

    for layer in model.modules():
        if isinstance(layer, Linear4bit) and not isinstance(layer.weight, DTensor):
            layer.quant_state.to(mesh.device_type)
            layer.weight = nn.Parameter(layer.weight.data, requires_grad=False)


def _shard_model(model: Any, mesh: DeviceMesh) -> None:
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    if (score := getattr(model, "score", None)) is not None and any(True for _ in score.parameters()):
        fully_shard(score, mesh=mesh, reshard_after_forward=True)  # in float32, whatever the body is in
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    body = getattr(model, model.base_model_prefix)
    if body is model:
        return
    # The body is called without its head: its forward has to gather what both have in common.
    model.forward_body = plain = body.forward
    model.stays_whole = False
    register_fsdp_forward_method(model, "forward_body")

    @functools.wraps(plain)
    def forward(*args: Any, **options: Any) -> Any:
        # Called by the model's own forward, a hook inside a hook would let go of the weights that `whole` keeps.
        return plain(*args, **options) if model.stays_whole else model.forward_body(*args, **options)

    body.forward = forward


def _is_sharded(weight: Tensor) -> bool:
    return isinstance(weight, DTensor)


def _groups(module: nn.Module) -> list[Any]:
    return [part for part in module.modules() if isinstance(part, FSDPModule)]


def is_sharded(module: nn.Module) -> bool:
    """Whether a part of it is, by FSDP2 or FSDP1."""
    return flat_of(module) is not None or any(isinstance(part, FSDPModule) for part in module.modules())


def reshard(module: nn.Module) -> None:
    """Let go of all that was gathered."""
    for part in _groups(module):
        part.reshard()


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """All weights gathered for the time of the block, in which ranks need not keep step. Nothing must learn in it."""
    from transformers import PreTrainedModel

    if flat := flat_of(module):
        with flat.whole():
            yield
        return
    parts = _groups(module)
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
        part.stays_whole = True
    try:
        yield
    finally:
        for part in parts:
            part.stays_whole = False
            part.set_reshard_after_forward(not isinstance(part, PreTrainedModel), recurse=False)
            part.reshard()


def at_hand(module: nn.Module) -> AbstractContextManager[None]:
    """What FSDP1 needs around passes without gradients, and around weights under their own names: all of them whole.
    Nothing else needs it."""
    flat = flat_of(module)
    return flat.whole() if flat else nullcontext()


def passes(module: nn.Module, parts: Iterable[Part], dummy: Callable[[], Part]) -> Iterator[tuple[Part, bool]]:
    """The parts one by one, each with True; then, as long as another rank has more, a dummy with False.

    Where the module is not sharded: its parts alone; under FSDP1 without gradients too, with all weights whole.

    Args:
        module: what makes a pass over each part.
        parts: this rank's.
        dummy: makes a dummy part, whose pass gathers what any other's does.
    """
    if not is_sharded(module):
        yield from ((part, True) for part in parts)
        return
    if flat_of(module) and not torch.is_grad_enabled():
        with at_hand(module):
            yield from ((part, True) for part in parts)
        return
    own = list(parts)
    device = next(module.parameters()).device
    most = torch.tensor(len(own), device=device)
    torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
    for part in own:
        yield part, True
    for _ in range(int(most) - len(own)):
        yield dummy(), False
    reshard(module)


def gathered(value: Tensor, like: Tensor | None = None) -> Tensor:
    """The whole of a weight, or of what is laid out ``like`` one; without a gradient. A collective where it is
    sharded."""
    own = value.detach()
    if piece := piece_of(value if like is None else like):
        return piece.gathered(own)
    return own.full_tensor() if isinstance(own, DTensor) else own


def whole_shape(weight: Tensor) -> torch.Size:
    """The shape of the whole of a weight."""
    piece = piece_of(weight)
    return piece.shape if piece else weight.shape


def whole_weights(model: nn.Module, keep: bool) -> dict[str, Tensor] | None:
    """A model's weights by name, whole, on the CPU; of one inside PEFT's wrapper those that train.

    A collective, ``at_hand``. None where the model is not sharded. One weight at a time stands whole on the device.

    Args:
        model: what is to be saved.
        keep: whether this rank wants them; the others get an empty dict.
    """
    if not is_sharded(model):
        return None
    found: dict[str, Tensor] = {}
    seen: dict[int, Tensor] = {}  # tied weights stay one
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    for name, value in model.state_dict(keep_vars=True).items():
        if is_wrapped(model) and name not in trained:
            continue
        if id(value) not in seen:
            part = gathered(value)
            seen[id(value)] = part.cpu() if keep else part.new_empty(0)
        found[name] = seen[id(value)]
    return found if keep else {}


def spread(value: Tensor, like: Tensor) -> Tensor:
    """This rank's share of a whole tensor, laid out as a weight is; of a weight that is not sharded, all of it."""
    if piece := piece_of(like):
        return piece.share(value)
    if not isinstance(like, DTensor):
        return value
    value = value.to(like.device)
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


@torch.no_grad()
def assign(weight: Tensor, value: Tensor) -> None:
    """Set a weight from a whole tensor, which every rank has."""
    weight.copy_(spread(value, weight))


@torch.no_grad()
def blend(weight: Tensor, other: Tensor, mix: float) -> None:
    """weight ← mix·other + (1 − mix)·weight; a collective under FSDP1."""
    if piece_of(weight):  # the two may be cut in different places
        assign(weight, gathered(weight).lerp(gathered(other).to(weight.dtype), mix))
    else:
        weight.lerp_(other.to(weight.dtype), mix)


def sharding_of(module):  # type: ignore
    from types import SimpleNamespace

    return SimpleNamespace(passes=lambda parts, dummy: passes(module, parts, dummy))
