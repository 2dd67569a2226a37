"""Weights handed to another engine: name for name and bit for bit what a merged model's own checkpoint holds."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm
from rlhf_lit.models.merging import merged_weights
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.models.roles import Roles

EXPERTS: dict[str, Any] = {**tiny.SIZES["qwen2"], "num_experts_per_tok": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),  # Conv1D: weights lie transposed
    "mixtral": ("mixtral", {**EXPERTS, "num_local_experts": 4}),  # experts are stacked in memory, apart in files
}
ATTENTION = ["q_proj", "v_proj"]


def load(folder: Path, kind: str, **settings: Any) -> Any:
    model_type, overrides = KINDS[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SIZES, "mixtral", EXPERTS)
        name = tiny.save_model(folder / "model", model_type, **overrides)
    model = load_causal_lm(Base(name, **settings))
    tiny.disturb(model, 0.1)
    return model


def checkpoint(model: Any, folder: Path) -> dict[str, Tensor]:
    """What save_pretrained writes."""
    model.save_pretrained(folder)
    return {name: weight for file in folder.glob("*.safetensors") for name, weight in load_file(file).items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_models_weights_are_its_checkpoint(tmp_path: Path, kind: str) -> None:
    model = load(tmp_path, kind)
    assert_equal(dict(merged_weights(model)), checkpoint(model, tmp_path / "out"))


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("llama", LoRA(rank=4)),
        ("llama", LoRA(rank=4, rslora=True, targets=["q_proj", "down_proj"])),
        ("llama", LoRA(rank=4, dora=True)),
        ("tied", LoRA(rank=4)),
        ("gpt2", LoRA(rank=4)),
        ("mixtral", LoRA(rank=4, targets=ATTENTION)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"dora={value.dora}",
)
def test_an_adapters_weights_are_the_merged_models_checkpoint(tmp_path: Path, kind: str, lora: LoRA) -> None:
    model = load(tmp_path, kind, lora=lora)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    ours = dict(merged_weights(model))
    assert all(weight.equal(before[name]) for name, weight in model.state_dict().items())
    assert_equal(ours, checkpoint(copy.deepcopy(model).merge_and_unload(), tmp_path / "out"))


def test_of_several_adapters_the_policys_is_merged(tmp_path: Path, llama: str) -> None:
    roles = Roles(Base(llama, lora=LoRA(rank=4)))
    tiny.disturb(roles, 0.1)
    alone = dict(merged_weights(roles.policy))
    roles.add_reference(own=True)
    with torch.no_grad():
        for name, weight in roles.policy.named_parameters():
            if ".reference." in name:
                weight.add_(1)
    assert_equal(dict(merged_weights(roles.policy)), alone)


@pytest.mark.parametrize("targets", ["all-linear", ATTENTION])
def test_4_bit_weights_come_as_what_they_stand_for(tmp_path: Path, targets: Any) -> None:
    """A plain model with these weights computes the 4-bit one's logits, to the rounding of the sum's order."""
    lora, quantization = LoRA(rank=4, targets=targets), Quantization(compute_dtype="float32")
    # 4-bit blocks are 64 numbers: a width that holds whole ones.
    model = load(tmp_path, "llama", lora=lora, quantization=quantization)
    plain = copy.deepcopy(load_causal_lm(Base(str(tmp_path / "model"))))
    result = unwrapped(plain).load_state_dict(dict(merged_weights(model)), strict=False)
    assert not result.unexpected_keys
    assert not result.missing_keys
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        expected, found = model(tokens).logits, plain(tokens).logits
        base = load_causal_lm(Base(str(tmp_path / "model")))(tokens).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    assert float((base - expected).abs().max()) > 0.1


def test_a_sum_comes_in_the_wider_dtype(tmp_path: Path) -> None:
    """bfloat16 has 8 bits: added in it a small update would vanish."""
    model = load(tmp_path, "llama", lora=LoRA(rank=4, targets=ATTENTION), dtype="bfloat16")
    weights = dict(merged_weights(model))
    layer = unwrapped(model).model.layers[0].self_attn.q_proj
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight.float() + layer.scaling["default"] * (b @ a)
    torch.testing.assert_close(weights["model.layers.0.self_attn.q_proj.weight"], expected, rtol=0, atol=1e-6)
    assert weights["model.layers.0.mlp.up_proj.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("target", "copies"), [("embed_tokens", False), ("lm_head", False), ("embed_tokens", True), ("lm_head", True)]
)
def test_a_reader_with_a_head_of_its_own_gets_both_ends(tmp_path: Path, target: str, copies: bool) -> None:
    """An adapter on one end of tied weights, or a copy of it, is on that end alone; a plain model with these weights,
    no longer tied, computes the same logits."""
    targets = {"targets": ["q_proj"], "modules_to_save": [target]} if copies else {"targets": ["q_proj", target]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, on adapters of tied weights
        model = load(tmp_path, "tied", lora=LoRA(rank=4, **targets))
    with pytest.raises(UserError, match=r"base\.lora\.(targets|modules_to_save): the embeddings and the LM head"):
        next(merged_weights(model))
    ours = dict(merged_weights(model, own_head=True))
    assert not ours["lm_head.weight"].equal(ours["model.embed_tokens.weight"])
    config = copy.deepcopy(unwrapped(model).config)
    config.tie_word_embeddings = False
    plain = type(unwrapped(model))(config)
    plain.load_state_dict(ours)
    tokens = torch.arange(3, 23)[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(tokens).logits, model(tokens).logits, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["tied", "llama"])
def test_a_reader_with_a_head_of_its_own_gets_each_weight_once(tmp_path: Path, kind: str) -> None:
    model = load(tmp_path, kind)
    names = [name for name, _ in merged_weights(model, own_head=True)]
    assert len(set(names)) == len(names)
    assert set(names) == {"lm_head.weight", *dict(merged_weights(model))}


def test_what_cannot_be_merged_is_refused(tmp_path: Path) -> None:
    tied = load(tmp_path / "tied", "tied", lora=LoRA(rank=4, targets=["embed_tokens"]))
    with pytest.raises(UserError, match=r"base\.lora\.targets: the embeddings and the LM head share"):
        next(merged_weights(tied))
    stacked = load(tmp_path / "mixtral", "mixtral", lora=LoRA(rank=4))
    with pytest.raises(UserError, match=r"base\.lora\.targets: an adapter on stacked experts \(model\.layers\.0"):
        next(merged_weights(stacked))
