"""What makes a reference another one, and what does not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import nn

from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.models.roles import Roles
from rlhf_lit.reference_cache import identity
from rlhf_lit.reference_cache.identity import identify

ADAPTER = LoRA(rank=4, alpha=8.0)


def digest_of(base: Base) -> str:
    return identify(load_causal_lm(base)).digest


def of_role(roles: Roles, role: str) -> str:
    with roles.acting(role) as model:
        return identify(model).digest


def trained(base: Base) -> Roles:
    """A policy whose adapter has left zero, with the reference that it had before."""
    torch.manual_seed(0)  # A is drawn from the global generator
    roles = Roles(base, reference=True)
    tiny.disturb(roles.policy, 0.1)
    return roles


@pytest.fixture(scope="module")
def plain(llama: str) -> str:
    return digest_of(Base(llama))


def test_every_single_weight_counts(llama: str, plain: str) -> None:
    model = load_causal_lm(Base(llama))
    seen = {plain}
    for name, weight in model.named_parameters():
        last = weight.data.view(-1)[-1:]
        before = last.clone()
        last.copy_(torch.nextafter(before, torch.tensor(9.0)))
        seen.add(identify(model).digest)
        last.copy_(before)
        assert len(seen) > 1, name
    assert len(seen) == 1 + len(list(model.parameters()))
    assert identify(model).digest == plain


def test_a_weight_counts_in_the_dtype_it_has(llama: str, plain: str) -> None:
    widened = load_causal_lm(Base(llama, dtype="bfloat16"))
    narrow = identify(widened)
    assert narrow.description["dtype"] == "bfloat16"
    assert len({plain, narrow.digest, identify(widened.float()).digest}) == 3


def test_a_buffer_counts_where_it_is_kept_with_the_weights(llama: str, plain: str) -> None:
    model = load_causal_lm(Base(llama))
    model.model.register_buffer("passing", torch.ones(2), persistent=False)
    assert identify(model).digest == plain
    model.model.register_buffer("kept", torch.ones(2))
    with_ones = identify(model).digest
    model.model.kept[1] = 2
    assert len({plain, with_ones, identify(model).digest}) == 3


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
        ("llama", {"rms_norm_eps": 1e-5}),
        ("llama", {"hidden_act": "gelu"}),
        ("gemma2", {"final_logit_softcapping": 4.0}),
        ("gemma2", {"sliding_window": 8}),
        ("granite", {"logits_scaling": 2.0}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else value,
)
def test_what_changes_the_function_counts(tmp_path: Path, kind: str, change: dict[str, Any]) -> None:
    before = digest_of(Base(tiny.save_model(tmp_path / "before", kind)))
    (tmp_path / "after").mkdir()
    for file in (tmp_path / "before").iterdir():
        (tmp_path / "after" / file.name).write_bytes(file.read_bytes())
    config = tmp_path / "after" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    assert digest_of(Base(str(tmp_path / "after"))) != before


def test_names_versions_and_ways_of_computing_do_not_count(llama: str, plain: str, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for file in Path(llama).iterdir():
        (moved / file.name).write_bytes(file.read_bytes())
    config = json.loads((moved / "config.json").read_text())
    beside = {"transformers_version": "4.0", "use_cache": False, "initializer_range": 0.5, "pad_token_id": 2}
    (moved / "config.json").write_text(json.dumps(config | beside))
    assert digest_of(Base(str(moved), attention="eager", gradient_checkpointing=True)) == plain


def test_tied_weights_count_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tied = load_causal_lm(Base(tiny.save_model(tmp_path / "tied", tie_word_embeddings=True)))
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    read = []
    content = identity._content
    monkeypatch.setattr(identity, "_content", lambda weight: read.append(weight) or content(weight))
    found = identify(tied)
    assert len(read) == len(list(tied.parameters()))
    assert found.description["weights"] == sum(weight.numel() for weight in tied.parameters())
    with torch.no_grad():
        tied.lm_head.weight[3, 3] += 1
    assert identify(tied).digest != found.digest


def test_adapters_off_are_the_base_alone(llama: str, plain: str) -> None:
    for adapter in (ADAPTER, LoRA(rank=2, dora=True), LoRA(rank=2, targets=["q_proj", "embed_tokens"])):
        roles = trained(Base(llama, lora=adapter))
        assert of_role(roles, "reference") == plain
        assert of_role(roles, "policy") != plain
        with roles.acting("reference") as model:
            found = identify(model).description
        assert found["adapter"] is None
        assert found["weights"] == sum(weight.numel() for weight in load_causal_lm(Base(llama)).parameters())


def test_a_frozen_copy_is_the_base(llama: str, plain: str) -> None:
    roles = trained(Base(llama))
    assert of_role(roles, "reference") == plain
    assert of_role(roles, "policy") != plain


@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["full", "4-bit"])
def test_an_adapter_counts_by_its_content_and_not_by_its_name(
    llama: str, tmp_path: Path, quantization: Quantization | None
) -> None:
    """The reference after a LoRA stage is a copy of that stage's adapter under a name of its own."""
    before = trained(Base(llama, lora=ADAPTER, quantization=quantization))
    stage = of_role(before, "policy")
    before.policy.save_pretrained(tmp_path / "stage")
    base = Base(str(tmp_path / "stage"), quantization=quantization)
    after = trained(base)
    assert set(after.policy.peft_config) == {"default", "reference"}
    assert of_role(after, "reference") == stage
    assert of_role(after, "policy") != stage
    with after.acting("reference") as model:
        assert identify(model).description["adapter"] == "rank 4 on 14 layers"


def changed(roles: Roles, change: Callable[[Any], None]) -> str:
    layer = next(module for module in roles.policy.modules() if hasattr(module, "lora_A"))
    change(layer)
    return of_role(roles, "policy")


@pytest.mark.parametrize("part", ["norm", "lm_head", "embed_tokens"])
@pytest.mark.parametrize("tied", [False, True], ids=["apart", "tied"])
def test_of_a_module_that_an_adapter_trains_in_full_the_one_in_force_counts(
    tmp_path: Path, part: str, tied: bool
) -> None:
    """A resumed run's reference is the one it began with, wherever its policy's copies are by then."""
    base = Base(tiny.save_model(tmp_path / "model", "qwen2", tie_word_embeddings=tied))
    bare = digest_of(base)
    roles = Roles(Base(base.name, lora=LoRA(rank=4, alpha=8.0, modules_to_save=[part])), reference=True)
    before = of_role(roles, "policy")
    assert of_role(roles, "reference") == bare
    with torch.no_grad():
        for name, weight in roles.policy.named_parameters():
            if ".modules_to_save." in name:
                weight.add_(0.1)
    assert of_role(roles, "reference") == bare
    assert of_role(roles, "policy") != before


def test_each_part_of_an_adapter_counts(llama: str) -> None:
    def scaled(layer: Any) -> None:
        layer.scaling["default"] *= 2

    def of_another_a(layer: Any) -> None:
        layer.lora_A["default"].weight.data[0, 0] += 1e-3

    def of_another_b(layer: Any) -> None:
        layer.lora_B["default"].weight.data[0, 0] += 1e-3

    base = Base(llama, lora=ADAPTER)
    seen = {of_role(trained(base), "policy")}
    seen |= {changed(trained(base), change) for change in (scaled, of_another_a, of_another_b)}
    assert len(seen) == 4

    def of_another_magnitude(layer: Any) -> None:
        layer.lora_magnitude_vector["default"].weight.data[0] += 1e-3

    magnitudes = Base(llama, lora=LoRA(rank=4, alpha=8.0, dora=True))
    seen |= {of_role(trained(magnitudes), "policy"), changed(trained(magnitudes), of_another_magnitude)}
    assert len(seen) == 6

    def of_another_embedding(layer: Any) -> None:
        layer.lora_embedding_A["default"].data[0, 0] += 1e-3

    embeddings = Base(llama, lora=LoRA(rank=4, alpha=8.0, targets=["embed_tokens"]))
    seen |= {of_role(trained(embeddings), "policy"), changed(trained(embeddings), of_another_embedding)}
    assert len(seen) == 8


def test_scaling_counts_however_it_came_about(llama: str) -> None:
    """α/√r = 16/2 and α/r = 32/4 are the same multiple of the same product."""
    rslora = of_role(trained(Base(llama, lora=LoRA(rank=4, alpha=16.0, rslora=True))), "policy")
    assert of_role(trained(Base(llama, lora=LoRA(rank=4, alpha=32.0))), "policy") == rslora
    assert of_role(trained(Base(llama, lora=LoRA(rank=4, alpha=16.0))), "policy") != rslora


def test_the_number_format_of_the_forward_counts(llama: str, plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_causal_lm(Base(llama))
    with torch.autocast("cpu", torch.bfloat16):
        mixed = identify(model)
    with torch.autocast("cpu", torch.float16):
        half = identify(model)
    assert mixed.description["compute"] == "bfloat16 autocast"
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: "high")
    assert len({plain, mixed.digest, half.digest, identify(model).digest}) == 4


def test_autocast_counts_before_the_model_is_where_it_will_compute(llama: str) -> None:
    """A model that is still on the CPU, under a GPU's precision."""
    model = load_causal_lm(Base(llama))
    with torch.autocast("cpu", torch.bfloat16):
        there = identify(model).digest
    dtype = torch.get_autocast_dtype("cuda")
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_enabled("cuda", True)
    try:
        assert identify(model).digest == there
    finally:
        torch.set_autocast_enabled("cuda", False)
        torch.set_autocast_dtype("cuda", dtype)


def test_4_bit_weights_count_by_their_bits(llama: str, plain: str) -> None:
    def load(**settings: Any) -> Any:
        return load_causal_lm(Base(llama, lora=ADAPTER, quantization=Quantization(**settings)))

    model = load()
    with model.disable_adapter():
        found = identify(model)
    assert found.description["quantization"] == "nf4 double"
    assert found.description["weights"] == sum(w.numel() for w in load_causal_lm(Base(llama)).parameters())
    seen = {plain}
    for settings in ({}, {"type": "fp4"}, {"double": False}, {"compute_dtype": "float32"}):
        other = load(**settings)
        with other.disable_adapter():
            seen.add(identify(other).digest)
    assert found.digest in seen
    assert len(seen) == 5
    projection = unwrapped(model).model.layers[1].mlp.up_proj.base_layer.weight
    with model.disable_adapter():
        projection.data[5] ^= 1
        assert identify(model).digest not in seen
        projection.data[5] ^= 1
        assert identify(model).digest == found.digest
        projection.quant_state.absmax[0] ^= 1
        assert identify(model).digest not in seen


def test_weights_are_read_in_pieces(llama: str, plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(identity, "PIECE", 100)
    assert digest_of(Base(llama)) == plain


def test_a_weight_in_another_layout_is_the_same_weight(llama: str, plain: str) -> None:
    model = load_causal_lm(Base(llama))
    head = model.lm_head.weight
    head.data = head.data.t().contiguous().t()
    assert not head.is_contiguous()
    assert identify(model).digest == plain


class Hand(nn.Module):
    """A model made by hand, of 12 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(to_dict=lambda: {"eps": 1e-6, "rope": {"theta": 1e4}}, name_or_path="by hand")
        self.layer = nn.Linear(3, 3)
        self.layer.weight = nn.Parameter(torch.arange(9.0).view(3, 3))
        self.layer.bias = nn.Parameter(torch.tensor([-1.0, 0.5, 2.0], dtype=torch.bfloat16))


def test_every_process_finds_the_same() -> None:
    """As another one found it: nothing of a process, its hash seed or its addresses enters."""
    assert identify(Hand()).digest == "702a0014732cd95f0f223f55e3b521a6"
