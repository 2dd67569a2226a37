"""The one room where models and tokenizers are loaded: full precision or 4-bit, with LoRA adapters or without.

A *base* is what a user names in a config: a hub name, a folder, or the run folder of an earlier stage. An adapter
folder (what a LoRA run exports) is loaded as its base with the adapter continued.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import nn

from rlhf_lit.errors import UserError, first_line
from rlhf_lit.models.adapters import adapter_config, base_of_adapter, same_adapter, with_adapter
from rlhf_lit.models.anatomy import body_of, unwrapped
from rlhf_lit.models.base import Base
from rlhf_lit.models.experts import quantizing_experts
from rlhf_lit.models.foundation import Foundation, fingerprint
from rlhf_lit.models.guards import check_language_model, check_scorer
from rlhf_lit.models.packing import prove_packing
from rlhf_lit.models.quantization import Quantization, keep_4bit_layout, note_what_stays_wide, quantization_config
from rlhf_lit.models.scorers import know_score_class, prepare_score_head, reading_heads_whole, stored_bias
from rlhf_lit.models.weights import whole_model
from rlhf_lit.runs import resolve_model


def load_tokenizer(base: Base) -> Any:
    """The tokenizer of a base. Raises UserError where there is none to be found."""
    from transformers import AutoTokenizer

    folder = resolve_model(base.tokenizer) if base.tokenizer else base.folder
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            folder, revision=base.revision, trust_remote_code=base.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise UserError(f"base.tokenizer: no tokenizer could be loaded from {folder!r}: {first_line(error)}") from None
    if tokenizer.eos_token_id is None:
        raise UserError(f"base.tokenizer: the tokenizer of {folder!r} has no EOS token, so no response could end")
    return tokenizer


def require_embeddings(module: nn.Module, tokens: int) -> None:
    """Every token of the tokenizer must have an embedding; a token without one would end a run in its middle.

    Args:
        module: with its models built.
        tokens: of the tokenizer.

    Raises:
        UserError: a model of the module has fewer embeddings.
    """
    from transformers import PreTrainedModel

    for part in module.modules():
        if isinstance(part, PreTrainedModel):
            rows = part.get_input_embeddings().weight.shape[0]
            if tokens > rows:
                raise UserError(f"base.tokenizer: it has {tokens} tokens, and the model only {rows} embeddings")


def load_causal_lm(base: Base) -> nn.Module:
    """The language model of a base, adapters included, in eval mode."""
    model = _load(base, scorer=False)
    check_language_model(model)
    return model


def load_scorer(base: Base, trained: bool = False, frozen: bool = False) -> nn.Module:
    """The base as a sequence classifier with one score, its head in float32, in eval mode.

    A head that comes with the weights is kept; a new one is drawn normal with standard deviation 1/√(d+1) (Ziegler et
    al. 2019, §2.1).

    Args:
        base: where it is.
        trained: the base must be a reward model: it must come with a head.
        frozen: it will not be trained, so that it may be a whole model in 4 bits; nothing of it asks for a gradient.
    """
    model = _load(base, scorer=True, frozen=frozen)
    if frozen:
        model.requires_grad_(False)
    inner = unwrapped(model)
    if trained and inner.new_head:
        raise UserError(f"{base.name} is no reward model: it has no trained score head, and a new one scores at random")
    # The constant found after training; an adapter folder has no config.json of its own to hold it.
    if (bias := stored_bias(base.folder)) is not None:
        inner.config.reward_bias = bias
    return model


def _load(base: Base, scorer: bool, frozen: bool = False) -> nn.Module:
    """A model of a base, with its adapter if it has one, in eval mode."""
    adapter_folder, weights, recorded = _weights_under(base)
    if base.quantization and not (base.lora or adapter_folder or frozen):
        raise UserError("base.quantization: 4-bit weights cannot be trained: set base.lora too")
    model, new_head = _plain_model(weights, scorer)
    if weights.quantization:
        keep_4bit_layout(model)
        note_what_stays_wide(model)
    if scorer:
        prepare_score_head(model.eval(), new=new_head)
        check_scorer(model)
    if base.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if base.lora or adapter_folder:
        model.requires_grad_(False)
        foundation = _foundation(model, weights)
        if recorded and adapter_folder:
            recorded.require_same(foundation, adapter_folder, "base.name")
        model = with_adapter(model, base, adapter_folder, weights.address, scorer)
        model.foundation = foundation
    prove_packing(model.eval())
    return cast("nn.Module", model)


def _weights_under(base: Base) -> tuple[str | None, Base, Foundation | None]:
    """The adapter's folder where a base names an adapter, the base whose weights are to be loaded, and what the adapter
    was trained on where its folder says so.

    Raises:
        UserError: ``base.lora`` describes another adapter.
    """
    if (adapter := adapter_config(base)) is None:
        if base.adapter_base:
            raise UserError(f"base.adapter_base: {base.name} holds a whole model, no adapter; leave it out")
        return None, base, None
    if base.lora is not None and not same_adapter(base.lora, adapter):
        raise UserError(
            f"base.lora: {base.name} already holds an adapter of rank {adapter.get('r', 8)}, alpha "
            f"{adapter.get('lora_alpha', 8)} and modules_to_save {adapter.get('modules_to_save')}, which is "
            "continued; set base.lora to the same values, or export it merged"
        )
    weights = base_of_adapter(base, adapter)
    recorded = Foundation.load(base.folder)
    if recorded and recorded.quantization and base.quantization is None:
        # An adapter stands on the base it was trained on, in 4 bits where that was.
        weights = replace(weights, quantization=Quantization(**recorded.quantization))
    return base.folder, weights, recorded


def _plain_model(base: Base, scorer: bool) -> tuple[Any, bool]:
    """transformers' model of a base, without adapters, and whether its score head is a new one."""
    import transformers

    auto = transformers.AutoModelForSequenceClassification if scorer else transformers.AutoModelForCausalLM
    settings: dict[str, Any] = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
    if scorer:
        settings["num_labels"] = 1
    if base.attention is not None:
        settings["attn_implementation"] = base.attention
    dtype = getattr(torch, base.dtype)
    try:
        config = transformers.AutoConfig.from_pretrained(base.folder, **settings)
        if getattr(config, "rescale_every", 0):
            # RWKV would halve weights of later layers in place in eval mode, for float16's range: they would be saved
            # so, and 4-bit ones cannot be.
            settings["rescale_every"] = config.rescale_every = 0
        if getattr(config.get_text_config(), "attn_logit_softcapping", None):
            # transformers 5.19 gives Gemma 2 and VaultGemma its sdpa, which leaves their cap out: another model.
            if base.attention == "sdpa":
                raise UserError(
                    "base.attention: the model caps its attention's logits, and sdpa does not; set it to eager, to "
                    "flash_attention_2 or to null"
                )
            settings["attn_implementation"] = config._attn_implementation = base.attention or "eager"
        if scorer:
            know_score_class(config)
        if base.fresh:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))
                return auto.from_config(config, dtype=dtype), True
    except UserError:
        raise
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"base.name: {base.folder!r} could not be loaded: {first_line(error)}") from None
    settings["dtype"] = dtype
    if base.quantization:
        settings["quantization_config"] = quantization_config(base.quantization)
    with (
        quantizing_experts() if base.quantization else nullcontext(),
        reading_heads_whole(config) if scorer else nullcontext(),
    ):
        return whole_model(auto, base.folder, settings, scorer)


def _foundation(model: Any, base: Base) -> Foundation:
    """What a model, loaded and not yet adapted, is as the base of adapters."""
    quantization = asdict(base.quantization) if base.quantization else None
    return Foundation(base.address, quantization, fingerprint(body_of(model)))
