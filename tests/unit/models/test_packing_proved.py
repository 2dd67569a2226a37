"""Whether a model tells the sequences of a row apart is tried out, whatever its config says."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences
from rlhf_lit.models import packing, segments
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.packing import hidden_states, layout_of, prove_packing, sequence_states
from rlhf_lit.models.segments import Segments, attention

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2}
LATENT: dict[str, Any] = {
    **SMALL,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "first_k_dense_replace": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "nemotron": SMALL,
    "doge": SMALL,
    "gpt_neox": SMALL,
    "phi3": SMALL,
    "mixtral": SMALL | EXPERTS,
    "qwen3_moe": SMALL | EXPERTS | {"head_dim": 8, "moe_intermediate_size": 16},
    "deepseek_v3": LATENT,
    "glm4_moe_lite": LATENT,
}


def save(folder: Path, kind: str, **overrides: Any) -> str:
    tiny.SIZES.setdefault(kind, KINDS[kind])
    return tiny.save_model(folder, kind, **overrides)


def ragged() -> Sequences:
    return tiny.preferences().sides()


def error(model: nn.Module) -> float:
    """The largest difference between the states of rows in a batch and of each alone, by the size of the states."""
    sequences = ragged()
    with torch.no_grad():
        states = sequence_states(model, sequences)
        worst = 0.0
        for row, length, found in zip(sequences.tokens, sequences.lengths.tolist(), states, strict=True):
            alone = hidden_states(model, row[None, :length])[0]
            worst = max(worst, float((found[:length] - alone).abs().max() / alone.abs().max()))
    return worst


@pytest.mark.parametrize("kind", ["nemotron", "doge"])
@pytest.mark.parametrize("spread", [0.15, 1e-3])
def test_layers_that_drop_the_segments_are_found(kind: str, spread: float, tmp_path: Path) -> None:
    """Nemotron's layers do not hand them on; Doge's make a mask of their own, which the values have a part in."""
    folder = save(tmp_path, kind, spread=spread)
    for model in (load_causal_lm(Base(name=folder)), load_scorer(Base(name=folder))):
        assert layout_of(model) == "padded"
        assert error(model) < 1e-6


def test_attention_that_adds_nothing_yet_does_not_hide_it(tmp_path: Path) -> None:
    """Its last matrix at 0, every state is the same whatever it attends to; after training it would not be."""
    model = load_causal_lm(Base(name=save(tmp_path, "nemotron")))
    for name, weight in model.named_parameters():
        if "o_proj" in name:
            weight.data.zero_()
    prove_packing(model)
    assert layout_of(model) == "padded"
    for name, weight in model.named_parameters():
        if "o_proj" in name:
            nn.init.normal_(weight, std=0.2)
    assert error(model) < 1e-6


@pytest.mark.parametrize("spread", [0.15, 0.02])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_positions_that_run_on_are_found(
    spread: float, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every layer hears of the segments, but a model that counts positions itself puts an answer too far behind."""
    from transformers.models.llama.modeling_llama import LlamaModel

    folder = save(tmp_path, "llama", spread=spread)
    assert layout_of(load_causal_lm(Base(name=folder, dtype=dtype))) == "shared"
    forward = LlamaModel.forward

    def own_positions(self: Any, input_ids: Tensor, position_ids: Any = None, **options: Any) -> Any:
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(LlamaModel, "forward", own_positions)
    if dtype == "float32":  # with fresh weights, bfloat16's rounding is larger than what positions change
        assert layout_of(load_causal_lm(Base(name=folder, dtype=dtype))) == "padded"


@pytest.mark.parametrize("leak", [1.0, 0.3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_second_way_between_tokens_is_found(
    leak: float, dtype: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention keeps the sequences apart; a running mean over the row beside it does not."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    folder = save(tmp_path, "llama")
    forward = LlamaMLP.forward

    def mixing(self: Any, x: Tensor) -> Tensor:
        mean = x.cumsum(-2) / torch.arange(1, x.shape[-2] + 1)[:, None]
        return forward(self, x + leak * mean.to(x.dtype))

    monkeypatch.setattr(LlamaMLP, "forward", mixing)
    assert layout_of(load_causal_lm(Base(name=folder, dtype=dtype))) == "padded"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["gpt_neox", "phi3", "mixtral", "qwen3_moe", "deepseek_v3", "glm4_moe_lite"])
def test_models_that_hear_of_them_stay_packed(kind: str, dtype: Any, tmp_path: Path) -> None:
    """Experts that rounding may change, and keys wider than values, among them."""
    model = load_causal_lm(Base(name=save(tmp_path, kind), dtype=dtype))
    assert layout_of(model) == "shared"
    if dtype == "float32":
        assert error(model) < 2e-6


def test_deep_weights_in_half_width_stay_packed(tmp_path: Path) -> None:
    folder = save(tmp_path, "llama", spread=0.3, num_hidden_layers=24, hidden_size=64, num_attention_heads=4)
    for dtype in ("bfloat16", "float32"):
        assert layout_of(load_causal_lm(Base(name=folder, dtype=dtype))) == "shared"  # type: ignore[arg-type]


def test_it_is_tried_once_and_draws_nothing(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy and an adapter's wrapper know it too; training mode and evaluation ask the model for nothing."""
    before = torch.get_rng_state()
    model = load_causal_lm(Base(name=llama))
    assert torch.get_rng_state().equal(before)
    wrapped = load_causal_lm(Base(name=llama, lora=LoRA(rank=4)))

    def again(model: nn.Module) -> None:
        raise AssertionError("tried a second time")

    monkeypatch.setattr(packing, "prove_packing", again)
    for known in (model, copy.deepcopy(model), wrapped, load_scorer(Base(name=llama))):
        assert layout_of(known) == "shared"
        assert layout_of(known.train()) == "shared"
    assert vars(unwrapped(wrapped))["tells_segments_apart"]


@pytest.mark.parametrize("field", ["attention_dropout", "attn_pdrop", "attention_probs_dropout_prob", "attn_dropout"])
def test_dropout_of_attention_is_seen_under_any_name(field: str, tmp_path: Path) -> None:
    model = load_causal_lm(Base(name=save(tmp_path, "llama", **{field: 0.1})))
    assert layout_of(model) == "shared"
    assert layout_of(model.train()) == "padded"


@pytest.mark.parametrize("widths", [(24, 16), (16, 16), (20, 12), (192, 128)])
def test_the_kernel_of_one_width_is_given_one(widths: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Latent attention has wider keys than values, 192 and 128 in DeepSeek-V3. A kernel stands in that takes what the
    real one does: as wide as each other, a multiple of 8, and at most 256."""
    import torch.nn.attention.varlen as varlen

    given: list[int] = []

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int,
        *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
    ) -> Tensor:  # fmt: skip
        assert q.shape[-1] == k.shape[-1] == v.shape[-1]
        assert q.shape[-1] % 8 == 0
        assert q.shape[-1] <= 256
        given.append(q.shape[-1])
        found = []
        for i in range(len(cu_q) - 1):
            query, key, value = (x[a[i] : a[i + 1]].transpose(0, 1) for x, a in ((q, cu_q), (k, cu_k), (v, cu_k)))
            seen = torch.ones(query.shape[1], key.shape[1], dtype=torch.bool).tril(key.shape[1] - query.shape[1])
            out = nn.functional.scaled_dot_product_attention(
                query[None], key[None], value[None], attn_mask=seen, scale=scale, enable_gqa=True
            )
            found.append(out[0].transpose(0, 1))
        return torch.cat(found)

    monkeypatch.setattr(varlen, "varlen_attn", kernel)
    generator = torch.Generator().manual_seed(0)
    row = Segments.of(torch.tensor([9, 3, 5, 4]), torch.tensor([0, 6, 6, 0]), torch.device("cpu"))
    keys, values = widths
    q, k, v = (
        torch.randn(1, heads, 21, width, generator=generator, dtype=torch.float64)
        for heads, width in ((4, keys), (2, keys), (2, values))
    )
    for scale in (None, 0.3):
        found = segments._in_one_kernel(q, k, v, row, scale)
        expected, _ = attention(nn.Module(), q, k, v, None, row, scaling=scale)
        assert found.shape == (1, 21, 4, values)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert len(given) == 2
