"""The score head of a reward model, and the constant that is added to its scores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import body_of

if TYPE_CHECKING:
    from transformers.modeling_outputs import SequenceClassifierOutput


def stored_bias(folder: str) -> float | None:
    """The constant that a reward model's folder adds to its scores; None where it names none."""
    file = Path(folder) / "reward.json"
    return float(json.loads(file.read_text())["bias"]) if file.is_file() else None


def require_score_head(model: Any) -> None:
    """Refuse a classifier that has no linear layer `score`.

    Raises:
        UserError: names its class.
    """
    if not isinstance(getattr(model, "score", None), nn.Module):
        raise UserError(
            f"base.name: {type(model).__name__} has no linear `score` head: reward models and separate critics need "
            "another family"
        )


def prepare_score_head(model: Any, new: bool) -> None:
    """The `score` head in float32, drawn anew unless it came with the weights; ``model.new_head`` tells which."""
    require_score_head(model)
    head = model.score.float()
    model.new_head = new
    if new:
        width = head.weight.shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))
            values = torch.randn(head.weight.shape) / (width + 1) ** 0.5
        head.weight.data.copy_(values)


def know_score_class(config: Any) -> None:
    """See to it that transformers' auto class has a sequence classifier for a config: its own, or else ours.

    About half of the families have none. Ours is what transformers writes for most of the others: a linear ``score``
    without bias on the body, read at the last token that is no padding. docs/reward_models.md says how one reads it
    elsewhere.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    known = AutoModelForSequenceClassification._model_mapping
    own_code = getattr(config, "auto_map", None) or {}
    if type(config) in known or "AutoModelForSequenceClassification" in own_code:
        return
    if type(config) in AutoModelForCausalLM._model_mapping:
        ours = _score_class(AutoModelForCausalLM._model_mapping[type(config)], config)
        known.register(type(config), ours, exist_ok=True)


@contextmanager
def reading_heads_whole(config: Any) -> Iterator[None]:
    """transformers reads the `score` heads of a config's class in float32, whatever width the body is asked for in: a
    head is saved in float32, and half of its digits would be lost.

    Args:
        config: of a sequence classifier's family, known to transformers' auto class; other classes are left alone.
    """
    from transformers import AutoModelForSequenceClassification, PreTrainedModel

    known = AutoModelForSequenceClassification._model_mapping
    kind: Any = known.get(type(config), None)
    ours_to_tell = isinstance(kind, type) and issubclass(kind, PreTrainedModel)
    if not ours_to_tell:
        yield
        return
    inherited = kind._keep_in_fp32_modules_strict
    own = "_keep_in_fp32_modules_strict" in vars(kind)
    kind._keep_in_fp32_modules_strict = {*(inherited or ()), "score"}
    try:
        yield
    finally:
        if own:
            kind._keep_in_fp32_modules_strict = inherited
        else:
            del kind._keep_in_fp32_modules_strict


def _score_class(language_model: Any, config: Any) -> Any:
    """A classifier on the body of a language model's family."""
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GenericForSequenceClassification

    text = config.get_text_config()
    with torch.device("meta"):
        built = language_model(text if isinstance(text, language_model.config_class) else config)
    family = next(kind for kind in language_model.__mro__[1:] if issubclass(kind, PreTrainedModel))
    members = {
        # The keys of the language model's files begin with the name that it gives its body.
        "base_model_prefix": next(name for name, part in built.named_children() if isinstance(part, PreTrainedModel)),
        "config_class": language_model.config_class,
        "forward": _score_of_last_token,  # the generic one needs an output with a cache, which recurrent bodies lack
        # transformers leaves buffers of what it takes for custom code as they come from `torch.empty` (Falcon-H1's).
        "__module__": language_model.__module__,
    }
    name = language_model.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "") + "ForSequenceClassification"
    return type(name, (GenericForSequenceClassification, family), members)


def _score_of_last_token(
    self: Any, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any
) -> SequenceClassifierOutput:
    """[rows, time] tokens, padded on either side → [rows, labels] scores. ``options`` are the body's."""
    from transformers.modeling_outputs import SequenceClassifierOutput

    states = body_of(self)(input_ids=input_ids, attention_mask=attention_mask, **options).last_hidden_state
    rows = torch.arange(len(input_ids), device=states.device)
    pad = getattr(self.config.get_text_config(), "pad_token_id", None)
    if pad is None and len(input_ids) > 1:
        raise ValueError("Several rows need a padding token: set config.pad_token_id")
    places = torch.arange(input_ids.shape[1], device=states.device)
    last = places[-1:] if pad is None else (places * (input_ids != pad)).argmax(-1)
    return SequenceClassifierOutput(logits=self.score(states[rows, last]))
