"""Bytes in use, by counting live tensors or by a CUDA device's allocator."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Self

import psutil  # type: ignore[import-untyped]  # peft needs it too
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, by their storages, while it is in force.

    Every operation's results pass through ``__torch_dispatch__``; a storage is counted once, whatever looks at it
    (views, saved activations, gradients), until its memory is given back. Exact for what torch hands out as a tensor in
    this thread; blind to an operation's own scratch space, and to tensors made before unless they are shown to ``see``.

    Args:
        device: its type, for the name.

    Attributes:
        live, peak: bytes now, and at most since ``reset``.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.name = f"{device} (tensors counted)"
        self.limit: int | None = None
        self._exceeded = False
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    @property
    def room(self) -> int:
        """Bytes of the machine's memory that are free now."""
        return int(psutil.virtual_memory().available)

    def reset(self) -> None:
        """Forget the peak; what is alive stays counted."""
        self.peak = self.live

    def restrict(self, limit: int) -> None:
        """Raise as a full device does, once, when more than this was alive."""
        self.limit, self._exceeded = limit, False

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made elsewhere.

        Raises:
            torch.OutOfMemoryError: more than the limit is alive.
        """
        for tensor in tensors:
            if tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        self._exceeded |= self.limit is not None and self.live > self.limit
        # Raised in the middle of a backward pass it would leave the graph behind: then it waits for the next operation.
        if self._exceeded and torch._C._current_graph_task_id() == -1:
            allowed, self.limit, self._exceeded = self.limit, None, False  # once: cleaning up needs a little too
            raise torch.OutOfMemoryError(f"more than the {allowed} bytes that are allowed were alive")

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._sizes:
            self._sizes[address] = 0
            # The Python object lives as long as its memory, also where only the autograd graph holds it.
            weakref.finalize(storage, self._forget, address).atexit = False
        self.live += size - self._sizes[address]  # a storage may have been resized since
        self._sizes[address] = size

    def _forget(self, address: int) -> None:
        self.live -= self._sizes.pop(address)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


class CudaBytes:
    """The same of a CUDA device, from its allocator.

    Args:
        device: which.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = torch.cuda.get_device_name(device)

    def __enter__(self) -> Self:
        self.reset()
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.empty_cache()

    @property
    def room(self) -> int:
        """Bytes of the whole device."""
        return torch.cuda.get_device_properties(self.device).total_memory

    @property
    def peak(self) -> int:
        """Bytes at most since ``reset``."""
        return torch.cuda.max_memory_allocated(self.device)

    def reset(self) -> None:
        """Forget the peak."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def restrict(self, limit: int) -> None:
        """Let this process have no more than so many bytes, as if the card were smaller."""
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / self.room), self.device)

    def see(self, tensors: Iterable[Tensor]) -> None:
        """The allocator has seen them."""


Gauge = LiveBytes | CudaBytes


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that a module holds: parameters, buffers, and the constants of 4-bit weights."""
    for name, parameter in module.named_parameters():
        yield name, parameter
        yield from ((name, constant) for constant in _constants(getattr(parameter, "quant_state", None)))
    yield from module.named_buffers()


def _constants(state: Any) -> Iterator[Tensor]:
    """The tensors of bitsandbytes' ``QuantState``, which holds another one where its constants are quantised too."""
    for value in vars(state).values() if state is not None else ():
        if isinstance(value, Tensor):
            yield value
        elif type(value) is type(state):
            yield from _constants(value)
