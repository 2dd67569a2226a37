"""Every key of a model's files is used, or the model is refused by that key's name."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_lit.algorithms import SFT, RewardModel
from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.models.saving import save_hf

LOADERS = {"language model": load_causal_lm, "reward model": load_scorer}
loaded_as = pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)


def altered(folder: str, change: Callable[[dict[str, Tensor]], object]) -> str:
    """The folder, its file of weights changed as another tool might have left it."""
    file = Path(folder) / "model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})
    return folder


def without(part: str) -> Callable[[dict[str, Tensor]], object]:
    return lambda weights: [weights.pop(key) for key in list(weights) if part in key]


@loaded_as
@pytest.mark.parametrize("base", [{}, {"lora": LoRA(rank=2)}, {"lora": LoRA(rank=2), "quantization": Quantization()}])
def test_a_body_with_holes_is_refused(load: Callable[[Base], object], base: dict[str, object], tmp_path: Path) -> None:
    """transformers fills them at random."""
    folder = altered(tiny.save_model(tmp_path, "qwen2"), without("layers.1.mlp"))
    named = r"it lacks model\.layers\.1\.mlp\.down_proj\.weight, model\.layers\.1\.mlp\.gate_proj\.weight, model"
    with pytest.raises(UserError, match=named):
        load(Base(folder, **base))  # type: ignore[arg-type]


def test_of_many_missing_keys_some_are_named(tmp_path: Path) -> None:
    folder = altered(tiny.save_model(tmp_path), without("layers."))
    with pytest.raises(UserError, match=r"input_layernorm\.weight, .* and 15 more$"):
        load_scorer(Base(folder))


def test_an_adapters_base_with_holes_is_refused(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    save_hf(tiny.build(RewardModel(Base(base, lora=LoRA(rank=2)))), tmp_path / "hf")
    altered(base, without("layers.0.self_attn.v_proj"))
    with pytest.raises(UserError, match=r"base' is no whole model, it lacks model\.layers\.0\.self_attn\.v_proj"):
        load_scorer(Base(str(tmp_path / "hf")), trained=True)


@loaded_as
def test_weights_without_a_place_are_refused(load: Callable[[Base], object], tmp_path: Path) -> None:
    """A value head as trl leaves it beside a policy's weights."""
    folder = altered(
        tiny.save_model(tmp_path), lambda weights: weights.update({"v_head.summary.weight": torch.ones(1, 32)})
    )
    with pytest.raises(UserError, match=r"has no place for: v_head\.summary\.weight"):
        load(Base(folder))


@loaded_as
def test_weights_of_another_shape_are_named(load: Callable[[Base], object], tmp_path: Path) -> None:
    folder = altered(tiny.save_model(tmp_path), lambda weights: weights.update({"model.norm.weight": torch.ones(31)}))
    with pytest.raises(UserError, match=r"model\.norm\.weight of \[31\], where \[32\] is expected$"):
        load(Base(folder))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_what_a_reward_model_may_lack_and_leave_over(kind: str, tied: bool, tmp_path: Path) -> None:
    """No score head yet, and the LM head of the language model; and of tied weights a copy."""
    folder = tiny.save_model(tmp_path, kind, tie_word_embeddings=tied)
    if tied:
        altered(folder, lambda weights: weights.update({"lm_head.weight": next(iter(weights.values())).clone()}))
        altered(folder, lambda weights: weights.update({"lm_head.weight": embeddings(weights).clone()}))
    body = unwrapped(load_scorer(Base(folder))).base_model.state_dict()
    expected = unwrapped(load_causal_lm(Base(folder))).base_model.state_dict()
    assert all(torch.equal(body[key], expected[key]) for key in expected)


def embeddings(weights: dict[str, Tensor]) -> Tensor:
    return next(weight for key, weight in weights.items() if "embed_tokens" in key or "wte" in key)


@pytest.mark.parametrize("kind", ["qwen2", "gpt2"])
def test_a_reward_model_with_tied_embeddings_is_no_language_model(kind: str, tmp_path: Path) -> None:
    """It lacks no weight of one: its LM head would be its embeddings."""
    base = tiny.save_model(tmp_path / "base", kind, tie_word_embeddings=True)
    save_hf(tiny.build(RewardModel(Base(base))), tmp_path / "reward")
    with pytest.raises(UserError, match=r"has no place for: score\.weight; it is a reward model"):
        load_causal_lm(Base(str(tmp_path / "reward")))


def test_a_classifier_of_several_labels_is_no_reward_model(tmp_path: Path) -> None:
    from transformers import LlamaForSequenceClassification

    folder = tiny.save_model(tmp_path)
    LlamaForSequenceClassification.from_pretrained(folder, num_labels=3).save_pretrained(folder)
    with pytest.raises(UserError, match=r"score\.weight of \[3, 32\], where \[1, 32\] is expected; a score head with"):
        load_scorer(Base(folder))


@loaded_as
@pytest.mark.parametrize("left", [0, 0.5])
def test_a_broken_file_is_one_line(load: Callable[[Base], object], left: float, tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(left * file.stat().st_size)])
    with pytest.raises(UserError, match=r"a weights file of .* is broken \(.*\); copy or download it anew"):
        load(Base(folder))


def test_a_float16_folder_is_loaded_and_saved_in_the_width_that_is_asked_for(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = tiny.save_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).save_pretrained(folder)
    assert json.loads((tmp_path / "base" / "config.json").read_text())["dtype"] == "float16"
    module = tiny.build(SFT(Base(folder)))
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    save_hf(module, tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "float32"
    assert all(weight.dtype == torch.float32 for weight in load_file(tmp_path / "hf" / "model.safetensors").values())


@pytest.mark.parametrize("lora", [None, LoRA(rank=2)])
def test_what_computes_in_float16_does_not_train(lora: LoRA | None, llama: str) -> None:
    for algorithm in (SFT, RewardModel):
        with pytest.raises(UserError, match=r"^base\.dtype: float16 weights do not train, .* set it to bfloat16"):
            algorithm(Base(llama, dtype="float16", lora=lora))
    with pytest.raises(UserError, match=r"^base\.quantization\.compute_dtype: .*float16 does not train"):
        SFT(Base(llama, lora=LoRA(), quantization=Quantization(compute_dtype="float16")))
    load_scorer(Base(llama, dtype="float16"), frozen=True)  # what is frozen may be


def test_small_gradients_are_lost_in_float16_and_kept_in_bfloat16(tmp_path: Path) -> None:
    """Why it is refused: adapters' gradients of a micro-batch's part of a batch of 100 000 tokens, on a frozen base."""
    from rlhf_lit.models.logprobs import token_logprobs

    folder, found = tiny.save_model(tmp_path, "qwen2", hidden_size=64, spread=0.02), {}
    for dtype in ("float32", "bfloat16", "float16"):
        torch.manual_seed(0)
        model = load_causal_lm(Base(folder, dtype=dtype, lora=LoRA(rank=2)))
        tiny.disturb(model, 0.02)
        (token_logprobs(model, tiny.sequences(tiny.RAGGED)).sum() / 100_000).backward()
        found[dtype] = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])
    size = found["float32"].norm()
    assert float((found["bfloat16"] - found["float32"]).norm() / size) < 0.05
    assert float((found["float16"] - found["float32"]).norm() / size) > 0.1


@pytest.mark.parametrize("load", [load_causal_lm, load_scorer])
def test_evaluating_changes_no_weight(load: Callable[[Base], torch.nn.Module], tmp_path: Path) -> None:
    """RWKV's later layers would be halved in place by the first pass in eval mode, and saved so."""
    folder = tiny.save_model(tmp_path, "rwkv", num_hidden_layers=4, rescale_every=2)
    model = load(Base(folder))
    weights, written = model.state_dict(), load_file(tmp_path / "model.safetensors")
    shared = weights.keys() & written.keys()
    assert len(shared) > 50
    assert all(torch.equal(weights[name], written[name]) for name in shared)
