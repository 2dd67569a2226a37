"""The one room where models and tokenizers are loaded: full precision or 4-bit, with LoRA adapters or without.

A *base* is what a user names in a config: a hub name, a folder, or the run folder of an earlier stage. An adapter
folder (what a LoRA run exports) is loaded as its base with the adapter continued.
"""

from __future__ import annotations

import os
from dataclasses import asdict, replace
from typing import Any, cast

import torch
from torch import nn

from rlhf_lit.errors import UserError, first_line
from rlhf_lit.models.adapters import adapter_config, same_adapter, with_adapter
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base
from rlhf_lit.models.foundation import Foundation, fingerprint
from rlhf_lit.models.packing import prove_packing
from rlhf_lit.models.quantization import Quantization, keep_4bit_layout, quantization_config
from rlhf_lit.models.scorers import prepare_score_head, stored_bias
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
    model = _load(base, "AutoModelForCausalLM", {})
    _check_head(model)
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
    model = _load(base, "AutoModelForSequenceClassification", {"num_labels": 1}, frozen)
    if frozen:
        model.requires_grad_(False)
    inner = unwrapped(model)
    if trained and inner.new_head:
        raise UserError(f"{base.name} is no reward model: it has no trained score head, and a new one scores at random")
    # The constant found after training; an adapter folder has no config.json of its own to hold it.
    if (bias := stored_bias(base.folder)) is not None:
        inner.config.reward_bias = bias
    return model


def _load(base: Base, auto_class: str, extra: dict[str, Any], frozen: bool = False) -> nn.Module:
    import transformers

    adapter_folder = base.folder if (adapter := adapter_config(base)) else None
    if adapter:
        if base.lora is not None and not same_adapter(base.lora, adapter):
            raise UserError(
                f"base.lora: {base.name} already holds an adapter of rank {adapter['r']} and alpha "
                f"{adapter['lora_alpha']}, which is continued; set base.lora to the same values, or export it merged"
            )
        weights = replace(base, name=str(adapter["base_model_name_or_path"]))
        recorded = Foundation.load(base.folder)
        if recorded and recorded.quantization and base.quantization is None:
            # An adapter stands on the base it was trained on, in 4 bits where that was.
            weights = replace(weights, quantization=Quantization(**recorded.quantization))
    else:
        weights, recorded = base, None
    if base.quantization and not (base.lora or adapter or frozen):
        raise UserError("base.quantization: 4-bit weights cannot be trained: set base.lora too")
    auto = getattr(transformers, auto_class)
    dtype = getattr(torch, base.dtype)
    keywords: dict[str, Any] = {
        "revision": weights.revision,
        "trust_remote_code": weights.trust_remote_code,
        **extra,
    }
    if base.attention is not None:
        keywords["attn_implementation"] = base.attention
    missing = {"score.weight"}  # of the weights; a fresh model's are all drawn anew
    try:
        if base.fresh:
            config = transformers.AutoConfig.from_pretrained(weights.folder, **keywords)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int(os.environ.get("PL_GLOBAL_SEED", "0")))
                model = auto.from_config(config, dtype=dtype)
        else:
            if weights.quantization:
                keywords["quantization_config"] = quantization_config(weights.quantization)
            model, loaded = auto.from_pretrained(weights.folder, dtype=dtype, output_loading_info=True, **keywords)
            missing = set(loaded["missing_keys"])
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"base.name: {weights.folder!r} could not be loaded: {first_line(error)}") from None
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        several = ", such as a score head with several labels" if "num_labels" in extra else ""
        raise UserError(f"base.name: {weights.folder!r} holds weights of other shapes{several}") from None
    scorer = "num_labels" in extra
    if scorer:
        prepare_score_head(model, new="score.weight" in missing)
    elif not base.fresh and missing:
        raise UserError(
            f"base.name: {weights.folder!r} is no whole language model, it lacks {', '.join(sorted(missing))}"
        )
    if weights.quantization:
        keep_4bit_layout(model)
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


def _foundation(model: Any, base: Base) -> Foundation:
    """What a model, loaded and not yet adapted, is as the base of adapters."""
    body = getattr(model, model.base_model_prefix)
    quantization = asdict(base.quantization) if base.quantization else None
    return Foundation(base.address, quantization, fingerprint(body))


def _check_head(model: nn.Module) -> None:
    """Our hidden states → LM head path must give the model's own logits, or log-probs would be silently wrong."""
    from rlhf_lit.models.logprobs import logits
    from rlhf_lit.models.packing import hidden_states

    tokens = torch.tensor([[1, 2, 3]], device=next(model.parameters()).device)
    with torch.no_grad():
        own = unwrapped(model)(input_ids=tokens, use_cache=False).logits.float()
        ours = logits(model, hidden_states(model, tokens)).float()
    if not torch.allclose(own, ours, rtol=1e-3, atol=1e-3):
        raise UserError(
            f"base.name: {type(unwrapped(model)).__name__} changes its logits after the LM head in a way not supported"
        )
