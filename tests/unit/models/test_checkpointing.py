"""Gradient checkpointing without dropout: what a layer draws by itself, not through a part of its own, is off too."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rlhf_lit.algorithms import DPO, SFT
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.models.anatomy import drops_out, noise_settings
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm

DRAWING: dict[str, dict[str, Any]] = {
    "opt": {
        "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "word_embed_proj_dim": 32,
        "max_position_embeddings": 64, "dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5,
    },
    "falcon": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "hidden_dropout": 0.5,
        "attention_dropout": 0.5,
    },
    "xglm": {
        "d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4, "max_position_embeddings": 64,
        "dropout": 0.5, "attention_dropout": 0.5, "activation_dropout": 0.5, "layerdrop": 0.5,
    },
    "biogpt": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "max_position_embeddings": 64, "hidden_dropout_prob": 0.5, "attention_probs_dropout_prob": 0.5,
        "activation_dropout": 0.5, "layerdrop": 0.5,
    },
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.5, "attn_pdrop": 0.5},
    "mixtral": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "router_jitter_noise": 0.5, "attention_dropout": 0.5,
    },
    "phimoe": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "num_local_experts": 4, "router_jitter_noise": 0.5, "input_jitter_noise": 0.5,
    },
}  # fmt: skip


def dpo(base: Base, moved: float = 0.02) -> DPO:
    module = tiny.build(DPO(base, DPOLoss(beta=0.5)))
    tiny.disturb(module, moved)
    return module


@pytest.mark.parametrize(
    ("kind", "lora"),
    [(kind, lora) for kind in DRAWING for lora in (None, LoRA(rank=4))],
)
def test_losses_and_gradients_are_those_without_it(
    kind: str, lora: LoRA | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.SIZES, kind, DRAWING[kind])
    base = Base(name=tiny.save_model(tmp_path, kind), lora=lora)
    steps = []
    for checkpointing in (False, True):
        module = dpo(replace(base, gradient_checkpointing=checkpointing))
        recomputed = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
        assert len(recomputed) == (0 if not checkpointing else 2 if lora else 4)  # of policy and reference
        before = torch.get_rng_state()
        steps.append(tiny.Step(module, tiny.preferences()))
        assert torch.get_rng_state().equal(before), "something was drawn"
    steps[0].assert_equals(steps[1], 1e-5)
    again = dpo(replace(base, gradient_checkpointing=True), moved=0)
    assert abs(tiny.Step(again, tiny.preferences()).totals["margin"]) < 1e-5  # reference and policy agree at the start


@pytest.mark.parametrize("kind", ["opt", "falcon", "gpt2"])
def test_where_dropout_is_wanted_it_stays(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT trains with the config's dropout, and the backward pass draws the same again."""
    monkeypatch.setitem(tiny.SIZES, kind, DRAWING[kind] | ({"layerdrop": 0.0} if kind == "opt" else {}))
    base = Base(name=tiny.save_model(tmp_path, kind))
    steps = []
    for checkpointing in (False, True):
        module = tiny.build(SFT(replace(base, gradient_checkpointing=checkpointing)))
        torch.manual_seed(1)
        steps.append(tiny.Step(module, tiny.supervised()))
        torch.manual_seed(2)
        assert abs(tiny.Step(module, tiny.supervised()).totals["loss"] - steps[-1].totals["loss"]) > 1e-3
    steps[0].assert_equals(steps[1], 1e-5)


@pytest.mark.parametrize(
    "field",
    [
        "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout", "hidden_dropout_prob",
        "activation_dropout", "layerdrop", "decoder_layerdrop", "drop_path_rate", "resid_dropout",
        "router_jitter_noise", "input_jitter_noise", "moe_jitter_eps",
    ],
)  # fmt: skip
def test_noise_of_training_mode_is_seen_under_every_name(field: str, tmp_path: Path) -> None:
    """A prompt would have one noise for all of its answers: it is not shared then."""
    model: Any = load_causal_lm(Base(name=tiny.save_model(tmp_path, "llama", **{field: 0.1})))
    assert noise_settings(model.config) == [field]
    assert not drops_out(model)
    assert drops_out(model.train())
    setattr(model.config, field, 0.0)
    assert not drops_out(model)


def test_a_classifiers_own_dropout_is_none_of_ours(tmp_path: Path) -> None:
    model: Any = load_causal_lm(Base(name=tiny.save_model(tmp_path, "llama", classifier_dropout=0.1)))
    assert not drops_out(model.train())


def test_configs_within_a_config_count() -> None:
    from transformers import AutoConfig

    config = AutoConfig.for_model("dbrx", attn_config={"attn_pdrop": 0.1}, ffn_config={"moe_jitter_eps": 0.2})
    assert noise_settings(config) == ["attn_config.attn_pdrop", "ffn_config.moe_jitter_eps"]
