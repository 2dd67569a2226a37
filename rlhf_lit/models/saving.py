"""Saving: a model, or its adapter, and its tokenizer into a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from rlhf_lit.models.anatomy import is_wrapped, unwrapped
from rlhf_lit.models.heads import reward_bias
from rlhf_lit.models.older_readers import write_for_older_readers
from rlhf_lit.models.saved_files import copy_vocabularies, forget_loading, open_to_readers
from rlhf_lit.models.special_tokens import write_special_tokens


class Trained(Protocol):
    """An algorithm after training, as far as saving its model goes.

    Attributes:
        trained_model: a transformers model, or one inside peft's wrapper.
        tokenizer: of that model.
        trains_scorer: the model is a reward model.
    """

    @property
    def trained_model(self) -> nn.Module: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def trains_scorer(self) -> bool: ...


def save_hf(module: Trained, folder: Path, weights: dict[str, Tensor] | None = None) -> None:
    """Write the trained model and its tokenizer to ``folder``.

    A policy is saved as a causal language model, a reward model as a sequence classifier with one label; with LoRA, the
    adapter alone, which names its base. The files name the tokens that end a response here as those to stop at. A
    reward model's folder also holds ``reward.json``: the constant that this package adds to the classifier's logit
    (transformers' own ``score`` layer has none).

    Args:
        module: with its models built.
        folder: where to.
        weights: of a sharded model, gathered (``FSDP2.whole_weights``).
    """
    write_model(module.trained_model, module.tokenizer, folder, module.trains_scorer, weights)


def write_model(
    model: nn.Module, tokenizer: Any, folder: Path, scorer: bool, weights: dict[str, Tensor] | None = None
) -> None:
    """Write a model, or its adapter where it has one, and its tokenizer.

    Args:
        model: a transformers model, or one inside peft's wrapper.
        tokenizer: a reward model's gets a pad token that is not EOS.
        folder: where to.
        scorer: a sequence classifier, whose folder gets ``reward.json``.
        weights: to be written in place of the model's own.
    """
    if scorer:
        inner = unwrapped(model)
        # transformers finds the last token of a row by its pad id, which therefore must not be EOS.
        pad = _pad_token(tokenizer)
        tokenizer.pad_token = pad
        inner.config.pad_token_id = tokenizer.convert_tokens_to_ids(pad)
        _save(model, folder, "default", weights)
        (folder / "reward.json").write_text(
            json.dumps({"bias": reward_bias(inner), "pad_token_id": inner.config.pad_token_id}) + "\n"
        )
    else:
        _save(model, folder, "default", weights)
    tokenizer.save_pretrained(folder)
    write_special_tokens(model, tokenizer, folder)
    write_for_older_readers(model, tokenizer, folder)
    copy_vocabularies(tokenizer, folder)
    forget_loading(folder)
    open_to_readers(folder)


def _save(model: Any, folder: Path, adapter: str, weights: dict[str, Tensor] | None) -> None:
    if is_wrapped(model):
        # peft puts the name that the base was loaded by, which may be a path relative to where that was.
        model.peft_config[adapter].base_model_name_or_path = model.foundation.name
        model.save_pretrained(folder, selected_adapters=[adapter], state_dict=weights)
        (folder / "README.md").unlink(missing_ok=True)  # a form, of which peft fills in a path of this machine
        model.foundation.save(folder)
    else:
        with _own_generation_config(model, folder):
            model.save_pretrained(folder, state_dict=weights)


@contextmanager
def _own_generation_config(model: Any, folder: Path) -> Iterator[None]:
    """Inside the block a model is saved with a plain generation config, and its own is written after it: transformers
    5.19 refuses to save what it loaded where that has sampling defaults that sample nothing, as published ones do."""
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    model.generation_config = type(own)()
    try:
        yield
    finally:
        model.generation_config = own
    file = folder / "generation_config.json"
    if file.exists():
        own.to_json_file(file)


def _pad_token(tokenizer: Any) -> str:
    """A token to pad with that is not EOS."""
    eos = tokenizer.eos_token
    named = [getattr(tokenizer, name) for name in ("pad_token", "unk_token", "bos_token")]
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    spare = [token for token in (*named, *special) if token not in (None, eos)]
    # Becoming the pad token makes a token special, and its spelling is then split off wherever a text holds it: "!"
    # would change how most texts are cut. No text holds the spelling of a word with its space ("Ġword").
    regular = sorted(tokenizer.get_vocab().items(), key=lambda entry: -entry[1])
    spaced = [token for token, _ in regular if token.startswith(("Ġ", "▁"))]
    return str((*spare, *spaced, *(token for token, _ in regular if token != eos))[0])
