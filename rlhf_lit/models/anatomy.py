"""Parts of a transformers model: what stands in peft's wrapper, decoder layers, context, stop tokens."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn


def is_wrapped(model: nn.Module) -> bool:
    """Whether a model stands in a PEFT wrapper. None does where peft was never imported, which takes longer than to
    start a run without it."""
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def unwrapped(model: nn.Module) -> Any:
    """The transformers model inside a PEFT wrapper, or the model itself; adapters stay in force."""
    inner: Any = model
    return inner.get_base_model() if is_wrapped(model) else inner


def body_of(inner: Any) -> Any:
    """The body of a transformers model, without its head; a body's own is itself."""
    from transformers import PreTrainedModel

    if (body := getattr(inner, inner.base_model_prefix, None)) is not None:
        return body
    # Llama 4's prefix names no attribute of its text model.
    return next((part for part in inner.children() if isinstance(part, PreTrainedModel)), inner)


def states_width(model: nn.Module) -> int:
    """The width of the hidden states that a language model's head is applied to: not always that between its layers
    (OPT's ``word_embed_proj_dim``)."""
    return int(unwrapped(model).get_output_embeddings().weight.shape[-1])


def computes_in_half(model: nn.Module) -> bool:
    """Whether products are rounded to fewer than float32's bits: by the dtype of the weights (4-bit ones compute in
    bfloat16), by the autocast in force, or by what torch may make of float32 (TF32)."""
    narrow = any(p.dtype not in (torch.float32, torch.float64) for p in model.parameters())
    device = next((p.device.type for p in model.parameters()), "cpu")
    return narrow or torch.is_autocast_enabled(device) or torch.get_float32_matmul_precision() != "highest"


def read_directly(model: nn.Module) -> list[str]:
    """Names of the linear layers of Mamba's mixers whose weights are multiplied without calling them, always or by the
    kernels of GPUs: an adapter on one would not be seen, and 4 bits be taken for the weight."""
    mixers = [(path, part) for path, part in model.named_modules() if hasattr(part, "ssm_state_size")]
    return [
        f"{path}.{name}" for path, part in mixers for name in ("x_proj", "dt_proj", "out_proj") if hasattr(part, name)
    ]


def without_adapters(model: nn.Module) -> list[str]:
    """Names of the linear layers that "all-linear" leaves out: those that are ``read_directly``, and routers of
    mixtures that give more than a product (Llama 4's, Phi MoE's)."""
    layers = ((name, part) for name, part in model.named_modules() if isinstance(part, nn.Linear))
    return [*read_directly(model), *(name for name, part in layers if "Router" in type(part).__name__)]


def adapter_in_force(model: nn.Module) -> str | None:
    """The name of the adapter that a PEFT model applies as it stands; None if it applies none."""
    if not is_wrapped(model):
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    layer: Any = next(module for module in model.modules() if isinstance(module, BaseTunerLayer))
    return None if layer._disable_adapters else layer._active_adapter[0]


def drops_out(inner: Any) -> bool:
    """Whether any dropout of a transformers model is active, that of its adapters included."""
    if not inner.training:
        return False
    if noise_settings(inner.config.get_text_config()):
        return True  # some are functions, no modules
    kinds = nn.modules.dropout._DropoutNd
    return any(isinstance(module, kinds) and module.training and module.p > 0 for module in inner.modules())


def drops_out_attention(inner: Any) -> bool:
    """Whether the attention of a transformers model drops any of its weights."""
    names = noise_settings(inner.config.get_text_config()) if inner.training else ()
    return any("attention" in name or "attn" in name for name in names)


def noise_settings(config: Any) -> list[str]:
    """The fields of a model's config, and of the configs in it, that put noise into its training mode: dropout of any
    kind, whole layers left out, jitter of a router. Those of a classifier's own head are none of ours."""
    from transformers import PreTrainedConfig

    found: list[str] = []
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            found += [f"{name}.{inner}" for inner in noise_settings(value)]
        elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
            noisy = "drop" in name or "jitter" in name
            found += [name] if noisy and not name.startswith(("classifier_", "summary_")) else []
    return found


def decoder_layers(model: Any) -> list[nn.Module]:
    """The layers of a transformers model that its kind names as units."""
    kinds = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]


def stop_ids(tokenizer: Any, model: nn.Module) -> tuple[int, ...]:
    """The tokens that end a response: the tokenizer's EOS, and those of the model's own generation config."""
    own = unwrapped(model).generation_config.eos_token_id if hasattr(unwrapped(model), "generation_config") else None
    ids = [own] if isinstance(own, int) else list(own or [])
    return tuple(dict.fromkeys([tokenizer.eos_token_id, *ids]))


def context_length(model: nn.Module) -> int | None:
    """The longest sequence a model was made for; None where its config does not say."""
    return getattr(unwrapped(model).config.get_text_config(), "max_position_embeddings", None)


def attends_to_everything(inner: Any) -> bool:
    """Whether all layers of a model are attention over all tokens before, with keys and values that may be cut off."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=inner.config).layers
    return all(type(layer) is DynamicLayer for layer in layers)
