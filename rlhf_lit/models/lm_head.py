"""Hidden states → logits, as each family computes them: the LM head, and what comes before and after it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.models.anatomy import unwrapped

# What configs call the factors and caps. ``guards`` compares with the model's own logits, so that a family with another
# name for one of them is refused rather than misread.
FACTORS = ("logit_scale", "lm_head_multiplier")  # Cohere; Falcon-H1
DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, MiniCPM 3; Inkling
OF_STATES = ("minicpm3", "inkling_text")  # families that divide the hidden states and not the logits
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # Gemma, nanochat; RecurrentGemma; xLSTM


def logits(model: nn.Module, states: Tensor) -> Tensor:
    """[..., width] hidden states → [..., vocabulary] logits, in the width of float32 or more."""
    inner = unwrapped(model)
    config: Any = inner.config.get_text_config()
    if config.model_type == "modernbert-decoder":
        states = inner.lm_head(states)  # a layer of its own before the head proper
    divisors = [divisor for name in DIVISORS if (divisor := getattr(config, name, None)) is not None]
    if config.model_type in OF_STATES:
        states = states / math.prod(divisors)
    raw = inner.get_output_embeddings()(states)
    raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
    for name in FACTORS:
        if (factor := getattr(config, name, None)) is not None:
            raw = raw * factor
    for divisor in divisors if config.model_type not in OF_STATES else ():
        raw = raw * divisor if config.model_type == "hyperclovax" else raw / divisor
    for name in CAPS:
        if (cap := getattr(config, name, None)) is not None:
            raw = cap * torch.tanh(raw / cap)
    if (size := getattr(config, "unpadded_vocab_size", None)) is not None:
        raw = raw[..., :size]  # Inkling's table is wider than its vocabulary
    return raw
