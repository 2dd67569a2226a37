"""Names of adapters' weights: which adapter a weight belongs to, and what it is called without one."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn

# …q_proj.lora_A.default.weight, …embed_tokens.lora_embedding_A.default, …norm.modules_to_save.default.weight: the
# adapter's name stands behind the container that peft keeps one entry per adapter in. The last one counts: a module of
# the model may have such a name too.
_CONTAINER = re.compile(r"^(.*\.(?:lora_[A-Za-z_]+|modules_to_save))\.([^.]+)(\..+)?$")


def adapter_of(name: str) -> str | None:
    """The adapter that a weight of this name belongs to; None for the base's."""
    found = _CONTAINER.match(name)
    return found.group(2) if found else None


def of_adapter(name: str, adapter: str) -> str:
    """The name of the same weight in another adapter."""
    found = _CONTAINER.match(name)
    assert found is not None, f"{name} belongs to no adapter"
    return f"{found.group(1)}.{adapter}{found.group(3) or ''}"


def plain_name(name: str) -> str:
    """A base weight's name as it is without adapters around its layer."""
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "original_module"))


def switched_modules(model: nn.Module) -> list[Any]:
    """The modules that act by the adapter in force: layers with adapters, and those that an adapter has a copy of."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)]


def copied_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Path and wrapper of the modules that an adapter has a copy of (``modules_to_save``): none where peft was never
    imported, which takes long."""
    peft: Any = sys.modules.get("peft.utils.other")
    for path, module in model.named_modules() if peft else ():
        if isinstance(module, peft.ModulesToSaveWrapper):
            yield path, module


def file_key(name: str) -> str:
    """The key under which a file holds an adapter's weight (Hu et al.'s matrices, DoRA's magnitudes, whole modules)."""
    found = _CONTAINER.match(name)
    assert found is not None, f"{name} belongs to no adapter"
    container, _, rest = found.groups()
    if container.endswith(".lora_magnitude_vector"):
        return container
    return container.removesuffix(".modules_to_save") + (rest or "")
