"""Stacked experts in 4 bits: the model that its dequantised weights make, with their gradients, in a fraction of the
memory."""

import copy
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf_lit.memory.gauges import LiveBytes, tensors_of
from rlhf_lit.models import experts as room
from rlhf_lit.models.anatomy import body_of, unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.flops import _weights
from rlhf_lit.models.foundation import fingerprint
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.merging import merged_weights
from rlhf_lit.models.quantization import Quantization

ATTENTION = ["q_proj", "v_proj"]
NF4 = Quantization(compute_dtype="float32")
MORE = {"num_experts_per_tok": 2, "moe_intermediate_size": 64}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": {},  # all-linear: peft's adapters stand on the experts and the router too
    "qwen3_moe": {**tiny.SIZES["qwen3"], **MORE, "num_experts": 4},
    "gpt_oss": {**tiny.SIZES["qwen3"], "num_local_experts": 4, "num_experts_per_tok": 2},  # transposed, with biases
    "granitemoe": {**tiny.SIZES["qwen2"], "num_local_experts": 4, "num_experts_per_tok": 2},
    "llama4_text": {},
}


def saved(folder: Path, kind: str) -> str:
    tiny.SIZES.setdefault(kind, KINDS[kind])
    return tiny.save_model(folder, kind)


def dequantized(folder: str, to: Path) -> str:
    """The folder again, its weights what its 4-bit ones stand for, as another tool would write them."""
    model = load_causal_lm(Base(folder, lora=LoRA(rank=2, targets=ATTENTION), quantization=NF4))
    shutil.copytree(folder, to)
    weights = {name: weight.clone().contiguous() for name, weight in merged_weights(model)}
    save_file(weights, to / "model.safetensors", metadata={"format": "pt"})
    return str(to)


def packed(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: w for name, w in model.named_parameters() if ".experts." in name and hasattr(w, "quant_state")}


def gradients(base: Base) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(0)
    model = load_causal_lm(base)
    tiny.disturb(model, 0.05)
    model.train()
    names = {name for name, _ in model.named_parameters()}
    values = token_logprobs(model, tiny.sequences(tiny.RAGGED))
    values.sum().backward()
    assert {name for name, _ in model.named_parameters()} == names
    assert torch.equal(token_logprobs(model, tiny.sequences(tiny.RAGGED)), values), "a pass leaves the weights alone"
    return values.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    ("kind", "targets"),
    [
        pytest.param(kind, targets, marks=[pytest.mark.soak] * (kind not in quick))
        for targets, quick in (("all-linear", ("mixtral",)), (ATTENTION, ("gpt_oss",)))
        for kind in KINDS
    ],
)
def test_it_is_the_model_of_the_dequantised_weights(kind: str, targets: Any, tmp_path: Path) -> None:
    """Values and gradients, with and without gradient checkpointing."""
    folder = saved(tmp_path / "base", kind)
    adapters = LoRA(rank=2, targets=targets)
    whole, expected = gradients(Base(dequantized(folder, tmp_path / "whole"), lora=adapters))
    for recompute in (False, True):
        base = Base(folder, lora=adapters, quantization=NF4, gradient_checkpointing=recompute)
        values, found = gradients(base)
        torch.testing.assert_close(values, whole, rtol=0, atol=2e-6)
        assert found.keys() == expected.keys()
        size = max(float(gradient.abs().max()) for gradient in expected.values())
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=0, atol=2e-6 * size, msg=name)
    on_experts = any("experts" in name for name in expected)
    assert on_experts == (targets == "all-linear" and kind in ("mixtral", "qwen3_moe"))
    model = load_causal_lm(Base(folder, lora=adapters, quantization=NF4))
    assert len(packed(model)) == 4, "two tensors in each of two layers"


def test_nf4_is_near_the_full_weights_and_not_equal(tmp_path: Path) -> None:
    """Its mean error is a tenth of a weight's size, also in rows of half a block, where the CPU's kernel is wrong."""
    folder = saved(tmp_path / "base", "mixtral")
    model = load_scorer(Base(folder, quantization=NF4), frozen=True)
    full = dict(load_causal_lm(Base(folder)).named_parameters())
    for name, weight in packed(model).items():
        found = room._dequantized(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2])
        error = (found - full[name]).norm() / full[name].norm()
        assert 0.05 < float(error) < 0.12
        assert found.dtype == torch.float32
        assert weight.quant_state.quant_type == "nf4"
        assert weight.quant_state.nested


def test_experts_are_held_in_four_bits(tmp_path: Path) -> None:
    """As the memory planner counts them, constants included: 4.13 bits a number, and 4.5 with single constants."""
    folder = tiny.save_model(tmp_path, "mixtral", hidden_size=128, intermediate_size=256)
    for double, bits in ((True, 4.2), (False, 4.52)):
        model = load_scorer(Base(folder, quantization=replace(NF4, double=double)), frozen=True)
        held = [tensor for name, tensor in tensors_of(model) if ".experts." in name]
        numbers = sum(weight.quant_state.shape.numel() for weight in packed(model).values())
        assert numbers == 2 * 4 * 3 * 128 * 256
        size = sum(tensor.numel() * tensor.element_size() for tensor in held)
        tables = 16 * 2 * len(packed(model)) * 4 + 256 * len(packed(model)) * 4  # the codes of 4 and 8 bits
        assert 4 < 8 * size / numbers < bits + 8 * tables / numbers


def test_between_the_passes_no_dequantised_layer_is_held(tmp_path: Path) -> None:
    """Autograd would keep one of each layer until the backward pass; a layer's are there while it computes."""
    layers, sizes = 4, {"hidden_size": 64, "intermediate_size": 512}
    folder = tiny.save_model(tmp_path, "mixtral", num_hidden_layers=layers, **sizes)
    model = load_causal_lm(Base(folder, lora=LoRA(rank=2, targets=ATTENTION), quantization=NF4)).train()
    layer = 4 * 4 * 3 * 64 * 512  # bytes of a layer's experts in float32
    gauge = LiveBytes()
    gauge.see(tensor for _, tensor in tensors_of(model))
    held = gauge.live
    with gauge:
        loss = token_logprobs(model, tiny.sequences([(1, 1)])).sum()
        after_forward = gauge.live - held
        loss.backward()
    assert after_forward < layer / 2
    assert layer / 2 < gauge.peak - held < 2 * layer
    assert room._BACKWARD.experts is None
    assert not room._BACKWARD.weights


def test_a_reference_copy_and_a_move_keep_them(tmp_path: Path) -> None:
    folder = saved(tmp_path, "mixtral")
    model = load_scorer(Base(folder, quantization=NF4), frozen=True)
    sequences = tiny.sequences(tiny.RAGGED)
    copied = copy.deepcopy(model).to("cpu")
    with torch.no_grad():
        expected = body_of(model)(sequences.tokens).last_hidden_state
        assert torch.equal(body_of(copied)(sequences.tokens).last_hidden_state, expected)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_an_adapter_knows_its_base_and_is_exported_on_it(kind: str, tmp_path: Path) -> None:
    """The fingerprint takes them for 4-bit weights, by name and shape, with adapters and without."""
    folder = saved(tmp_path / "base", kind)
    plain = load_scorer(Base(folder, quantization=NF4), frozen=True)
    adapted = load_causal_lm(Base(folder, lora=LoRA(rank=2), quantization=NF4))
    assert fingerprint(body_of(plain)) == fingerprint(body_of(unwrapped(adapted)))
    assert fingerprint(body_of(plain)) != fingerprint(body_of(load_scorer(Base(folder))))


def test_operations_are_counted_by_what_the_bytes_stand_for(tmp_path: Path) -> None:
    folder = saved(tmp_path, "mixtral")
    counted = [_weights(load_scorer(Base(folder, quantization=q), frozen=True), None)[0].all for q in (None, NF4)]
    assert counted[0] == counted[1]


def test_the_head_stays_whole_under_every_name(tmp_path: Path) -> None:
    """RWKV calls it `head`, and a tied one would be quantised apart from its embeddings."""
    folder = tiny.save_model(tmp_path, "rwkv")
    model = load_causal_lm(Base(folder, lora=LoRA(rank=2), quantization=NF4))
    assert unwrapped(model).head.weight.dtype == torch.float32


def test_a_linear_layer_by_another_name_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Falcon's, which transformers passes by."""
    tiny.SIZES.setdefault("falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4})
    folder = tiny.save_model(tmp_path, "falcon")
    model = load_causal_lm(Base(folder, lora=LoRA(rank=2), quantization=NF4))
    assert sum(hasattr(weight, "quant_state") for weight in model.parameters()) == 8
    assert "note" not in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["mamba2", pytest.param("falcon_h1", marks=pytest.mark.soak)])
def test_what_kernels_read_themselves_has_neither_adapters_nor_4_bits(kind: str, tmp_path: Path) -> None:
    model = load_causal_lm(Base(tiny.save_model(tmp_path, kind), lora=LoRA(rank=2), quantization=NF4))
    layers = {name: part for name, part in model.named_modules() if name.endswith((".out_proj", ".in_proj"))}
    assert {name.rpartition(".")[2] for name in layers} == {"out_proj", "in_proj"}
    for name, part in layers.items():
        assert hasattr(part, "lora_A") == name.endswith("in_proj")
        assert any(hasattr(w, "quant_state") for w in part.parameters()) == name.endswith("in_proj")


def test_what_stays_wide_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where an architecture's large matrices are neither linear layers nor experts."""
    load_scorer(Base(saved(tmp_path / "mixture", "mixtral"), quantization=NF4), frozen=True)
    assert "note" not in capsys.readouterr().err
    folder = tiny.save_model(tmp_path / "griffin", "recurrent_gemma", lru_width=64)
    load_scorer(Base(folder, quantization=NF4), frozen=True)
    said = capsys.readouterr().err
    assert re.search(
        r"note: base.quantization leaves [0-9.]+ MB of the layers in full width, such as model.*gate", said
    )
