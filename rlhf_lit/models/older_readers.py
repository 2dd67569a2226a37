"""Saved files in the words of older readers: transformers 4, and whoever reads its `config.json` without transformers.

transformers 5 writes a model's rotary embedding as ``rope_parameters``, which version 4 does not know: it takes the
class's default frequencies in their place and says nothing. It writes names of tokenizer classes, and lists of special
tokens, that version 4 fails on. Older names are added beside the newer ones where version 5 reads the same as before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn

from rlhf_lit.errors import say
from rlhf_lit.files import write_json
from rlhf_lit.models.anatomy import unwrapped

# Where frequencies differ by kind of layer: the older name of each kind's base.
BY_LAYER = {
    "gemma3_text": {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
    "gemma3n_text": {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"},
    "modernbert-decoder": {"full_attention": "global_rope_theta", "sliding_attention": "global_rope_theta"},
    "olmo3": {"full_attention": "rope_theta", "sliding_attention": "rope_theta"},
}
# Older names of the base and of the rotated part of a head, where they are not the usual ones.
OTHER_NAMES = {
    "gpt_neox": ("rotary_emb_base", "rotary_pct"),
    "gpt_neox_japanese": ("rotary_emb_base", "rotary_pct"),
}
UNSCALED: dict[str, Any] = {"rope_scaling": None}
NEVER_SCALED = ("nemotron",)
# Other settings that version 4 has by another name: it would build another model, and stop at its weights.
RENAMED = {"qwen3_moe": {"num_local_experts": "num_experts"}}
# Tokenizer classes that version 4 builds by rules of its own in place of reading tokenizer.json as it stands (BOS is
# put before every text, or never), or has by another name.
REBUILT = ("LlamaTokenizer", "CodeLlamaTokenizer", "CohereTokenizer", "GemmaTokenizer", "GPTNeoXTokenizer")


def write_for_older_readers(model: nn.Module, tokenizer: Any, folder: Path) -> None:
    """Complete a saved model's ``config.json`` and ``tokenizer_config.json`` with what transformers 4.57 reads.

    Version 5 reads the same model and the same tokens as before. Where the older names cannot say what the model
    computes, one line says so and ``config.json`` stays as it is.

    Args:
        model: as it was saved; an adapter's folder has no ``config.json``.
        tokenizer: as it was saved.
        folder: the saved model's.
    """
    if (folder / "config.json").is_file():
        _complete_config(type(unwrapped(model).config), folder / "config.json")
    if (file := folder / "tokenizer_config.json").is_file():
        write_json(file, _older_tokenizer(json.loads(file.read_text(encoding="utf-8")), tokenizer))


class Inexpressible(ValueError):
    """A rotary embedding that the older names have no words for."""


def _complete_config(kind: Any, file: Path) -> None:
    """Add the older names to a ``config.json``, unless a configuration of this kind then reads otherwise."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    try:
        completed = _older_config(settings)
        with TemporaryDirectory() as place:
            trial = Path(place) / file.name
            write_json(trial, completed)
            if _as_read(kind, trial, settings) != _as_read(kind, file, settings):
                raise Inexpressible("transformers 5 would read the older names as another model")
    except Inexpressible as reason:
        say(f"note: {file}: do not load it in transformers 4, which takes default rotary frequencies for it: {reason}")
    else:
        write_json(file, completed)


def _as_read(kind: Any, file: Path, names: Iterable[str]) -> dict[str, Any]:
    """What transformers 5 makes of a ``config.json``, as far as these names go: it keeps others as they stand."""
    read = kind.from_json_file(file).to_dict()
    if isinstance(rope := read.get("rope_parameters"), dict):
        rope.pop("type", None)  # the older name of rope_type, which goes before it
    return {name: read.get(name) for name in names}


def _older_config(settings: dict[str, Any]) -> dict[str, Any]:
    """A configuration, and those of its parts, with the older names beside the newer ones."""
    older = {
        name: _older_config(part)
        for name, part in settings.items()
        if isinstance(part, dict) and name != "rope_parameters"
    }
    if settings.get("rope_parameters"):
        older |= _older_rope(settings)
    if isinstance(settings.get("dtype"), str):
        older["torch_dtype"] = settings["dtype"]
    for name, former in RENAMED.get(settings.get("model_type", ""), {}).items():
        older[former] = settings[name]
    return {**settings, **older}


def _older_rope(settings: dict[str, Any]) -> dict[str, Any]:
    """The older names of a rotary embedding. Raises Inexpressible."""
    rope, kind = settings["rope_parameters"], settings.get("model_type", "")
    if not any(isinstance(value, dict) for value in rope.values()):
        theta, part = OTHER_NAMES.get(kind, ("rope_theta", "partial_rotary_factor"))
        older = {theta: rope["rope_theta"], **_scaling(rope, settings)}
        return older if rope.get("partial_rotary_factor") is None else {**older, part: rope["partial_rotary_factor"]}
    names = BY_LAYER.get(kind)
    if names is None or not rope.keys() <= names.keys():
        raise Inexpressible(f"{kind} has other frequencies in each kind of layer")
    bases: dict[str, Any] = {}
    for layers, parameters in rope.items():
        if bases.setdefault(names[layers], parameters["rope_theta"]) != parameters["rope_theta"]:
            raise Inexpressible(f"its {kind} has one base for all layers")
        if layers != "full_attention" and _scaling(parameters, settings) != UNSCALED:
            raise Inexpressible(f"its {kind} scales the frequencies of full attention alone")
    return {**bases, **_scaling(rope["full_attention"], settings)}


def _scaling(rope: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """``rope_scaling`` of version 4, and the original context beside it where that is read there. Raises
    Inexpressible."""
    rest = {name: value for name, value in rope.items() if name not in ("rope_theta", "partial_rotary_factor")}
    scaling, kind = rest["rope_type"], settings.get("model_type", "")
    if rest.keys() <= {"rope_type", "type"} and scaling == "default":
        return UNSCALED
    if kind in NEVER_SCALED:
        raise Inexpressible(f"its {kind} does not scale them")
    if scaling != "longrope":
        return {"rope_scaling": rest}
    original, longest = rest["original_max_position_embeddings"], settings["max_position_embeddings"]
    # There the scale is the ratio of the two contexts, whatever is written.
    if rest.get("attention_factor") is None and rest.get("factor") not in (None, longest / original):
        raise Inexpressible(f"its longrope scales by {longest} / {original}")
    if kind == "phi3":  # takes these three and no others
        if rest.get("factor") is not None or rest.get("attention_factor") is not None:
            raise Inexpressible("its phi3 takes no factor beside short_factor and long_factor")
        rest = {"type": scaling, "short_factor": rest["short_factor"], "long_factor": rest["long_factor"]}
    return {"rope_scaling": rest, "original_max_position_embeddings": original}


def _older_tokenizer(settings: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    """A tokenizer's configuration that version 4 takes, and that means the same to version 5."""
    older = dict(settings)
    if older.get("tokenizer_class") in ("TokenizersBackend", *REBUILT):
        older["tokenizer_class"] = "PreTrainedTokenizerFast"  # reads tokenizer.json, in both versions
        # Defaults of the class that are not in its file. With token_type_ids, version 4's `generate` refuses a prompt.
        for name in ("model_input_names", "padding_side", "truncation_side"):
            older[name] = getattr(tokenizer, name)
    if isinstance(extra := older.pop("extra_special_tokens", None), list) and extra:
        older["additional_special_tokens"] = extra
    # Special tokens with names of their own, as `image_token`: a list in version 5, a mapping in version 4.
    usual = type(tokenizer).SPECIAL_TOKENS_ATTRIBUTES
    if named := [name for name in tokenizer.SPECIAL_TOKENS_ATTRIBUTES if name not in usual]:
        older["extra_special_tokens"] = {name: tokenizer.special_tokens_map[name] for name in named}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.pre_tokenizer is not None:
        # Version 4 gives the pre-tokenizer the configuration's, and False where that has none.
        state = json.loads(backend.pre_tokenizer.__getstate__())
        if "add_prefix_space" in state:
            older["add_prefix_space"] = state["add_prefix_space"]
    return older
