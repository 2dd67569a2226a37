"""What was saved is what was trained: a folder's files against the model in memory, to the bit.

Tensors of the files are read one at a time, and weights that lie on several ranks are gathered one at a time: no second
model comes to be. Names are asked of the class that loads them, on the meta device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.errors import UserError, first_line
from rlhf_lit.models.adapter_files import FOLLOWED
from rlhf_lit.models.adapter_names import adapter_of, file_key, plain_name
from rlhf_lit.models.anatomy import is_wrapped, unwrapped
from rlhf_lit.models.foundation import Foundation
from rlhf_lit.models.heads import reward_bias
from rlhf_lit.models.scorers import stored_bias
from rlhf_lit.parallel.sharding import sharding_of

# Of a model's configuration: what saving itself writes, and what generation and classification read, no weights.
NOT_COMPARED = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "bos_token_id", "eos_token_id",
    "pad_token_id", "id2label", "label2id", "problem_type", "use_cache", "reward_bias", "output_hidden_states",
}  # fmt: skip


class _Differs(Exception):
    """A difference, in words."""


def require_same(model: nn.Module, folder: Path) -> None:
    """Refuse a folder whose weights are not those of the model in memory; on all ranks, or on none.

    Args:
        model: a transformers model, or one in peft's wrapper, whose adapter ``default`` was saved.
        folder: where it was saved to.

    Raises:
        UserError: they differ. Names the tensor.
    """
    if fault := difference(model, folder):
        raise UserError(f"{folder}: what was saved is not the model in memory: {fault}")


@torch.no_grad()
def difference(model: nn.Module, folder: Path | None) -> str | None:
    """What differs between a folder and the model in memory, by the name of the first tensor; None if nothing does.

    A collective where weights lie on several ranks: all must call it.

    Args:
        model: as of ``require_same``.
        folder: where it was saved to; None on a rank that only helps to gather, which is told nothing.
    """
    with ExitStack() as opened:
        fault: str | None = None
        check: _Check | None = None
        if folder is not None:
            try:
                check = (_AdapterCheck if is_wrapped(model) else _ModelCheck)(model, folder, opened)
            except (_Differs, OSError, ValueError, RuntimeError, KeyError) as error:
                fault = first_line(error)
        for names, weights in _gathered(model):
            if check is not None and fault is None:
                try:
                    check.compare(names, weights)
                except (_Differs, OSError, RuntimeError) as error:
                    fault = first_line(error)
        if check is not None and fault is None:
            try:
                check.finish()
            except (_Differs, OSError, ValueError, RuntimeError) as error:
                fault = first_line(error)
        return fault


def _gathered(model: nn.Module) -> Iterator[tuple[list[list[str]], list[Tensor]]]:
    """The weights that a file is to hold, whole, with all names of each (tied ones have several): one at a time, or a
    layer at a time where files hold them in another form."""
    sharding = sharding_of(model)
    sharding.reshard()
    inner = unwrapped(model)
    converted = not is_wrapped(model) and _converts(inner)
    names: dict[int, list[str]] = {}
    held: dict[int, Tensor] = {}
    for name, weight in model.state_dict(keep_vars=True).items():
        if isinstance(weight, Tensor):
            names.setdefault(id(weight), []).append(name)
            held[id(weight)] = weight
    groups: dict[str, list[int]] = {}
    for key, found in names.items():
        if is_wrapped(model) and not _in_file(found[0], held[key]):
            continue
        layer = re.match(r"^.*?\.\d+\.", found[0])
        groups.setdefault(layer.group() if converted and layer else found[0], []).append(key)
    for keys in groups.values():
        yield [names[key] for key in keys], [sharding.gathered(held[key]) for key in keys]


def _in_file(name: str, weight: Tensor) -> bool:
    """Whether an adapter's file is to hold a weight: those of the adapter, and whatever of the base trains."""
    owner = adapter_of(name)
    return owner == "default" or (owner is None and weight.requires_grad)


def _converts(inner: Any) -> bool:
    """Whether files hold the weights of a model in another form than memory (experts one by one)."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    return bool(getattr(inner, "_weight_conversions", None) or get_model_conversion_mapping(inner, add_legacy=False))


class _Files:
    """The tensors of a folder's safetensors files, and which of them were asked for."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        from safetensors import SafetensorError, safe_open

        self._places: dict[str, Any] = {}
        self._used: set[str] = set()
        for path in sorted(folder.glob("*.safetensors")):
            try:
                file = opened.enter_context(safe_open(path, framework="pt"))
            except SafetensorError as error:
                raise _Differs(f"{path.name} cannot be read ({first_line(error)})") from None
            self._places |= dict.fromkeys(file.keys(), file)
        if not self._places:
            raise _Differs("it holds no safetensors file")

    def __contains__(self, key: str) -> bool:
        return key in self._places

    def left(self) -> set[str]:
        """The keys that nothing was compared with."""
        return self._places.keys() - self._used

    def require(self, key: str, weight: Tensor) -> None:
        """Compare a tensor of the files with a weight, to the bit, in the dtype that it was written in."""
        stored: Tensor = self._places[key].get_tensor(key)
        self._used.add(key)
        if stored.shape != weight.shape:
            raise _Differs(f"{key} has shape {list(stored.shape)}, and in memory {list(weight.shape)}")
        own = weight.detach().to("cpu", stored.dtype)
        if not _bytes(stored).equal(_bytes(own)):
            apart = float((stored.double() - own.double()).abs().max())
            raise _Differs(f"{key} is up to {apart:.3g} away from the one in memory")


def _bytes(weight: Tensor) -> Tensor:
    """A tensor's bits; a nan is then equal to itself."""
    return weight.contiguous().reshape(-1).view(torch.uint8)


class _Check:
    """Files and configuration of a folder, against a model."""

    def __init__(self, folder: Path, opened: ExitStack) -> None:
        self.files = _Files(folder, opened)

    def compare(self, names: list[list[str]], weights: list[Tensor]) -> None:
        """Compare weights with what the files hold under one of their names, and under each other of them too.

        Args:
            names: of each, all that it has.
            weights: whole.
        """
        raise NotImplementedError

    def finish(self) -> None:
        """After all weights: whether the files hold more than those."""
        if left := sorted(self.files.left()):
            raise _Differs(f"{left[0]} is in the file and not in the model")


class _ModelCheck(_Check):
    def __init__(self, model: Any, folder: Path, opened: ExitStack) -> None:
        super().__init__(folder, opened)
        self.inner = model
        self._unsaved = set(model._keys_to_ignore_on_save or ())
        _same_settings(_plain(type(model.config).from_pretrained(folder)), _plain(model.config), NOT_COMPARED, "config")
        _same_bias(model, folder)
        self.folder = folder

    def compare(self, names: list[list[str]], weights: list[Tensor]) -> None:
        from transformers.core_model_loading import revert_weight_conversion

        for alias in range(max(len(own) for own in names)):
            state = {own[alias]: w for own, w in zip(names, weights, strict=True) if alias < len(own)}
            for key, weight in revert_weight_conversion(self.inner, state).items():
                if key in self.files:
                    self.files.require(key, weight)
                elif alias == 0 and not self._excused(key, names):
                    raise _Differs(f"{key} is not in the file")

    def finish(self) -> None:
        super().finish()
        # By the class that loads it, without weights. Of a key that it declares ignorable it says nothing.
        _, found = type(self.inner).from_pretrained(
            self.folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
        for kind, words in (
            ("missing_keys", "not in the file"),
            ("unexpected_keys", "in the file and not in the model"),
        ):
            if keys := sorted(found[kind]):
                raise _Differs(f"{keys[0]} is {words}")
        if mismatched := sorted(found["mismatched_keys"]):
            name, stored, own = mismatched[0]
            raise _Differs(f"{name} has shape {list(stored)}, and in memory {list(own)}")

    def _excused(self, key: str, names: list[list[str]]) -> bool:
        """Whether a key may be missing: the class does not save it, or its twin is there."""
        own = next((own for own in names if key in own), [])
        return key in self._unsaved or any(name in self.files for name in own)


class _AdapterCheck(_Check):
    def __init__(self, model: Any, folder: Path, opened: ExitStack) -> None:
        from peft import PeftConfig

        super().__init__(folder, opened)
        config, stored = model.peft_config["default"], PeftConfig.from_pretrained(str(folder))
        every = {**config.to_dict(), **stored.to_dict()}
        _same_settings(stored.to_dict(), config.to_dict(), every.keys() - FOLLOWED, "adapter_config")
        _same_bias(unwrapped(model), folder)
        if Foundation.load(str(folder)) != model.foundation:
            raise _Differs("base.json names another base")
        # peft writes the embeddings of the base beside an adapter on them.
        base = {plain_name(name): w for name, w in model.state_dict(keep_vars=True).items() if adapter_of(name) is None}
        own = {file_key(name) for name, _ in model.named_parameters() if adapter_of(name) == "default"}
        for key in self.files.left() - own:
            if isinstance(weight := base.get(plain_name(key)), Tensor):
                self.files.require(key, weight)

    def compare(self, names: list[list[str]], weights: list[Tensor]) -> None:
        for own, weight in zip(names, weights, strict=True):
            keys = [file_key(name) for name in own if adapter_of(name) == "default"]
            found = [key for key in keys if key in self.files]
            if not found:
                raise _Differs(f"{keys[0] if keys else own[0]} is not in the file")
            for key in found:
                self.files.require(key, weight)


def _same_bias(inner: Any, folder: Path) -> None:
    """The constant that is added to a reward model's scores."""
    stored = stored_bias(str(folder))
    if stored is not None and stored != reward_bias(inner):
        raise _Differs(f"reward.json holds the bias {stored}, and the model {reward_bias(inner)}")


def _same_settings(stored: dict[str, Any], own: dict[str, Any], but: Any, file: str) -> None:
    for key, value in own.items():
        if key not in but and _ordered(stored.get(key)) != _ordered(value):
            raise _Differs(f"{file}.json says {key}: {stored.get(key)!r}, and the model {value!r}")


def _ordered(value: Any) -> Any:
    """A setting to compare: what has no order in one and some in the other by its sorted elements, nothing as None."""
    return sorted(value, key=str) if isinstance(value, set | list | tuple) and value else value or None


def _plain(config: Any) -> dict[str, Any]:
    """A configuration as a file holds it."""
    found: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return found
