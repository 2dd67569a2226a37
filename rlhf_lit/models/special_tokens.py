"""Special tokens in a saved model's files, by which other readers stop, pad and begin."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from rlhf_lit.files import write_json
from rlhf_lit.models.anatomy import stop_ids, unwrapped

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
# Settings of a generation config that transformers reads while sampling alone, or in beam search alone. Beside
# `do_sample: false` or a single beam they are ignored, and whoever saves such a config again is refused.
SAMPLING_ONLY = ("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
BEAMS_ONLY = ("early_stopping", "length_penalty")


def write_special_tokens(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Bring a saved model's ``config.json`` and ``generation_config.json`` into line with its tokenizer.

    The tokenizer's EOS, which closes every answer in training, comes first among the stop tokens; those that the base
    names stay. Beside an adapter, which has no ``config.json``, the generation config is written alone: peft takes its
    base's unless it is given this one.

    Args:
        model: as it was saved; left as it is.
        tokenizer: its tokenizer, with EOS.
        folder: the saved model's.
    """
    stops = stop_ids(tokenizer, model)
    if (folder / CONFIG).is_file():
        settings = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        for part in _language_parts(settings):
            _name_tokens(part, tokenizer, stops)
        write_json(folder / CONFIG, settings)
    if getattr(unwrapped(model), "generation_config", None) is not None:
        _generation_config(unwrapped(model).generation_config, tokenizer, stops).save_pretrained(folder)


def _language_parts(settings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A model's configuration, and that of the language model inside it where it has several parts."""
    yield settings
    for name in ("text_config", "language_config", "llm_config"):
        if isinstance(inner := settings.get(name), dict):
            yield inner


def _name_tokens(settings: dict[str, Any], tokenizer: Any, stops: tuple[int, ...]) -> None:
    """Put the tokenizer's special tokens into a model's configuration."""
    eos, own = stops[0], settings.get("eos_token_id")
    settings["eos_token_id"] = list(dict.fromkeys([eos, *own])) if isinstance(own, list) else eos
    if tokenizer.bos_token_id is not None:
        settings["bos_token_id"] = tokenizer.bos_token_id
    # The row of the pad token named here gets no gradient as an input embedding: it must be no token that is learned.
    if tokenizer.pad_token_id not in (None, tokenizer.bos_token_id, *stops):
        settings["pad_token_id"] = tokenizer.pad_token_id


def _generation_config(own: Any, tokenizer: Any, stops: tuple[int, ...]) -> Any:
    """A model's generation config with the tokenizer's special tokens, in a form that transformers saves again."""
    from transformers import GenerationConfig

    settings = own.to_diff_dict()
    settings.pop("_from_model_config", None)  # older versions would derive it anew from config.json
    settings["eos_token_id"] = list(stops) if len(stops) > 1 else stops[0]
    if tokenizer.bos_token_id is not None:
        settings["bos_token_id"] = tokenizer.bos_token_id
    if tokenizer.pad_token_id is not None:
        settings["pad_token_id"] = tokenizer.pad_token_id
    ignored = (() if own.do_sample is True else SAMPLING_ONLY) + (() if (own.num_beams or 1) > 1 else BEAMS_ONLY)
    return GenerationConfig(**{name: value for name, value in settings.items() if name not in ignored})
