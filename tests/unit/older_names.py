"""Families and tokenizers whose files transformers 4.57 reads by other names than transformers 5 writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_tokenizer

SIZE = {**tiny.SIZES["qwen2"], "max_position_embeddings": 64}
PLAIN = {"rope_type": "default", "rope_theta": 1e6}
LLAMA3 = {
    "rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
CONTEXT = {"original_max_position_embeddings": 16}
LONG = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}
TWO: dict[str, Any] = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}

# A family, what its configuration is given, and what 4.57 must find in config.json, by its own names.
FAMILIES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", {"rope_parameters": PLAIN}, {"rope_theta": 1e6, "rope_scaling": None}),
    "llama, older names": (
        "llama",
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 2.0}},
    ),
    "llama 3.1": (
        "llama", {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, {"rope_theta": 5e5, "rope_scaling": LLAMA3}
    ),
    "qwen2, yarn": (
        "qwen2", {"rope_parameters": {**YARN, "rope_theta": 1e6}}, {"rope_theta": 1e6, "rope_scaling": YARN}
    ),
    "qwen3": ("qwen3", {"rope_parameters": PLAIN, "head_dim": 8}, {"rope_theta": 1e6, "rope_scaling": None}),
    "qwen3, experts": ("qwen3_moe", {"rope_parameters": PLAIN, **EXPERTS}, {"rope_theta": 1e6, "num_experts": 4}),
    "mistral": ("mistral", {"rope_parameters": PLAIN}, {"rope_theta": 1e6, "rope_scaling": None}),
    "gemma 3": (
        "gemma3_text",
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 20_000.0},
            },
            "head_dim": 8,
            **TWO,
        },
        {
            "rope_theta": 1e6, "rope_local_base_freq": 20_000.0,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        },
    ),
    "phi 3": (
        "phi3",
        {
            "rope_theta": 30_000.0, "original_max_position_embeddings": 16, "pad_token_id": 0,
            "rope_scaling": {"type": "longrope", **LONG},
        },
        {
            "rope_theta": 30_000.0, "original_max_position_embeddings": 16,
            "rope_scaling": {"type": "longrope", **LONG},
        },
    ),
    "llama, longrope": (
        "llama",
        {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e6, **CONTEXT, **LONG}},
        {"rope_theta": 1e6, "original_max_position_embeddings": 16},
    ),
    "phi, part of a head": (
        "phi",
        {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
        {"rope_theta": 1e6, "partial_rotary_factor": 0.5},
    ),
    "gpt-neox": (
        "gpt_neox",
        {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
        {"rotary_emb_base": 1e6, "rotary_pct": 0.5},
    ),
}  # fmt: skip
# Models that transformers 4.57 has no words for.
SPEECHLESS: dict[str, tuple[str, dict[str, Any], str]] = {
    "olmo 3": (
        "olmo3",
        {"rope_parameters": {"full_attention": PLAIN, "sliding_attention": {**PLAIN, "rope_theta": 1e4}}, **TWO},
        "its olmo3 has one base for all layers",
    ),
    "olmo 3, scaled": (
        "olmo3",
        {"rope_parameters": {layers: {**YARN, "rope_theta": 1e6} for layers in TWO["layer_types"]}, **TWO},
        "its olmo3 scales the frequencies of full attention alone",
    ),
    "nemotron": ("nemotron", {"rope_parameters": {**YARN, "rope_theta": 1e6}}, "its nemotron does not scale them"),
    "longrope by a factor": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "longrope", "rope_theta": 1e6, "factor": 3.0, **CONTEXT, **LONG
            }
        },
        "its longrope scales by 64 / 16",
    ),
}  # fmt: skip


def base_of(folder: Path, kind: str, changes: dict[str, Any]) -> Base:
    """A tiny model of a family in a folder, as transformers 5 writes it."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**SIZE, "vocab_size": tiny.VOCABULARY, "initializer_range": 0.3, **changes})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return Base(name=str(folder))


def llama_tokenizer(kind: str, **settings: Any) -> Any:
    """Merges over bytes and the pieces of a line, in the class that transformers 5 has for Llama, Gemma or Pythia."""
    import transformers

    named = ["<unk>", "<s>", "</s>", "<pad>", "<eos>", "<bos>"]
    pieces = [*(f"<0x{i:02X}>" for i in range(256)), "▁", *"Helowrd!It'12345.abxyz", "el", "lo", "▁a", "▁y"]
    vocabulary = {piece: i for i, piece in enumerate([*named, *dict.fromkeys(pieces)])}
    merges = [("e", "l"), ("l", "o"), ("▁", "a"), ("▁", "y")]
    return getattr(transformers, kind)(
        vocab=vocabulary, merges=merges, extra_special_tokens=["<extra>"], **{"unk_token": "<unk>", **settings}
    )


def with_named_token() -> Any:
    tokenizer = tiny.make_tokenizer()
    read = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<eos>", image_token="w7")
    read.add_special_tokens({"extra_special_tokens": ["w8"]})
    return read


TOKENIZERS: dict[str, Any] = {
    "llama": lambda: llama_tokenizer("LlamaTokenizer"),
    "llama, BOS": lambda: llama_tokenizer("LlamaTokenizer", add_bos_token=True),
    "llama, no prefix": lambda: llama_tokenizer("LlamaTokenizer", add_prefix_space=False),
    "gemma": lambda: llama_tokenizer("GemmaTokenizer"),
    "gpt-neox": lambda: llama_tokenizer("GPTNeoXTokenizer", add_bos_token=True, bos_token="<s>"),
    "qwen2": lambda: llama_tokenizer("Qwen2Tokenizer"),
    "words": tiny.make_tokenizer,
    "a named token": with_named_token,
    "playground": lambda: load_tokenizer(Base("playground", fresh=True)),
}
