"""``--trainer.strategy fsdp2`` and ``fsdp``: weights, gradients and optimizer state spread over all ranks
(``models.sharding``, ``models.flat``)."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.pytorch.accelerators import CPUAccelerator
from lightning.pytorch.plugins.precision import FSDPPrecision, MixedPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy, ParallelStrategy, StrategyRegistry
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer

from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.errors import UserError
from rlhf_lit.models.flat import flat_of, shard_flat
from rlhf_lit.parallel.sharding import assign, gathered, spread, whole_shape


class _OneFile(ParallelStrategy):
    """What the strategies have in common: a checkpoint is the one file of any other strategy, the whole weights that
    move and the whole optimizer state. It resumes under another strategy, and under another number of ranks."""

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
                value = gathered(weight)
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
        state, weights = optimizer.state_dict(), _weights_of(optimizer)
        whole = {
            number: {name: self._whole(value, weights[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        return {**state, "state": whole} if self.is_global_zero else {}

    def _whole(self, value: Any, weight: Tensor) -> Any:
        if not isinstance(value, Tensor):
            return value
        if value.shape == weight.shape:
            value = gathered(value, weight)
        return value.cpu() if self.is_global_zero else None

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """This rank's share of a whole state."""
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            weights = _weights_of(optimizer)
            shares = {
                number: {
                    name: spread(value, weights[number])
                    if isinstance(value, Tensor) and value.shape == whole_shape(weights[number])
                    else value
                    for name, value in values.items()
                }
                for number, values in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": shares})


def _weights_of(optimizer: Optimizer) -> list[Tensor]:
    """By their numbers in its state."""
    return [weight for group in optimizer.param_groups for weight in group["params"]]


class FSDP2(_OneFile, ModelParallelStrategy):
    """Fully sharded data parallel, all ranks one group. The models are sharded by ``Algorithm.configure_model``.

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


class FSDP1(_OneFile, FSDPStrategy):
    """Fully sharded data parallel by flat parameters (FSDP1), all ranks one group. Rollouts and validation have all
    weights whole, of which ``fsdp2`` does so for sampling alone; and 4-bit bases are for ``fsdp2``.

    Args:
        process_group_backend: nccl on GPUs and gloo on the CPU, unless it is set.
        timeout: of a collective.
    """

    def __init__(
        self, process_group_backend: str | None = None, timeout: timedelta | None = default_pg_timeout
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout)

    @property
    def precision_plugin(self) -> Any:
        """As of any other strategy. Lightning's for FSDP would cast batches and reduce gradients in 16 bits."""
        return self._precision_plugin or Precision()

    @precision_plugin.setter
    def precision_plugin(self, plugin: Precision | None) -> None:
        if isinstance(plugin, FSDPPrecision):
            device = "cpu" if isinstance(self.accelerator, CPUAccelerator) else "cuda"
            known = {"32-true": Precision(), "bf16-mixed": MixedPrecision("bf16-mixed", device)}
            if plugin.precision not in known:
                raise UserError(f"trainer.precision {plugin.precision}: fsdp knows {' and '.join(known)}")
            plugin = known[plugin.precision]
        self._precision_plugin = plugin

    def _setup_model(self, model: Module) -> Module:
        """Lightning would call a training step in the root's forward pass, which our steps have several of."""
        assert isinstance(model, Algorithm)
        if flat_of(model) is None:  # a second `fit` or `validate` finds it spread
            model.to(self.root_device)
            shard_flat(model, next(model.trained_model.parameters()), self.root_device)
        return model


def check(strategy: str) -> None:
    """Refuse Lightning's own FSDP1, whose step would have one backward pass.

    Raises:
        UserError: it was asked for.
    """
    if strategy.startswith("fsdp_") or "FSDPStrategy" in strategy:
        raise UserError(f"trainer.strategy {strategy}: not supported; use fsdp2, or fsdp without options")


for _name, _strategy in {"fsdp2": FSDP2, "fsdp": FSDP1}.items():
    StrategyRegistry.register(_name, _strategy, override=True, description=(_strategy.__doc__ or "").splitlines()[0])
# Lightning refuses its own on a CPU.
FSDPStrategy.get_registered_strategies().remove("fsdp")
