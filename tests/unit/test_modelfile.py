"""The Modelfile that ``export`` writes for Ollama; tests/real/test_go_template.py renders it by Go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import GenerationConfig

from rlhf_lit.data.rows import Message
from rlhf_lit.data.templates import PLAIN, RAW
from rlhf_lit.export.ollama import InexpressibleTemplate, modelfile, turns_of, write_modelfile
from tests.unit.data.chats import CHATML, CHATML_BLOCKS, GEMMA, LLAMA3, REASONING, STRICT, small

BY_CHATML = '''\
# model.gguf is made of this folder by llama.cpp's convert_hf_to_gguf.py; then: ollama create NAME -f Modelfile
FROM ./model.gguf
TEMPLATE """{{- $before := "" }}
{{- range .Messages }}
{{- if eq .Role "system" }}{{ "<|im_start|>system\\n" }}
{{- else if eq .Role "assistant" }}{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}
{{- else if eq $before "" }}{{ "<|im_start|>user\\n" }}
{{- else if eq $before "system" }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}
{{- else }}{{ "<|im_end|>\\n<|im_start|>user\\n" }}
{{- end }}{{ .Content }}
{{- $before = .Role }}
{{- end }}
{{- if ne $before "assistant" }}{{ "<|im_end|>\\n<|im_start|>assistant\\n" }}{{- end }}"""
PARAMETER stop "<|im_end|>"
PARAMETER stop """<"end">"""
PARAMETER repeat_penalty 1
'''
DATED = "{{ strftime_now('%d %B %Y') }}" + CHATML
COUNTED = "{% for m in messages %}" + "{{ loop.index ~ ' of ' ~ messages | length ~ m['content'] }}{% endfor %}"
FIRST_ALONE = "{{ messages[0]['content'] }}"
# A default system turn, and a template that writes tools.
DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nHelp.<|im_end|>\\n' }}{% endif %}" + CHATML
TOOLS = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHATML

DIALOGUES = [
    [Message("user", "Wer?")],
    [Message("system", "Be brief."), Message("user", "{{ .Content }}")],
    [Message("user", "a"), Message("assistant", "b"), Message("user", "c")],
    [
        Message("system", "s"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"),
        Message("assistant", "d"), Message("user", "e"),
    ],
]  # fmt: skip


def with_bos(template: str) -> Any:
    """A tokenizer that puts its BOS before a text by itself."""
    tokenizer: Any = small(template, bos="<|bos|>")
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|bos|> $A", special_tokens=[("<|bos|>", bos)])
    return tokenizer


def test_the_file() -> None:
    assert modelfile(small(CHATML), ["<|im_end|>", '<"end">']) == BY_CHATML


@pytest.mark.parametrize("template", [PLAIN, RAW, CHATML, CHATML_BLOCKS, DEFAULT, LLAMA3, REASONING])
def test_prompts_are_the_templates(template: str) -> None:
    tokenizer: Any = small(template, bos="<|bos|>")
    turns = turns_of(tokenizer)
    for dialogue in DIALOGUES:
        data = [{"role": message.role, "content": message.content} for message in dialogue]
        assert turns.prompt(dialogue) == tokenizer.apply_chat_template(data, add_generation_prompt=True, tokenize=False)


def test_a_system_turn_that_the_template_refuses() -> None:
    """Its text stands before that of the first question, as in training."""
    assert turns_of(small(STRICT)).prompt(DIALOGUES[1]) == "Be brief.\n\n{{ .Content }}<|im_end|>"
    gemma = "<|bos|><start_of_turn>user\nBe brief.\n\n{{ .Content }}<end_of_turn>\n<start_of_turn>model\n"
    assert turns_of(small(GEMMA, bos="<|bos|>")).prompt(DIALOGUES[1]) == gemma


def test_bos_is_written_once() -> None:
    """By the engine where the tokenizer puts it there by itself, else by the template; never against the training."""
    assert turns_of(small(PLAIN, bos="<|bos|>")).first == "<|bos|>User: "
    assert turns_of(with_bos(PLAIN)).first == "User: "
    with pytest.raises(InexpressibleTemplate, match=r"begins texts with <\|bos\|>, and the chat template writes none"):
        turns_of(with_bos(CHATML))


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (None, "the tokenizer has no chat template"),
        (DATED, "the chat template writes the date"),
        (COUNTED, "writes a conversation of user, assistant, user otherwise than turn by turn"),
        (FIRST_ALONE, "the chat template leaves turns out"),
        ("{{ raise_exception('no') }}", "refuses a conversation with roles user: no"),
    ],
)
def test_what_cannot_be_said_is_not_written(template: str | None, reason: str, tmp_path: Path) -> None:
    tokenizer: Any = small(template)
    tokenizer.save_pretrained(tmp_path)
    GenerationConfig(eos_token_id=1).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    said = write_modelfile(tmp_path, trust_remote_code=False)
    assert said.startswith("no Ollama Modelfile: ")
    assert reason in said
    assert not (tmp_path / "Modelfile").exists()


def test_what_is_left_out_is_said() -> None:
    assert "strips white space" in modelfile(small(LLAMA3, bos="<|bos|>"), [])
    assert "# Tools" in modelfile(small(TOOLS), [])
    assert modelfile(small(CHATML), []).count("#") == 1


def test_an_answer_with_its_own_space() -> None:
    turns = turns_of(small(PLAIN))
    for answer in (" b", "b"):
        dialogue = [Message("user", "a"), Message("assistant", answer), Message("user", "c")]
        assert "\n\nAssistant: b<|im_end|>\n\nUser: c\n\nAssistant:" in turns.prompt(dialogue)
