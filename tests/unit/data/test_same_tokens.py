"""Tokens and masks of real files, row for row what they were before conversations were encoded in batches.

``same_tokens.json`` holds a digest for every seventh row, made by that version of the package (commit da78c0c).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_lit.data import records
from rlhf_lit.data.chat import ChatFormat, Conversation, answers_to
from rlhf_lit.data.records import Source

REAL = Path(os.environ.get("RLHF_LIT_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
GOLDEN = Path(__file__).with_name("same_tokens.json")
EVERY = 7

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
)
CHATML_BLOCKS = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n'}}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{m['content'] + '<|im_end|>'}}{% endgeneration %}"
    "{% else %}{{m['content'] + '<|im_end|>'}}{% endif %}{{'\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
)
FILES: dict[str, tuple[str, Callable[..., Any]]] = {
    "hh": ("hh_harmless_test/test.jsonl.gz", records.preferences),
    "rasbt": ("rasbt_llm_book/instruction-data.json", records.demonstrations),
    "rasbt pairs": ("rasbt_llm_book/instruction-data-with-preference.json", records.preferences),
    "alpaca en": ("llamafactory_demo/alpaca_en_demo.json", records.demonstrations),
    "alpaca zh": ("llamafactory_demo/alpaca_zh_demo.json", records.demonstrations),
    "dpo en": ("llamafactory_demo/dpo_en_demo.json", records.preferences),
    "kto en": ("llamafactory_demo/kto_en_demo.json", records.judged),
    "glaive": ("llamafactory_demo/glaive_toolcall_en_demo.json", records.demonstrations),
    "identity": ("llamafactory_demo/identity.json", records.demonstrations),
    "oasst": ("oasst_en100/en_100_tree.jsonl", records.rankings),
    "fastchat": ("fastchat/dummy_conversation.json", records.demonstrations),
    "gsm8k": ("gsm8k/train.jsonl", records.demonstrations),
    "self-instruct": ("self_instruct/seed_tasks.jsonl", records.prompts),
}
# Rows whose tokens are others by intent, by file and reason: none of the formats here knows tool use. Before, calls
# were learned as plain text, and the tools that they choose from were left out.
REFUSED: dict[str, dict[str, tuple[int, ...]]] = {
    "glaive": {
        "the chat template does not render tool calls": (
            0, 7, 28, 49, 56, 63, 70, 77, 84, 91, 105, 119, 133, 147, 154, 168, 182, 189, 203, 217, 224,
            231, 238, 245, 259, 273, 280, 287,
        ),
        "the chat template does not render the list of tools": (126, 210, 266, 294),
    }
}  # fmt: skip


def stories(template: Any) -> ChatFormat:
    return ChatFormat(AutoTokenizer.from_pretrained(REAL / "stories260k" / "hf"), template)


def gpt2(template: str) -> ChatFormat:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(REAL / "tok_gpt2_json" / "gpt2.json"),
        bos_token="<|endoftext|>",
        eos_token="<|im_end|>",
        extra_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = template
    return ChatFormat(tokenizer)


FORMATS: dict[str, Callable[[], ChatFormat]] = {
    "stories plain": lambda: stories("plain"),
    "stories none": lambda: stories("none"),
    "gpt2 chatml": lambda: gpt2(CHATML),
    "gpt2 blocks": lambda: gpt2(CHATML_BLOCKS),
}


def conversations(record: Any) -> list[Conversation]:
    """What the data modules make of a record."""
    if isinstance(record, records.Demonstration):
        return [Conversation(record.messages, len(record.messages) - 1, tools=record.tools)]
    if isinstance(record, records.Preference):
        return answers_to(record.prompt, [record.chosen, record.rejected], record.tools)
    if isinstance(record, records.Judged):
        return answers_to(record.prompt, [record.response], record.tools)
    if isinstance(record, records.Ranking):
        return answers_to(record.prompt, record.answers, record.tools)
    return []


def digests(chat: ChatFormat, file: str) -> dict[int, str]:
    """Row → digest of the tokens and masks of its conversations and of its prompt; a refused row's reason."""
    path, read = FILES[file]
    source = Source(str(REAL / path))
    rows: dict[int, Any] = {}
    refused: dict[int, str] = {}
    for record in read(records.read_rows(source), source, on_bad_row="skip")[0]:
        if record.row % EVERY:
            continue
        digest = rows.setdefault(record.row, hashlib.sha256())
        wholes = conversations(record)
        prompt = record.messages[:-1] if isinstance(record, records.Demonstration) else record.prompt
        encoded, asked = chat.encode(wholes), chat.prompts([Conversation(prompt, len(prompt), tools=record.tools)])
        for one in encoded:
            assert isinstance(one, str) or isinstance(asked[0], str) or one.prompt == asked[0].tokens
        for one in (*encoded, *asked):
            if isinstance(one, str):
                refused[record.row] = one
            else:
                digest.update(repr((one.tokens, one.mask, one.boundary_moved)).encode())
    return {row: refused.get(row, digest.hexdigest()[:8]) for row, digest in rows.items()}


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL} (set RLHF_LIT_DATA)")
@pytest.mark.parametrize("name", FORMATS)
def test_tokens_and_masks_are_what_they_were(name: str) -> None:
    golden = json.loads(GOLDEN.read_text())[name]
    chat = FORMATS[name]()
    for file in FILES:
        before = dict(zip(golden[file]["rows"], golden[file]["digests"].split(), strict=True))
        now = digests(chat, file)
        assert len(before) > 10
        different = {row: now.get(row) for row in before.keys() | now.keys() if before.get(row) != now.get(row)}
        assert different == {row: why for why, rows in REFUSED.get(file, {}).items() for row in rows}, file
