"""A whole model from its files: every key of a file is used, or the model is refused by that key's name."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_lit.errors import UserError, and_more, first_line
from rlhf_lit.models.scorers import require_score_head

# Keys that a message names; of a large model hundreds may be missing.
NAMED = 3


def whole_model(auto: Any, folder: str, options: dict[str, Any], scorer: bool) -> tuple[Any, bool]:
    """A model with all its weights from files.

    What may differ between the model and its files: keys that the class itself declares ignorable, copies of tied
    weights, the score head of a model that has none yet, and the LM head of what becomes a reward model.

    Args:
        auto: transformers' auto class.
        folder: of the files, or a hub name.
        options: of ``from_pretrained``.
        scorer: the model is a sequence classifier.

    Returns:
        The model, and whether its score head is a new one.

    Raises:
        UserError: the files cannot be read, or there are keys that the model lacks, or weights that the files lack or
            hold in other shapes. Names them.
    """
    from safetensors import SafetensorError

    try:
        # transformers would raise for other shapes without naming one.
        model, found = auto.from_pretrained(folder, output_loading_info=True, ignore_mismatched_sizes=True, **options)
    except SafetensorError as error:
        raise UserError(
            f"base.name: a weights file of {folder!r} is broken ({first_line(error)}); copy or download it anew"
        ) from None
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"base.name: {folder!r} could not be loaded: {first_line(error)}") from None
    name = type(model).__name__
    if scorer:
        require_score_head(model)
    if found["mismatched_keys"]:
        key, theirs, ours = min(found["mismatched_keys"])
        several = "; a score head with several labels is no reward model's" if scorer and key == "score.weight" else ""
        raise UserError(
            f"base.name: {folder!r} holds weights of other shapes than {name}: {key} of {list(theirs)}, where "
            f"{list(ours)} is expected{several}"
        )
    missing, unknown = set(found["missing_keys"]), set(found["unexpected_keys"])
    head = {key for key in missing if scorer and key.startswith("score.")}
    if missing - head:
        raise UserError(
            f"base.name: {folder!r} is no whole {_kind(scorer)}, it lacks {and_more(sorted(missing - head), NAMED)}"
        )
    if unknown and scorer:
        unknown -= _language_model_heads(model)
    if unknown:
        reward = "; it is a reward model" if not scorer and any(key.startswith("score.") for key in unknown) else ""
        raise UserError(
            f"base.name: {folder!r} holds weights that {name} has no place for: "
            f"{and_more(sorted(unknown), NAMED)}{reward}; name a model of that kind, or save it without them"
        )
    return model, bool(head)


def _kind(scorer: bool) -> str:
    return "model" if scorer else "language model"


def _language_model_heads(scorer: Any) -> set[str]:
    """The keys that the files of a classifier's family's language models have beside its body's."""
    from transformers import AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(scorer.config)
        except ValueError:  # an encoder: it has none
            return set()
    weights = model.state_dict().items()
    beside = {key: weight for key, weight in weights if not key.startswith(f"{scorer.base_model_prefix}.")}
    return {*beside, *revert_weight_conversion(model, beside)}  # GPT-NeoX's is `embed_out` in files
