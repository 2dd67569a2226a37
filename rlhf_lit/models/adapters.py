"""Adapters: made anew, or loaded from a folder that another run or another tool left."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from rlhf_lit.errors import UserError, first_line
from rlhf_lit.models.adapter_files import (
    SCORE,
    adapter_file,
    parts_of,
    put_weights,
    read_config,
    read_weights,
    require_parts,
    trained_modules,
    without_head,
)
from rlhf_lit.models.anatomy import without_adapters
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.foundation import Foundation
from rlhf_lit.runs import resolve_model


def adapter_config(base: Base) -> dict[str, Any] | None:
    """The adapter configuration of a folder or hub repository that holds an adapter, else None.

    Raises:
        UserError: the file is damaged. Names it.
    """
    from transformers.utils.peft_utils import find_adapter_config_file

    file = None if base.fresh else find_adapter_config_file(base.folder, revision=base.revision)
    if not file:
        return None
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"base.name: {file} cannot be read: {first_line(error)}") from None
    if not isinstance(found, dict) or "peft_type" not in found:
        raise UserError(f"base.name: {file} is no adapter's configuration: it names no peft_type")
    return cast("dict[str, Any]", found)


def holds_adapter(base: Base) -> bool:
    """Whether a base names an adapter, and no whole model."""
    return adapter_config(base) is not None


def base_of_adapter(base: Base, adapter: dict[str, Any]) -> Base:
    """The base under an adapter: ``base.adapter_base``, or what the adapter says, at the revision that it says.

    Args:
        base: the adapter's folder or hub name.
        adapter: its configuration.

    Raises:
        UserError: it is not there any more, or the adapter names none. Names the file that does.
    """
    file = f"{base.folder}/{'base.json' if Foundation.load(base.folder) else 'adapter_config.json'}"
    name = base.adapter_base or adapter.get("base_model_name_or_path")
    if not name:
        raise UserError(f"base.name: {file} names no base for its adapter; say where it is in base.adapter_base")
    try:
        resolve_model(name)
    except UserError as error:
        if base.adapter_base:
            raise UserError(f"base.adapter_base: {error}") from None
        raise UserError(
            f"base.name: the base of the adapter is gone from where {file} says it was ({error}); say where it is now "
            "in base.adapter_base (export, chat and score: --base); what export writes names the new place"
        ) from None
    # A revision of the adapter's own repository is none of its base's.
    revision = adapter.get("revision") or (base.revision if Path(base.folder).is_dir() else None)
    return replace(base, name=str(name), adapter_base=None, revision=revision)


def with_adapter(model: Any, base: Base, adapter_folder: str | None, weights_folder: str, scorer: bool) -> Any:
    """A model in peft's wrapper, with a new adapter or the one of a folder.

    Args:
        model: frozen.
        base: whose ``lora`` a new adapter is made by.
        adapter_folder: the folder of an adapter to go on with; None for a new one.
        weights_folder: where the model's weights are, as the adapter is to name them.
        scorer: the model is a sequence classifier, whose head trains too.

    Raises:
        UserError: the adapter does not fit the model, is one that cannot be trained here, or its file is not whole.
    """
    from peft import LoraConfig, get_peft_model

    loaded: dict[str, Any] = {}
    if adapter_folder:
        field = "base.name"
        config = read_config(adapter_folder, base.revision, field)
        loaded = read_weights(adapter_folder, base.revision, field)
        if not scorer and any(key.startswith(SCORE) for key in loaded):
            raise UserError(f"base.name: {adapter_folder!r} is a reward model's adapter, no language model's")
        if scorer:
            loaded = without_head(config, loaded)
        where, names = adapter_file(adapter_folder, base.revision), f"{adapter_folder}/adapter_config.json"
    else:
        assert base.lora is not None
        field = where = names = "base.lora"
        config = LoraConfig(
            r=base.lora.rank,
            lora_alpha=base.lora.alpha,  # type: ignore[arg-type, unused-ignore]
            lora_dropout=base.lora.dropout,
            target_modules=base.lora.targets,
            modules_to_save=base.lora.modules_to_save or None,
            exclude_modules=without_adapters(model) if base.lora.targets == "all-linear" else None,
            use_dora=base.lora.dora,
            use_rslora=base.lora.rslora,
            revision=base.revision,
        )
    config.inference_mode = False
    config.task_type = "SEQ_CLS" if scorer else "CAUSAL_LM"
    if scorer:
        config.modules_to_save = [*(config.modules_to_save or []), "score"]
    config.base_model_name_or_path = weights_folder
    parts = parts_of(model)
    for name, weight in model.named_parameters():
        path = name.rpartition(".")[0]
        if hasattr(weight, "quant_state") and any(path.endswith(part) for part in config.modules_to_save or ()):
            raise UserError(f"{names}: modules_to_save names {path}, which is in 4 bits, and those do not train")
    try:
        wrapped = get_peft_model(model, config)
    except (ValueError, TypeError, RuntimeError) as error:
        place = f"{field}: {adapter_folder}" if adapter_folder else field
        raise UserError(f"{place}: {first_line(error)}") from None
    require_parts(wrapped, parts, "default", names, field)
    wrapped.new_adapter = not adapter_folder
    if adapter_folder:
        has_head = any(key.startswith(SCORE) for key in loaded)
        if scorer:
            wrapped.get_base_model().new_head = not has_head
        if scorer and not has_head:
            # A language model's adapter has no head, but peft asks for one: the new one.
            head = wrapped.get_base_model().score.original_module
            loaded |= {f"{SCORE}{name}": weight for name, weight in head.state_dict().items()}
        put_weights(wrapped, loaded, "default", where, field)
    return wrapped


def same_adapter(lora: LoRA, adapter: dict[str, Any]) -> bool:
    """Whether settings describe an adapter that is there."""
    return (
        lora.rank == adapter.get("r", 8)
        and lora.alpha == adapter.get("lora_alpha", 8)
        and (
            lora.modules_to_save is None
            or set(lora.modules_to_save) == set(trained_modules(adapter.get("modules_to_save")))
        )
    )
