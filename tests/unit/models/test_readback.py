"""What was saved against the model in memory: equal to the bit, or the tensor that is not by its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_lit.errors import UserError
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.readback import difference, require_same
from rlhf_lit.models.saving import write_model

EXPERTS: dict[str, Any] = {**tiny.SIZES["qwen2"], "num_experts_per_tok": 2, "num_local_experts": 4}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "tied": ("qwen2", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),  # tied, with a prefix and weights that lie transposed
    "gemma2": ("gemma2", {}),
    "mixtral": ("mixtral", EXPERTS),  # experts are stacked in memory, apart in files
}
LORAS = {
    "plain": LoRA(rank=4),
    "dora": LoRA(rank=4, dora=True, rslora=True),
    "modules in full": LoRA(rank=4, modules_to_save=["lm_head", "embed_tokens", "norm"]),
    "ends": LoRA(rank=4, targets=["embed_tokens", "lm_head", "q_proj"]),
}


def saved(folder: Path, kind: str = "llama", scorer: bool = False, **settings: Any) -> tuple[Any, Path]:
    """A model in memory that has left its base, and where it was saved."""
    family, overrides = FAMILIES[kind]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny.SIZES, "mixtral", EXPERTS)
        base = Base(tiny.save_model(folder / "base", family, **overrides), **settings)
    model: Any = load_scorer(base) if scorer else load_causal_lm(base)
    tiny.disturb(model, 0.05)
    write_model(model, tiny.make_tokenizer(), folder / "hf", scorer)
    return model, folder / "hf"


def altered(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Do something to the tensors of a folder's file."""
    (file,) = folder.glob("*.safetensors")
    weights = load_file(file)
    change(weights)
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("kind", "dtype"), [*((kind, "float32") for kind in FAMILIES), ("llama", "bfloat16"), ("mixtral", "bfloat16")]
)
def test_a_whole_model_is_found_again(tmp_path: Path, kind: str, dtype: Any) -> None:
    model, folder = saved(tmp_path, kind, dtype=dtype)
    assert difference(model, folder) is None


@pytest.mark.parametrize("kind", LORAS)
@pytest.mark.parametrize("family", ["llama", "tied"])
def test_an_adapter_is_found_again(tmp_path: Path, kind: str, family: str) -> None:
    model, folder = saved(tmp_path, family, lora=LORAS[kind])
    assert difference(model, folder) is None


@pytest.mark.parametrize("lora", [None, LoRA(rank=4), LoRA(rank=4, modules_to_save=["norm"])])
def test_a_reward_model_is_found_again_with_its_constant(tmp_path: Path, lora: LoRA | None) -> None:
    model, folder = saved(tmp_path, scorer=True, lora=lora)
    assert difference(model, folder) is None
    (folder / "reward.json").write_text(json.dumps({"bias": 0.5}))
    assert "reward.json holds the bias 0.5" in str(difference(model, folder))


@pytest.mark.parametrize("kind", FAMILIES)
@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["whole", "adapter"])
def test_every_single_tensor_counts(tmp_path: Path, kind: str, lora: LoRA | None) -> None:
    """A bit of each flipped, each left out, each of another shape: named every time."""
    model, folder = saved(tmp_path, kind, lora=lora)
    (file,) = folder.glob("*.safetensors")
    whole = load_file(file)
    assert len(whole) > 10
    for key in whole if lora is None and kind == "llama" else list(whole)[::5]:

        def flip(weights: dict[str, Tensor], key: str = key) -> None:
            weights[key].view(torch.int32).view(-1)[-1] ^= 1

        def cut(weights: dict[str, Tensor], key: str = key) -> None:
            weights[key] = weights[key][..., :-1].contiguous()

        for change, words in ((flip, "is up to"), (cut, "shape"), (lambda w, key=key: w.pop(key), "not in the file")):
            altered(folder, change)
            fault = difference(model, folder)
            assert fault is not None, key
            assert words in fault
            assert key in fault
            save_file(whole, file, metadata={"format": "pt"})
    assert difference(model, folder) is None


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["whole", "adapter"])
def test_a_tensor_too_many_a_damaged_file_and_none_at_all(tmp_path: Path, lora: LoRA | None) -> None:
    model, folder = saved(tmp_path, lora=lora)
    (file,) = folder.glob("*.safetensors")
    altered(folder, lambda weights: weights.update(stray=torch.zeros(2)))
    assert difference(model, folder) == "stray is in the file and not in the model"
    with pytest.raises(UserError, match=r"hf: what was saved is not the model in memory: stray is"):
        require_same(model, folder)
    file.write_bytes(file.read_bytes()[:-9])
    assert f"{file.name} cannot be read" in str(difference(model, folder))
    file.unlink()
    assert difference(model, folder) == "it holds no safetensors file"


def test_a_trained_weight_that_saving_knows_nothing_of_is_missed(tmp_path: Path) -> None:
    """peft saves what its configuration names, and no more."""
    model, folder = saved(tmp_path, lora=LoRA(rank=4))
    model.get_base_model().model.norm.weight.requires_grad_(True)
    assert difference(model, folder) == "base_model.model.model.norm.weight is not in the file"


@pytest.mark.parametrize(
    ("lora", "file", "change", "said"),
    [
        (LoRA(rank=4), "adapter_config.json", {"lora_alpha": 3}, "lora_alpha: 3, and the model 32"),
        (LoRA(rank=4), "adapter_config.json", {"modules_to_save": ["norm"]}, "modules_to_save: "),
        (LoRA(rank=4), "base.json", {"fingerprint": "0"}, "another base"),
        (None, "config.json", {"rms_norm_eps": 0.1}, "rms_norm_eps: 0.1, and the model 1e-06"),
        (None, "config.json", {"num_hidden_layers": 3}, "num_hidden_layers"),
    ],
)
def test_the_configuration_counts_too(tmp_path: Path, lora: Any, file: str, change: Any, said: str) -> None:
    model, folder = saved(tmp_path, lora=lora)
    path = folder / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    fault = difference(model, folder)
    assert fault is not None
    assert said in fault


def test_not_a_number_is_what_it_is(tmp_path: Path) -> None:
    """A run that broke is saved as it is; and weights on several files are found."""
    model, folder = saved(tmp_path)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    assert "model.norm.weight is up to nan away" in str(difference(model, folder))
    model.save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink(missing_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert difference(model, folder) is None
