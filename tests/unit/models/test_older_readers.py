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
from older_names import FAMILIES, PLAIN, SPEECHLESS, TOKENIZERS, base_of
from reading import logits, look

from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_tokenizer
from rlhf_lit.models.older_readers import _complete_config
from rlhf_lit.models.saving import write_model


def settings_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def logits_of(folder: Path) -> torch.Tensor:
    """What transformers makes of a folder."""
    rows = torch.randint(3, tiny.VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1))
    found: torch.Tensor = logits(str(folder), rows.tolist())
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
