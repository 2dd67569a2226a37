"""What a saved model's files say to transformers 4.57, and that transformers 5 reads the same as without it.

That 4.57 itself reads them is held by tests/real/test_read_back_older.py, in an environment of its own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_tokenizer
from rlhf_lit.models.older_readers import _complete_config
from rlhf_lit.models.saving import write_model

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


def settings_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def logits_of(folder: Path) -> torch.Tensor:
    """What transformers makes of a folder."""
    from transformers import AutoModelForCausalLM

    tokens = torch.randint(3, tiny.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_has_the_older_names(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    from transformers import AutoConfig

    kind, changes, expected = FAMILIES[family]
    base = base_of(tmp_path / "base", kind, changes)
    write_model(load_causal_lm(base), load_tokenizer(base), tmp_path / "out", scorer=False)
    assert "note:" not in capsys.readouterr().err
    found = settings_of(tmp_path / "out" / "config.json")
    assert {name: found.get(name, "nothing") for name in expected} == expected
    assert found["torch_dtype"] == found["dtype"] == "float32"
    # Version 5 reads what it reads without them.
    read, before = (
        AutoConfig.from_pretrained(folder).get_text_config() for folder in (tmp_path / "out", tmp_path / "base")
    )
    assert {k: v for k, v in read.rope_parameters.items() if k != "type"} == {
        k: v for k, v in before.rope_parameters.items() if k != "type"
    }
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tmp_path / "base"))
    # Trained and saved again, the names are those of the model, and none is left over.
    again = Base(name=str(tmp_path / "out"))
    write_model(load_causal_lm(again), load_tokenizer(again), tmp_path / "again", scorer=False)
    assert settings_of(tmp_path / "again" / "config.json") == found


@pytest.mark.parametrize("family", SPEECHLESS)
def test_what_older_names_cannot_say_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str], family: str) -> None:
    kind, changes, words = SPEECHLESS[family]
    base = base_of(tmp_path / "base", kind, changes)
    model = load_causal_lm(base)
    capsys.readouterr()
    write_model(model, load_tokenizer(base), tmp_path / "out", scorer=False)
    err = capsys.readouterr().err
    notes = [line for line in err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert f"{tmp_path / 'out' / 'config.json'}: do not load it in transformers 4" in notes[0]
    assert words in notes[0]
    assert not {"rope_theta", "rope_scaling", "torch_dtype"} & settings_of(tmp_path / "out" / "config.json").keys()
    assert torch.equal(logits_of(tmp_path / "out"), logits_of(tmp_path / "base"))


def test_names_that_version_5_would_misread_are_not_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import LlamaConfig

    class Doubles(LlamaConfig):  # type: ignore[misc]
        """Code of a model's own that takes an older name for something else."""

        def __init__(self, rope_theta: Any = None, **rest: Any) -> None:
            super().__init__(**rest)
            if rope_theta is not None:
                self.hidden_size = 2 * self.hidden_size

    file = tmp_path / "config.json"
    file.write_text(json.dumps({"model_type": "llama", "rope_parameters": PLAIN, "hidden_size": 32}))
    before = file.read_bytes()
    _complete_config(Doubles, file)
    assert file.read_bytes() == before
    assert "transformers 5 would read the older names as another model" in capsys.readouterr().err


def test_an_infinite_limit_is_read_as_transformers_writes_it(tmp_path: Path) -> None:
    from transformers import BambaConfig

    BambaConfig(rope_parameters={**PLAIN, "partial_rotary_factor": 0.5}).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    assert settings_of(file)["time_step_limit"] == [0.0, {"__float__": "Infinity"}]
    _complete_config(BambaConfig, file)
    assert settings_of(file)["rope_theta"] == 1e6
    assert BambaConfig.from_pretrained(tmp_path).time_step_limit == BambaConfig().time_step_limit


# --- tokenizers ------------------------------------------------------------------------------------------------------

TEXTS = ["Hello world! It's 12345.", "  two spaces ", "a\n\tb", "<s>x</s> y <extra> z", "日本 é ünï", ""]


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


def look(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer makes of texts, and what it holds for special."""
    encoded = [tokenizer(text) for text in TEXTS]
    return {
        "tokens": [dict(one) for one in encoded],
        "bare": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
        "texts": [tokenizer.decode(one["input_ids"]) for one in encoded],
        "skipped": [tokenizer.decode(one["input_ids"], skip_special_tokens=True) for one in encoded],
        "special": sorted(set(tokenizer.all_special_tokens)),
        "sides": (tokenizer.padding_side, tokenizer.truncation_side),
        "named": (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token),
        "length": (len(tokenizer), tokenizer.model_max_length),
    }


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
# Classes that 4.57 has, and that read tokenizer.json there as it stands.
SAME_IN_BOTH = {"Qwen2Tokenizer"}


@pytest.fixture(scope="module")
def models(llama: str) -> dict[str, Any]:
    """A model with and without an adapter."""
    return {"whole": load_causal_lm(Base(llama)), "adapter": load_causal_lm(Base(llama, lora=LoRA(rank=2)))}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("saved", ["whole", "adapter"])
def test_a_tokenizer_is_one_that_version_4_takes(models: dict[str, Any], tmp_path: Path, kind: str, saved: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = TOKENIZERS[kind]()
    expected = look(tokenizer)
    write_model(models[saved], tokenizer, tmp_path, scorer=False)
    settings = settings_of(tmp_path / "tokenizer_config.json")
    # 4.57 knows neither the class TokenizersBackend nor a list here, and builds Llama's and its like anew.
    assert settings["tokenizer_class"] in {"PreTrainedTokenizerFast", *SAME_IN_BOTH}
    assert settings.get("extra_special_tokens", {}) == ({"image_token": "w7"} if kind == "a named token" else {})
    assert settings.get("additional_special_tokens", []) == list(tokenizer.extra_special_tokens)
    if settings["tokenizer_class"] not in SAME_IN_BOTH:
        # By its own default, 4.57 makes token_type_ids too, which its `generate` refuses.
        assert settings["model_input_names"] == ["input_ids", "attention_mask"]
    assert look(AutoTokenizer.from_pretrained(tmp_path)) == expected
