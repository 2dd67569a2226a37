"""One door to models whose weights are, or are not, spread over the ranks: ``sharding_of(module)``.

FSDP2 (``torch.distributed.fsdp.fully_shard``): each decoder layer is a group of its own, gathered for its forward and
its backward pass and freed after each. The weights outside of the layers (embeddings, last norm, LM head) are one group
of the model, gathered at the body's forward and kept until the backward pass or the loop around it ends, since the head
is applied in pieces. Gathering is a collective: **all ranks must run the same number of passes**, which
``FSDP2.passes`` brings about; inside ``FSDP2.whole`` each may run as many as it likes.

The base model is sharded, not PEFT's wrapper around it, which generation does not go through.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.fsdp import OffloadPolicy as NoOffload
from torch.distributed.tensor import DTensor, distribute_tensor

from rlhf_lit.models.anatomy import body_of, decoder_layers, is_wrapped

Part = TypeVar("Part")


class Unsharded:
    """A module whose weights are whole on every rank: one process, or DDP.

    Args:
        module: the algorithm, or a part of it.
    """

    is_sharded = False

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def passes(self, parts: Iterable[Part], dummy: Callable[[], Part]) -> Iterator[tuple[Part, bool]]:
        """The parts one by one, each with True; ranks may have different numbers of them."""
        for part in parts:
            yield part, True

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Nothing to gather."""
        yield

    def reshard(self) -> None:
        """Nothing to free."""

    def gathered(self, value: Tensor) -> Tensor:
        """The value itself, without a gradient."""
        return value.detach()

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        """The value itself."""
        return value

    @torch.no_grad()
    def assign(self, weight: Tensor, value: Tensor) -> None:
        """Set a weight."""
        weight.copy_(value)

    def whole_weights(self, keep: bool) -> dict[str, Tensor] | None:
        """None: the weights are whole where they are."""
        return None

    def sum_gradients(self, weights: list[nn.Parameter]) -> None:
        """Sum the weights' gradients over the ranks; a missing one counts as 0, so that the optimizer counts the same
        steps on all ranks."""
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return
        for weight in weights:
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(weight.grad)

    def clip_grad_norm(self, weights: list[nn.Parameter], limit: float) -> Tensor:
        """Clip the weights' gradients to a global L2 norm, and return the norm before."""
        return nn.utils.clip_grad_norm_(weights, limit)


class FSDP2:
    """A module of whose weights each rank holds a shard; methods as of ``Unsharded``.

    Methods that gather are collectives: all ranks must call them.

    Args:
        module: the algorithm, or a part of it.
        groups: the parts of the module that are gathered as one.
    """

    is_sharded = True

    def __init__(self, module: nn.Module, groups: list[Any]) -> None:
        self.module = module
        self._groups = groups

    def passes(self, parts: Iterable[Part], dummy: Callable[[], Part]) -> Iterator[tuple[Part, bool]]:
        """The parts one by one, each with True; then a dummy with False for as long as another rank has more parts, so
        that all ranks run the same number of passes.

        Args:
            parts: this rank's.
            dummy: makes a dummy part, whose pass gathers the same weights as any other's.
        """
        own = list(parts)
        most = torch.tensor(len(own), device=self._device)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        for part in own:
            yield part, True
        for _ in range(int(most) - len(own)):
            yield dummy(), False
        self.reshard()

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All weights gathered inside the block, where ranks may run different numbers of passes. Nothing may be
        trained in it."""
        for group in self._groups:
            group.set_reshard_after_forward(False, recurse=False)
            group.unshard()
            group.stays_whole = True
        try:
            yield
        finally:
            for group in self._groups:
                group.stays_whole = False
                group.set_reshard_after_forward(group.reshards_after_forward, recurse=False)
                group.reshard()

    def reshard(self) -> None:
        """Free all weights that are gathered."""
        for group in self._groups:
            group.reshard()

    def gathered(self, value: Tensor) -> Tensor:
        """The whole of a weight or of its optimizer state, without a gradient; on the CPU where it is offloaded."""
        own = value.detach()
        return own.full_tensor() if isinstance(own, DTensor) else own

    def spread(self, value: Tensor, like: Tensor) -> Tensor:
        """This rank's shard of a whole tensor, laid out and placed as a weight is; no collective."""
        if not isinstance(like, DTensor):
            return value
        return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None).to(like.device)

    @torch.no_grad()
    def assign(self, weight: Tensor, value: Tensor) -> None:
        """Set a weight from a whole tensor, which every rank has. The next pass gathers it anew; so ``weight`` must be
        the shard (``reshard`` before it is looked up), not a gathered copy."""
        weight.copy_(self.spread(value, weight))
        self.reshard()

    def whole_weights(self, keep: bool) -> dict[str, Tensor] | None:
        """The weights by name, whole, on the CPU; of a model in PEFT's wrapper the trainable ones. They are gathered
        one at a time.

        Args:
            keep: whether this rank wants them; the others get an empty dict.
        """
        found: dict[str, Tensor] = {}
        seen: dict[int, Tensor] = {}  # tied weights stay one
        trained = {name for name, weight in self.module.named_parameters() if weight.requires_grad}
        for name, value in self.module.state_dict(keep_vars=True).items():
            if is_wrapped(self.module) and name not in trained:
                continue
            if id(value) not in seen:
                part = self.gathered(value)
                seen[id(value)] = part.cpu() if keep else part.new_empty(0)
            found[name] = seen[id(value)]
        return found if keep else {}

    def sum_gradients(self, weights: list[nn.Parameter]) -> None:
        """Nothing to do: the backward pass sums them as it cuts them into shards."""

    def clip_grad_norm(self, weights: list[nn.Parameter], limit: float) -> Tensor:
        """The norm is that of the whole gradient, on the device also where gradients are offloaded."""
        return self.gathered(nn.utils.clip_grad_norm_(weights, limit)).to(self._device)

    @property
    def _device(self) -> str:
        """The kind of device that computes, and on which ranks talk; offloaded weights lie elsewhere."""
        device: str = self._groups[0].computes_on
        return device


def sharding_of(module: nn.Module) -> Unsharded | FSDP2:
    """How the weights of a module lie on the ranks."""
    groups = [part for part in module.modules() if isinstance(part, FSDPModule)]
    return FSDP2(module, groups) if groups else Unsharded(module)


@dataclass(frozen=True)
class _Groups:
    """How groups of weights are made.

    Attributes:
        mesh: of the ranks: one-dimensional, or replicas × shards.
        reshard_after_forward: whether a decoder layer is freed between its forward and its backward pass.
        offload: where shards lie while they are not needed.
    """

    mesh: DeviceMesh
    reshard_after_forward: bool
    offload: NoOffload

    def add(self, part: Any, reshard_after_forward: bool) -> None:
        """Make one, of a module's weights that are in no group yet."""
        fully_shard(part, mesh=self.mesh, reshard_after_forward=reshard_after_forward, offload_policy=self.offload)
        part.reshards_after_forward = reshard_after_forward
        part.computes_on = self.mesh.device_type
        part.stays_whole = False
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)  # gloo knows no other


def shard(module: nn.Module, mesh: DeviceMesh, reshard_after_forward: bool = True, cpu_offload: bool = False) -> None:
    """Spread the weights of all transformers models in a module, and of the heads beside them, over the ranks. Does
    nothing the second time.

    Gradients are summed over all ranks, not averaged: denominators are those of the whole batch.

    Args:
        module: with its models built, all on one device or on the CPU.
        mesh: of the ranks: one-dimensional, or replicas × shards, each replica made of as many shards.
        reshard_after_forward: free a decoder layer after its forward pass, and gather it again for the backward pass.
        cpu_offload: keep the shards of weights, gradients and optimizer state in the host's memory.
    """
    from transformers import PreTrainedModel

    if sharding_of(module).is_sharded:
        return
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else NoOffload()
    groups = _Groups(mesh, reshard_after_forward, offload)
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    bodies = [body for model in models if (body := body_of(model)) is not model]
    for model in models:
        if getattr(model, "is_quantized", False):
            _as_plain_bytes(model, mesh)
        if not any(model is body for body in bodies):
            _shard_model(model, groups)
    for part in list(module.modules()):
        if isinstance(part, nn.Linear) and not isinstance(part.weight, DTensor):
            groups.add(part, reshard_after_forward)
    alone = [name for name, w in module.named_parameters() if w.requires_grad and not isinstance(w, DTensor)]
    assert not alone, f"in no shard group, so that nothing would sum its gradients: {alone[0]}"


def _as_plain_bytes(model: nn.Module, mesh: DeviceMesh) -> None:
    """4-bit weights as the bytes they are packed in, which can be cut in any place.

    A gathered weight is no ``Params4bit`` any more; bitsandbytes makes it one again, at each forward pass, with the
    constants that its module keeps (``models.experts`` likewise). Those stay whole on every rank.
    """
    for layer in model.modules():
        for name, weight in list(layer.named_parameters(recurse=False)):
            if (state := getattr(weight, "quant_state", None)) is not None:
                state.to(mesh.device_type)
                layer.register_parameter(name, nn.Parameter(weight.data, requires_grad=False))


def _shard_model(model: Any, groups: _Groups) -> None:
    for layer in decoder_layers(model):
        groups.add(layer, groups.reshard_after_forward)
    if (score := getattr(model, "score", None)) is not None and any(True for _ in score.parameters()):
        groups.add(score, groups.reshard_after_forward)  # in float32, whatever the body is in
    groups.add(model, False)
    body = body_of(model)
    if body is model:
        return
    # The body is called without its head: its forward has to gather the weights that both have in common.
    model.forward_body = plain = body.forward
    register_fsdp_forward_method(model, "forward_body")

    @functools.wraps(plain)
    def forward(*args: Any, **options: Any) -> Any:
        # Called by the model's own forward, a hook inside a hook would free the weights that `whole` keeps.
        return plain(*args, **options) if model.stays_whole else model.forward_body(*args, **options)

    body.forward = forward
