"""Decoder-only families of transformers, each built small from its config: two layers, a vocabulary of 40."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tiny
import torch

# What configs call their sizes; of each family those that it knows. Weights are wide enough to tell tokens apart, and
# nothing is left to chance.
SIZES: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY, "bos_token_id": tiny.BOS, "eos_token_id": tiny.EOS, "pad_token_id": 0,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "lru_width"), 32),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "dff"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.15,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    "num_experts_per_tok": 2, "n_shared_experts": 1,
    **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout", "hidden_dropout", "layerdrop"), 0.0),
    **dict.fromkeys(("resid_pdrop", "attn_pdrop", "embd_pdrop", "resid_dropout", "embed_dropout"), 0.0),
    "residual_dropout": 0.0,
    **dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), 0.0),
    **dict.fromkeys(("router_jitter_noise", "input_jitter_noise"), 0.0),
}  # fmt: skip
MLA = {
    "head_dim": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
GROUPS = {"n_group": 1, "topk_group": 1}
MAMBA2 = {"mamba_chunk_size": 16, "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8}
HALVES = {"layer_types": ["linear_attention", "full_attention"], **LINEAR}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}

# transformers' name of the family → how readers know it, and what it needs beside ``SIZES``.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama 1 to 3, SmolLM, Yi, Vicuna", {}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "ministral": ("Ministral", SLIDING),
    "mixtral": ("Mixtral", {}),
    "qwen2": ("Qwen 1.5, 2 and 2.5", {}),
    "qwen2_moe": ("Qwen 1.5 and 2 MoE", {}),
    "qwen3": ("Qwen 3", {}),
    "qwen3_moe": ("Qwen 3 MoE", {}),
    "qwen3_next": ("Qwen 3 Next", HALVES),
    "qwen3_5_text": ("Qwen 3.5", HALVES),
    "gemma": ("Gemma", {}),
    "gemma2": ("Gemma 2", {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8, **SLIDING}),
    "gemma3_text": ("Gemma 3", {"query_pre_attn_scalar": 8, **SLIDING}),
    "gemma3n_text": (
        "Gemma 3n",
        {"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
         "altup_num_inputs": 2, "laurel_rank": 4, "activation_sparsity_pattern": [0.0, 0.0], **SLIDING},
    ),
    "gemma4_text": (
        "Gemma 4",
        {"vocab_size_per_layer_input": 40, "hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0,
         "final_logit_softcapping": 3.0, "global_head_dim": 16, **SLIDING},
    ),
    "vaultgemma": ("VaultGemma", {"query_pre_attn_scalar": 8}),
    "recurrent_gemma": ("RecurrentGemma", {"num_hidden_layers": 3, "num_key_value_heads": 1, "logits_soft_cap": 3.0}),
    "gpt2": ("GPT-2", {}),
    "gpt_neo": ("GPT-Neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    "gptj": ("GPT-J", {"rotary_dim": 4}),
    "gpt_neox": ("GPT-NeoX, Pythia", {}),
    "gpt_bigcode": ("SantaCoder, StarCoder", {}),
    "gpt_oss": ("gpt-oss", SLIDING),
    "openai-gpt": ("GPT", {}),
    "codegen": ("CodeGen", {"rotary_dim": 4}),
    "opt": ("OPT", {"word_embed_proj_dim": 16, "init_std": 0.15}),
    "xglm": ("XGLM", {"init_std": 0.15}),
    "biogpt": ("BioGPT", {}),
    "ctrl": ("CTRL", {}),
    "bloom": ("BLOOM", {}),
    "mpt": ("MPT", {"max_seq_len": 128}),
    "falcon": ("Falcon", {"new_decoder_architecture": False, "multi_query": True}),
    "falcon_h1": ("Falcon-H1", {"mamba_d_ssm": 64, "lm_head_multiplier": 3.0, **MAMBA2}),
    "falcon_mamba": ("Falcon Mamba", {"state_size": 8, "time_step_rank": 8}),
    "mamba": ("Mamba", {"state_size": 8, "time_step_rank": 8}),
    "mamba2": ("Mamba 2", {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1, "chunk_size": 16}),
    "rwkv": ("RWKV 4", {"context_length": 128, "attention_hidden_size": 32}),
    "xlstm": ("xLSTM", {"hidden_size": 64, "num_heads": 2, "qk_dim_factor": 1.0, "output_logit_soft_cap": 3.0}),
    "jamba": ("Jamba", {"mamba_d_state": 8, "mamba_dt_rank": 4, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "bamba": ("Bamba", {"attn_layer_indices": [1], **MAMBA2}),
    "zamba2": (
        "Zamba 2",
        {"layers_block_type": ["mamba", "hybrid"], "layer_types": ["mamba", "hybrid"], "head_dim": 16,
         "mamba_d_state": 8, "n_mamba_heads": 8, "mamba_headdim": 8, "mamba_ngroups": 1, "num_mem_blocks": 1,
         "adapter_rank": 4},
    ),
    "nemotron_h": (
        "Nemotron-H",
        {"layers_block_type": ["mamba", "attention"], "mamba_num_heads": 8, "mamba_head_dim": 8, "ssm_state_size": 8,
         "n_groups": 1},
    ),
    "nemotron": ("Nemotron, Minitron", {}),
    "phi": ("Phi 1 to 2", {}),
    "phi3": ("Phi 3 to 4", {}),
    "phimoe": ("Phi 3.5 MoE", {}),
    "stablelm": ("StableLM", {}),
    "starcoder2": ("StarCoder 2", {}),
    "persimmon": ("Persimmon", {}),
    "olmo": ("OLMo", {}),
    "olmo2": ("OLMo 2", {}),
    "olmo3": ("OLMo 3", SLIDING),
    "olmoe": ("OLMoE", {}),
    "flex_olmo": ("FlexOlmo", {}),
    "cohere": ("Command R", {"logit_scale": 0.25}),
    "cohere2": ("Command R7B, Command A", {"logit_scale": 0.25, **SLIDING}),
    "granite": ("Granite 3", {"logits_scaling": 3.0}),
    "granitemoe": ("Granite 3 MoE", {"logits_scaling": 3.0}),
    "granitemoeshared": ("Granite MoE with shared experts", {"logits_scaling": 3.0, "shared_intermediate_size": 32}),
    "granitemoehybrid": (
        "Granite 4",
        {"layer_types": ["mamba", "attention"], "logits_scaling": 3.0, "shared_intermediate_size": 32, **MAMBA2},
    ),
    "deepseek_v2": ("DeepSeek V2", {**MLA, **GROUPS, "first_k_dense_replace": 1, "num_key_value_heads": 4}),
    "deepseek_v3": ("DeepSeek V3 and R1", {**MLA, **GROUPS, "first_k_dense_replace": 1, "num_key_value_heads": 4}),
    "minicpm3": ("MiniCPM 3", {**MLA, "num_key_value_heads": 4, "dim_model_base": 16}),
    "glm": ("GLM 4, first release", {}),
    "glm4": ("GLM 4", {}),
    "glm4_moe": ("GLM 4.5", {**GROUPS, "first_k_dense_replace": 1}),
    "glm4_moe_lite": ("GLM 4.7 Flash", {**MLA, **GROUPS, "first_k_dense_replace": 1, "num_key_value_heads": 4}),
    "smollm3": ("SmolLM 3", {}),
    "exaone4": ("EXAONE 4", SLIDING),
    "ernie4_5": ("ERNIE 4.5", {}),
    "ernie4_5_moe": ("ERNIE 4.5 MoE", {}),
    "hunyuan_v1_dense": ("Hunyuan", {}),
    "hyperclovax": ("HyperCLOVA X", {"logits_scaling": 3.0}),
    "internlm3": ("InternLM 3", {}),
    "lfm2": ("LFM 2", {"layer_types": ["conv", "full_attention"]}),
    "arcee": ("Arcee AFM", {}),
    "afmoe": ("Arcee Trinity", {}),
    "apertus": ("Apertus", {}),
    "bitnet": ("BitNet", {}),
    "cwm": ("Code World Model", SLIDING),
    "dbrx": (
        "DBRX",
        {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
         "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
         "max_seq_len": 128},
    ),
    "diffllama": ("DiffLlama", {}),
    "doge": ("Doge", {}),
    "dots1": ("dots.llm1", {**GROUPS, "first_k_dense_replace": 1}),
    "helium": ("Helium", {}),
    "jetmoe": ("JetMoE", {"kv_channels": 8}),
    "llama4_text": ("Llama 4", {"intermediate_size_mlp": 64, "moe_layers": [1], "attention_chunk_size": 64}),
    "minimax": ("MiniMax Text-01", {"layer_types": ["linear_attention", "full_attention"], "block_size": 8}),
    "minimax_m2": ("MiniMax M2", {}),
    "modernbert-decoder": ("ModernBERT decoder, Ettin", {"layer_types": ["sliding_attention", "full_attention"]}),
    "nanochat": ("nanochat", {"final_logit_softcapping": 3.0}),
    "seed_oss": ("Seed-OSS", {}),
    "bert": ("BERT", {}),
    "xlnet": ("XLNet", {"d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
}  # fmt: skip


def build(kind: str, folder: Path) -> str:
    """A fresh model of one family with its tokenizer, in a folder as transformers writes it. → its name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    known = AutoConfig.for_model(kind)
    sizes = {name: value for name, value in SIZES.items() if name in {**known.to_dict(), **known.attribute_map}}
    config = AutoConfig.for_model(kind, **{**sizes, **FAMILIES[kind][1]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    assert sum(weight.numel() for weight in model.parameters()) < 200_000, f"{kind} is not small"
    model.save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return str(folder)
