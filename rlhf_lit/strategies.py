"""``--trainer.strategy fsdp2``: weights, gradients and optimizer state spread over all ranks (``models.sharding``)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.optim import Optimizer

from rlhf_lit.algorithms.base import Algorithm
from rlhf_lit.errors import UserError
from rlhf_lit.models.sharding import assign, gathered, spread


class FSDP2(ModelParallelStrategy):
    """Fully sharded data parallel, all ranks one group. The models are sharded by ``Algorithm.configure_model``.

    A checkpoint is the one file of any other strategy: the whole weights that move, and the whole optimizer state.
    It resumes under another strategy, and under another number of ranks.

    Args:
        process_group_backend: nccl on GPUs and gloo on the CPU, unless it is set.
        timeout: of a collective.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=process_group_backend,
            timeout=timeout,
        )

    def setup_environment(self) -> None:
        """Lightning's own default would be tensor parallel on one node."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Lightning hands over what a checkpoint holds, as for any strategy."""
        return True

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Every rank reads the whole file."""
        return ParallelStrategy.load_checkpoint(self, self.broadcast(checkpoint_path), weights_only)

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole of the weights that a checkpoint holds, on rank zero; nothing on the others."""
        module = self.lightning_module
        assert isinstance(module, Algorithm)
        kept = module.saved_names()
        found = {}
        for name, weight in module.named_parameters(remove_duplicate=False):
            if name in kept:
                value = gathered(weight.detach())
                if self.is_global_zero:
                    found[name] = value.cpu()
        return found

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """``Algorithm.on_load_checkpoint`` has seen to it that the names are those of this model."""
        module = self.lightning_module
        assert module is not None
        weights = dict(module.named_parameters(remove_duplicate=False))
        for name, value in checkpoint["state_dict"].items():
            assign(weights[name], value)

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
        value = gathered(value)
        return value.cpu() if self.is_global_zero else None

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """This rank's share of a whole state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            shares = {
                number: {
                    name: spread(value, weights[number])
                    if isinstance(value, Tensor) and value.shape == weights[number].shape
                    else value
                    for name, value in values.items()
                }
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shares})


def check(strategy: str) -> None:
    """Refuse FSDP1, whose flat parameters would be added up over the ranks twice.

    Raises:
        UserError: it was asked for.
    """
    if strategy.startswith("fsdp_") or strategy == "fsdp" or "FSDPStrategy" in strategy:
        raise UserError(f"trainer.strategy {strategy}: FSDP1 is not supported; use fsdp2")


StrategyRegistry.register("fsdp2", FSDP2, description=FSDP2.__doc__.splitlines()[0] if FSDP2.__doc__ else "")
