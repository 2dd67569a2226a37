"""``--trainer.strategy fsdp2`` (or ``fsdp``): weights, gradients and optimizer state spread over all ranks
(``parallel.sharding``)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.errors import UserError
from rlhf_lit.parallel.sharding import FSDP2 as Sharded
from rlhf_lit.parallel.sharding import Unsharded, shard, sharding_of


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallel.

    A checkpoint is the one file of any other strategy, with the whole trainable weights and the whole optimizer state.
    It resumes under another strategy, and under another number of ranks.

    Args:
        reshard_after_forward: free a decoder layer's weights after its forward pass and gather them again for its
            backward pass (ZeRO-3). False keeps them in between: a third less to send, and more memory (ZeRO-2).
        cpu_offload: keep weights, gradients and optimizer state in the host's memory, and update them there; a layer's
            weights go to the device as it is gathered.
        replicas: copies of the model, each spread over an equal share of the ranks (hybrid sharding, HSDP). A copy has
            consecutive ranks: with as many replicas as nodes, weights are gathered inside a node.
        process_group_backend: nccl on GPUs and gloo on the CPU, unless it is set.
        timeout: of a collective.

    Raises:
        UserError: fewer than 1 replicas.
    """

    def __init__(
        self,
        reshard_after_forward: bool = True,
        cpu_offload: bool = False,
        replicas: int = 1,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
    ) -> None:
        if replicas < 1:
            raise UserError(f"trainer.strategy.replicas must be at least 1, not {replicas}")
        super().__init__(
            data_parallel_size=1,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )
        self.reshard_after_forward = reshard_after_forward
        self.cpu_offload = cpu_offload
        self.replicas = replicas

    # Setup

    def setup_environment(self) -> None:
        """Lightning's own mesh is data × tensor parallel; this one is replicas × shards.

        Raises:
            UserError: the ranks do not divide by the replicas.
        """
        ranks = self.num_nodes * self.num_processes
        if ranks % self.replicas:
            raise UserError(
                f"trainer.strategy.replicas: {ranks} ranks do not make {self.replicas} replicas of equal size; set it "
                "to a divisor of the number of ranks"
            )
        self._setup_distributed()
        shape = (self.replicas, ranks // self.replicas)
        mesh = init_device_mesh(self.root_device.type, shape, mesh_dim_names=("replica", "shard"))
        self._device_mesh = mesh if self.replicas > 1 else mesh["shard"]

    def _get_process_group_backend(self) -> str:
        """Offloaded weights and gradients are gathered and measured by gloo."""
        backend = super()._get_process_group_backend()
        return f"cpu:gloo,cuda:{backend}" if self.cpu_offload and backend == "nccl" else backend

    @property
    def distributed_sampler_kwargs(self) -> dict[str, Any]:
        """Every rank has rows of its own, whichever replica it belongs to."""
        return {"num_replicas": self.world_size, "rank": self.global_rank}

    def setup(self, trainer: Any) -> None:
        """Shard the models that ``Algorithm.configure_model`` has built."""
        shard(self._module, self.device_mesh, self.reshard_after_forward, self.cpu_offload)
        super().setup(trainer)

    def setup_optimizers(self, trainer: Any) -> None:
        """Raises UserError where the optimizer cannot step shards."""
        if (name := self._module.optimizer_settings.name) != "adamw":
            raise UserError(
                f"model.optimizer.name: {name} knows no sharded weights; set it to adamw, whose state is spread over "
                "the ranks too"
            )
        super().setup_optimizers(trainer)

    def model_to_device(self) -> None:
        """All but the shards, which lie where they belong, on the host if they are offloaded."""
        self._module._apply(lambda value: value if isinstance(value, DTensor) else value.to(self.root_device))
        _update_properties(self._module, device=self.root_device)

    @property
    def _module(self) -> Algorithm:
        assert isinstance(self.lightning_module, Algorithm)
        return self.lightning_module

    # Checkpoints

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over what a checkpoint holds, as for any strategy."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads the whole file."""
        return ParallelStrategy.load_checkpoint(self, self.broadcast(checkpoint_path), weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole weights that a checkpoint holds, on rank zero; nothing on the others."""
        kept, sharding = self._module.saved_names(), self._sharding
        found = {}
        for name, weight in self._module.named_parameters(remove_duplicate=False):
            if name in kept:
                value = sharding.gathered(weight)
                if self.is_global_zero:
                    found[name] = value.cpu()
        return found

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """``Algorithm.on_load_checkpoint`` has seen to it that the names are those of this model."""
        weights, sharding = dict(self._module.named_parameters(remove_duplicate=False)), self._sharding
        for name, value in checkpoint["state_dict"].items():
            sharding.assign(weights[name], value)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """As one process would save it: parameters by their number, whole; empty on other ranks than zero."""
        state = optimizer.state_dict()
        whole = {
            number: {name: self._whole(value) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        return {**state, "state": whole} if self.is_global_zero else {}

    def _whole(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        value = self._sharding.gathered(value)
        return value.cpu() if self.is_global_zero else None

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """This rank's shards of a whole state."""
        sharding = self._sharding
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            shards = {
                number: {
                    name: sharding.spread(value, weights[number])
                    if isinstance(value, Tensor) and value.shape == weights[number].shape
                    else value
                    for name, value in values.items()
                }
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shards})

    @property
    def _sharding(self) -> Unsharded | Sharded:
        return sharding_of(self._module)


def check(strategy: str) -> None:
    """Refuse Lightning's own FSDP1, whose step would have one backward pass.

    Raises:
        UserError: it was asked for.
    """
    if strategy.startswith("fsdp_") or "FSDPStrategy" in strategy:
        raise UserError(
            f"trainer.strategy {strategy}: not supported; use fsdp2 (options: reshard_after_forward, cpu_offload, "
            "replicas)"
        )


for _name in ("fsdp2", "fsdp"):
    StrategyRegistry.register(_name, FSDP2, override=True, description=(FSDP2.__doc__ or "").splitlines()[0])
# Lightning refuses its own on a CPU.
FSDPStrategy.get_registered_strategies().remove("fsdp")
