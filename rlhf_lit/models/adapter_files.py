"""The two files of an adapter folder: read whole, put on a model to the last tensor, or refused by name.

peft itself loads what it finds: half of the tensors missing leaves the other half at their start, a target that no
module has is passed over, and a file that holds weights of the base overwrites them under every adapter.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.errors import UserError, and_more, first_line
from rlhf_lit.models.adapter_names import adapter_of, copied_modules, plain_name

PREFIX = "base_model.model."  # before every key of an adapter's file
SCORE = f"{PREFIX}score."
# What language models call their LM head, which a reward model has none of.
LM_HEADS = ("lm_head", "embed_out", "output_projection")

# Fields of a LoRA configuration that the loaded model follows…
FOLLOWED = {
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "modules_to_save", "fan_in_fan_out", "lora_bias",
    "target_parameters", "ensure_weight_tying", "init_lora_weights",
}  # fmt: skip
# …and those that change nothing about a trained adapter. Any other must be at its default.
WITHOUT_EFFECT = {
    "peft_type", "task_type", "auto_mapping", "base_model_name_or_path", "revision", "inference_mode", "peft_version",
    "megatron_core", "qalora_group_size", "loftq_config", "eva_config", "runtime_config",
}  # fmt: skip
# Ways of drawing an adapter that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ, …) subtract from it
# what the adapter starts with, again at each loading.
HARMLESS_INIT = (True, False, "gaussian", "orthogonal", "eva")


def adapter_file(folder: str, revision: str | None) -> str:
    """The file with an adapter's weights, as messages name it."""
    names = ("adapter_model.safetensors", "adapter_model.bin")
    return next((str(Path(folder) / name) for name in names if (Path(folder) / name).is_file()), folder)


def read_config(folder: str, revision: str | None, field: str) -> Any:
    """The LoRA configuration of an adapter folder.

    Args:
        folder: or a hub name.
        revision: of the hub's repository.
        field: the config key that named it, for messages.

    Raises:
        UserError: it is of another method than LoRA, or asks for what would be ignored or would change the base.
    """
    from peft import LoraConfig, PeftConfig, PeftType

    file = f"{folder}/adapter_config.json"
    try:
        config: Any = PeftConfig.from_pretrained(folder, revision=revision)
        raw = PeftConfig.from_json_file(file) if Path(file).is_file() else config.to_dict()
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{field}: {file} cannot be read: {first_line(error)}") from None
    if config.peft_type != PeftType.LORA:
        name = getattr(config.peft_type, "value", config.peft_type)
        raise UserError(f"{field}: {file}: an adapter of kind {name}; only LoRA adapters are trained here")
    known = LoraConfig().to_dict()
    for key, value in raw.items():
        # What a newer peft writes and this one does not know is passed over where it is off.
        neutral = not value if key not in known else value == known[key] or not (value or known[key])
        if key not in FOLLOWED | WITHOUT_EFFECT and not neutral:
            raise UserError(
                f"{field}: {file} sets {key}: {value!r}, which is not supported; merge the adapter with the tool that "
                "made it, and give the whole model"
            )
    if config.init_lora_weights not in HARMLESS_INIT:
        raise UserError(
            f"{field}: {file}: init_lora_weights: {config.init_lora_weights!r} changes the base's own weights, which "
            "every role stands on; save it from peft as plain LoRA (path_initial_model_for_weight_conversion)"
        )
    config.init_lora_weights, config.eva_config = True, None  # each weight comes from the file
    return config


def read_weights(folder: str, revision: str | None, field: str) -> dict[str, Tensor]:
    """The tensors of an adapter's file, on the CPU. Arguments as of ``read_config``.

    Raises:
        UserError: there is none, or it is damaged. Names the file.
    """
    from pickle import UnpicklingError

    from peft import load_peft_weights
    from safetensors import SafetensorError

    file = adapter_file(folder, revision)
    if file == folder and Path(folder).is_dir():
        raise UserError(f"{field}: {folder} has an adapter_config.json, but no adapter_model.safetensors beside it")
    try:
        options = {} if revision is None else {"revision": revision}
        weights: dict[str, Tensor] = load_peft_weights(folder, device="cpu", **options)
    except (OSError, ValueError, RuntimeError, EOFError, SafetensorError, UnpicklingError) as error:
        raise UserError(f"{field}: {file} cannot be read ({first_line(error)}); it is cut short or damaged") from None
    return weights


def trained_modules(modules_to_save: list[str] | None) -> list[str]:
    """The modules that an adapter trains in full, by its configuration, beside a score head."""
    return [name for name in modules_to_save or () if name not in ("score", "classifier")]


def without_copies(config: Any, weights: dict[str, Tensor], modules: Collection[str]) -> dict[str, Tensor]:
    """An adapter's weights without its copies of some modules, which are taken out of its configuration too."""
    copied = [name for name in config.modules_to_save or () if name in modules]
    config.modules_to_save = [name for name in config.modules_to_save or () if name not in copied] or None
    keys = tuple(f"{PREFIX}{name}." for name in copied)
    return {key: weight for key, weight in weights.items() if not key.startswith(keys)}


def without_head(config: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a language model's adapter holds beside its LM head, which a reward model has none of.

    Args:
        config: of the adapter; what it says of the LM head is taken out.
        weights: of its file.
    """
    config.modules_to_save = [name for name in trained_modules(config.modules_to_save) if name not in LM_HEADS]
    if isinstance(config.target_modules, set | list):
        config.target_modules = set(config.target_modules) - set(LM_HEADS)
    heads = tuple(f"{PREFIX}{name}." for name in LM_HEADS)
    return {key: weight for key, weight in weights.items() if not key.startswith(heads)}


def parts_of(model: nn.Module) -> list[str]:
    """The names of a model's modules and parameters, as they are without adapters."""
    named = (*model.named_modules(), *model.named_parameters())
    return [plain_name(name) for name, _ in named]


def require_parts(wrapped: Any, parts: list[str], adapter: str, where: str, field: str) -> None:
    """Every part that an adapter's configuration names must be in the model, and none twice.

    Args:
        wrapped: the model in peft's wrapper.
        parts: of the model before that (``parts_of``).
        adapter: the adapter's name in it.
        where: the file that names the parts, for messages; the config key, where they are our own.
        field: the config key that named the file.

    Raises:
        UserError: one matches nothing, or a module is to be trained in full and by an adapter.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    config = wrapped.peft_config[adapter]
    place = where if where == field else f"{field}: {where}"
    layers = wrapped.get_base_model().config.get_text_config().num_hidden_layers

    def absent(kind: str, name: object) -> UserError:
        return UserError(f"{place}: {kind} names {name!r}, which is nowhere in this model; correct it, or leave it out")

    targets = config.target_modules
    for name in sorted(targets) if isinstance(targets, set | list) else ():
        if not any(path == name or path.endswith(f".{name}") for path in parts):
            raise absent("targets" if where == "base.lora" else "target_modules", name)
    for name in trained_modules(config.modules_to_save):
        if not any(path.endswith(name) for path in parts):
            raise absent("modules_to_save", name)
    for name in config.target_parameters or ():
        if not any(path == name or path.endswith(f".{name}") for path in parts):
            raise absent("target_parameters", name)
    for kind in ("rank_pattern", "alpha_pattern"):
        for name in getattr(config, kind) or ():
            if not any(re.match(rf"(.*\.)?({name})$", path) for path in parts):
                raise absent(kind, name)
    chosen = config.layers_to_transform
    for number in () if chosen is None else [chosen] if isinstance(chosen, int) else chosen:
        if not 0 <= number < layers:
            raise absent("layers_to_transform", number)
    for path, wrapper in copied_modules(wrapped.get_base_model()):
        if any(isinstance(module, BaseTunerLayer) for module in wrapper.modules()):
            raise UserError(
                f"{place}: {path} is to be trained in full (modules_to_save) and by an adapter; name it in one alone"
            )


def put_weights(wrapped: Any, weights: dict[str, Tensor], adapter: str, where: str, field: str) -> None:
    """Give an adapter the weights of a file: each tensor that it has, and each of the file's.

    Args:
        wrapped: the model in peft's wrapper, the adapter in place.
        weights: of the file, by peft's keys.
        adapter: its name in the model.
        where: the file, for messages.
        field: the config key that named it.

    Raises:
        UserError: tensors are missing, left over, of another shape, or of the base and not as in the base.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    config = wrapped.peft_config[adapter]
    own = get_peft_model_state_dict(wrapped, adapter_name=adapter, save_embedding_layers=False)
    # Experts that a file holds one by one are stacked in memory.
    found = convert_peft_adapter_state_dict_for_transformers(wrapped, config, weights, adapter)
    if missing := sorted(own.keys() - found.keys()):
        raise UserError(
            f"{field}: {where} lacks {and_more(missing, 3)} of {len(own)} tensors that its configuration declares: it "
            "is not whole, or of another model"
        )
    for key in sorted(own.keys() & found.keys()):
        if own[key].shape != found[key].shape:
            raise UserError(
                f"{field}: {where} holds {key} of shape {list(found[key].shape)}, and this model with its "
                f"configuration takes {list(own[key].shape)}"
            )
    extra = found.keys() - own.keys()
    _require_base(wrapped, {key: found[key] for key in sorted(extra)}, where, field)
    set_peft_model_state_dict(wrapped, {k: w for k, w in weights.items() if k not in extra}, adapter_name=adapter)


def _require_base(wrapped: Any, extra: dict[str, Tensor], where: str, field: str) -> None:
    """Tensors that are not the adapter's must be the base's, as they are there: peft writes embeddings beside adapters
    on them, or of a vocabulary that was resized."""
    base = {plain_name(name): w for name, w in wrapped.state_dict().items() if adapter_of(name) is None}
    unknown = [key for key in extra if plain_name(key) not in base]
    if unknown:
        raise UserError(
            f"{field}: {where} holds {and_more(unknown, 3)}, which this model with its configuration has no use for"
        )
    for key, weight in extra.items():
        own = base[plain_name(key)]
        if own.shape != weight.shape:
            raise UserError(
                f"{field}: {where} holds {key} of shape {list(weight.shape)}, and the base's is {list(own.shape)}: the "
                "vocabulary was resized for it; merge the adapter with the tool that made it, and give the whole model"
            )
        if not torch.equal(own.cpu(), weight.to(own.dtype)):
            raise UserError(
                f"{field}: {where} holds {key}, a weight of the base, and not as it is in the base; merge the adapter "
                "with the tool that made it, and give the whole model"
            )
