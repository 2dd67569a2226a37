"""What a saved model's files tell a reader that has never heard of this package."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from jinja2.sandbox import ImmutableSandboxedEnvironment

from rlhf_lit.algorithms import SFT, RewardModel
from rlhf_lit.commands.export import export
from rlhf_lit.data.chat import ChatFormat, Template
from rlhf_lit.data.records import Message
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import PLAYGROUND, Base, LoRA
from rlhf_lit.models.saving import save_hf

KINDS = ("full", "lora", "reward", "reward lora")


def saved(kind: str, base: str, folder: Path, **settings: Any) -> Any:
    """A model, a tenth of a nat from its base, through the saving that ends a fit. → the module."""
    lora = LoRA(rank=4) if kind.endswith("lora") else None
    algorithm = RewardModel if kind.startswith("reward") else SFT
    module = tiny.build(algorithm(Base(name=base, lora=lora, **settings)))
    ChatFormat(module.tokenizer)
    tiny.disturb(module, 0.05)
    module.eval()
    save_hf(module, folder)
    return module


def settings_of(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return found


def amend(file: Path, **changes: Any) -> None:
    """Change what a JSON file says; None takes a key out."""
    settings = {**settings_of(file), **changes}
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


# --- special tokens --------------------------------------------------------------------------------------------------


@pytest.fixture
def other_ends(tmp_path: Path) -> Path:
    """A base whose files stop at other tokens than its tokenizer, and sample as they do not say."""
    base = Path(tiny.save_model(tmp_path / "base", eos_token_id=7, bos_token_id=9))
    amend(base / "generation_config.json", eos_token_id=[7, 8], temperature=0.6, top_p=0.9, repetition_penalty=1.1)
    return base


@pytest.mark.parametrize("kind", KINDS)
def test_the_tokenizers_eos_is_where_others_look(other_ends: Path, tmp_path: Path, kind: str) -> None:
    from transformers import GenerationConfig

    module = saved(kind, str(other_ends), tmp_path / "hf")
    if kind in ("full", "reward"):
        config = settings_of(tmp_path / "hf" / "config.json")
        assert (config["eos_token_id"], config["bos_token_id"]) == (tiny.EOS, tiny.BOS)
    if kind in ("full", "lora"):
        generation = GenerationConfig.from_pretrained(tmp_path / "hf")
        assert generation.eos_token_id == [tiny.EOS, 7, 8]
        assert (generation.bos_token_id, generation.pad_token_id) == (tiny.BOS, tiny.EOS)
        # Plain transformers samples nothing by these, and saves no config that says otherwise.
        assert (generation.temperature, generation.top_p, generation.repetition_penalty) == (None, None, 1.1)
        generation.num_beams = 1
        generation.save_pretrained(tmp_path / "again")
        assert "_from_model_config" not in settings_of(tmp_path / "hf" / "generation_config.json")
    # The model in memory stays what it was.
    assert unwrapped(module.trained_model).config.eos_token_id == 7


def test_sampling_defaults_that_sample_nothing_do_not_lose_a_run(
    other_ends: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers 5.19 saves no generation config that has them, its own as it was loaded included."""
    from transformers import GenerationConfig

    save = GenerationConfig.save_pretrained

    def strict(self: Any, *folder: Any, **rest: Any) -> None:
        self.validate(strict=True)
        save(self, *folder, **rest)

    saved("full", str(other_ends), tmp_path / "as_it_is")
    monkeypatch.setattr(GenerationConfig, "save_pretrained", strict)
    saved("full", str(other_ends), tmp_path / "hf")
    name = "generation_config.json"
    assert settings_of(tmp_path / "hf" / name) == settings_of(tmp_path / "as_it_is" / name)


def test_sampling_defaults_that_hold_are_kept(other_ends: Path, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    amend(other_ends / "generation_config.json", do_sample=True)
    saved("full", str(other_ends), tmp_path / "hf")
    generation = GenerationConfig.from_pretrained(tmp_path / "hf")
    assert (generation.do_sample, generation.temperature, generation.top_p) == (True, 0.6, 0.9)


def test_a_list_of_stop_tokens_in_the_config_loses_none(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base", eos_token_id=[7, 8])
    saved("full", base, tmp_path / "hf")
    assert settings_of(tmp_path / "hf" / "config.json")["eos_token_id"] == [tiny.EOS, 7, 8]
    assert settings_of(tmp_path / "hf" / "generation_config.json")["eos_token_id"] == [tiny.EOS, 7, 8]


def test_the_pad_token_is_the_tokenizers_unless_it_is_learned(tmp_path: Path) -> None:
    """An input embedding of the config's pad token gets no gradient: with EOS there the next stage would learn less."""
    base = Path(tiny.save_model(tmp_path / "base", pad_token_id=5))
    saved("full", str(base), tmp_path / "eos")  # the tokenizer pads with EOS
    assert settings_of(tmp_path / "eos" / "config.json")["pad_token_id"] == 5
    assert settings_of(tmp_path / "eos" / "generation_config.json")["pad_token_id"] == tiny.EOS
    tiny.make_tokenizer(pad="w6").save_pretrained(base)
    saved("full", str(base), tmp_path / "own")
    assert settings_of(tmp_path / "own" / "config.json")["pad_token_id"] == 6
    assert settings_of(tmp_path / "own" / "generation_config.json")["pad_token_id"] == 6


# --- templates -------------------------------------------------------------------------------------------------------

CHATS = [
    [("user", "w3 w4"), ("assistant", "w5")],
    [("user", "w3"), ("assistant", " w5 w6 "), ("user", ""), ("assistant", "w7 <eos> w8")],
    [("system", "w9"), ("user", "w3\n\nAssistant: w4"), ("assistant", "w5\n\nUser: w6")],
    [("assistant", "w5"), ("assistant", "w6"), ("user", "w7"), ("assistant", "w8")],
]
PLAYGROUND_CHATS = [chat for chat in CHATS if chat[0][0] != "system"]


def rendered_plainly(source: str, special: dict[str, Any], chat: list[tuple[str, str]], answer_next: bool) -> str:
    """A template as those read it who know Jinja alone."""
    turns = [{"role": role, "content": content} for role, content in chat]
    template = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    return template.render(messages=turns, add_generation_prompt=answer_next, **special)


def masks(
    tokenizer: Any, template: Template, chats: list[list[tuple[str, str]]]
) -> Iterator[tuple[list[int], list[bool]]]:
    chat_format = ChatFormat(tokenizer, template)
    for chat in chats:
        found = chat_format.demonstration([Message(*turn) for turn in chat])
        yield found.tokens, found.mask


@pytest.mark.parametrize("name", ["plain", "none", "playground"])
def test_built_in_templates_are_saved_in_plain_jinja(llama: str, tmp_path: Path, name: str) -> None:
    """And the next stage, which finds the template in the folder, learns the same tokens."""
    from transformers import AutoTokenizer

    base = str(PLAYGROUND) if name == "playground" else llama
    chats = PLAYGROUND_CHATS if name == "playground" else CHATS
    tokenizer = AutoTokenizer.from_pretrained(base)
    template: Template = "auto" if name == "playground" else name  # type: ignore[assignment]
    before = list(masks(tokenizer, template, chats))
    tokenizer.save_pretrained(tmp_path)
    texts = [file.read_text() for file in tmp_path.iterdir() if file.suffix in (".jinja", ".json")]
    assert not any("generation %}" in text for text in texts)
    source = (tmp_path / "chat_template.jinja").read_text()
    again = AutoTokenizer.from_pretrained(tmp_path)
    for chat in chats:
        for part, answer_next in ((chat, False), (chat[:-1], True)):
            turns = [{"role": role, "content": content} for role, content in part]
            ours = again.apply_chat_template(turns, tokenize=False, add_generation_prompt=answer_next)
            assert rendered_plainly(source, tokenizer.special_tokens_map, part, answer_next) == ours
    assert list(masks(again, "auto", chats)) == before
    assert all(any(mask) for _, mask in before)


# --- what tells of this machine --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, way) for kind in KINDS for way in ("hf", "export", "merge") if way != "merge" or kind.endswith("lora")],
)
def test_no_file_says_how_its_model_was_loaded_here(tmp_path: Path, kind: str, way: str) -> None:
    base = Path(tiny.save_model(tmp_path / "base"))
    amend(base / "config.json", _name_or_path="/home/someone/model")
    amend(base / "tokenizer_config.json", tokenizer_file="/home/someone/tokenizer.json", device_map="cuda:3")
    saved(kind, str(base), tmp_path / "run" / "hf")
    folder = tmp_path / "run" / "hf"
    if way != "hf":
        folder = tmp_path / "out"
        export(str(tmp_path / "run"), merge=way == "merge", to=str(folder))
    found = {file.name: file.read_text() for file in folder.iterdir() if file.suffix in (".json", ".jinja", ".md")}
    for name, text in found.items():
        for word in ("local_files_only", "is_local", "someone", "cuda:3", "name_or_path"):
            if (name, word) != ("adapter_config.json", "name_or_path"):  # an adapter must say where its base is
                assert word not in text, name
        if name not in ("adapter_config.json", "base.json", "README.md"):
            assert str(tmp_path) not in text, name
    if way == "hf":
        assert "README.md" not in found  # peft's form, not filled in


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_files_are_as_readable_as_any_other(llama: str, tmp_path: Path, kind: str, mask: int) -> None:
    before = os.umask(mask)
    try:
        saved(kind, llama, tmp_path / "run" / "hf")
        export(str(tmp_path / "run"), to=str(tmp_path / "out"))
    finally:
        os.umask(before)
    for folder in (tmp_path / "run" / "hf", tmp_path / "out"):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
        modes = {file.name: oct(stat.S_IMODE(file.stat().st_mode)) for file in folder.iterdir()}
        assert len(modes) > 4
        assert set(modes.values()) == {oct(0o666 & ~mask)}, modes


def test_vocabularies_of_other_readers_come_along(llama: str, tmp_path: Path) -> None:
    """sentencepiece's file, which llama.cpp asks for, and mistral-common's; at the next stage too."""
    base = tmp_path / "base"
    tiny.save_model(base)
    (base / "tokenizer.model").write_bytes(b"\x0a\x0b pieces")
    (base / "tekken.json").write_text('{"vocab": []}')
    saved("full", str(base), tmp_path / "first")
    saved("lora", str(tmp_path / "first"), tmp_path / "second" / "hf")
    export(str(tmp_path / "second"), merge=True, to=str(tmp_path / "out"))
    for folder in (tmp_path / "first", tmp_path / "second" / "hf", tmp_path / "out"):
        assert (folder / "tokenizer.model").read_bytes() == b"\x0a\x0b pieces"
        assert (folder / "tekken.json").read_text() == '{"vocab": []}'


# --- code of the model's own -----------------------------------------------------------------------------------------

CONFIGURATION = """
from transformers import LlamaConfig
class OwnConfig(LlamaConfig):
    model_type = "own"
"""
MODELING = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig
from .own_parts import SCALE
class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.mark.parametrize("way", ["hf", "export", "merge"])
def test_code_that_came_with_the_weights_goes_with_them(tmp_path: Path, way: str) -> None:
    from transformers import AutoModelForCausalLM

    base = Path(tiny.save_model(tmp_path / "base"))
    (base / "configuration_own.py").write_text(CONFIGURATION)
    (base / "modeling_own.py").write_text(MODELING)
    (base / "own_parts.py").write_text("SCALE = 1\n")
    auto_map = {"AutoConfig": "configuration_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    amend(base / "config.json", auto_map=auto_map, model_type="own", architectures=["OwnForCausalLM"])
    kind = "lora" if way == "merge" else "full"
    module = saved(kind, str(base), tmp_path / "run" / "hf", trust_remote_code=True)
    folder = tmp_path / "run" / "hf"
    if way != "hf":
        folder = tmp_path / "out"
        export(str(tmp_path / "run"), merge=way == "merge", to=str(folder), trust_remote_code=True)
    assert {"configuration_own.py", "modeling_own.py", "own_parts.py"} <= {file.name for file in folder.iterdir()}
    loaded = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    assert type(loaded).__name__ == "OwnForCausalLM"
    tokens = torch.tensor([[1, 5, 6, 7]])
    with torch.no_grad():
        ours = module.roles.policy(tokens).logits
        torch.testing.assert_close(loaded(tokens).logits, ours, rtol=0, atol=1e-5)
