"""The Modelfile's template, rendered by Go itself: the prompts are those of the tokenizer's own chat template.

``make soak`` makes the program, or ``make .envs/go/ready`` alone. tests/unit/test_modelfile.py does without.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from rlhf_lit.data.templates import PLAIN, RAW
from rlhf_lit.export.ollama import modelfile
from tests.unit.data.chats import CHATML, CHATML_BLOCKS, GEMMA, LLAMA3, REASONING, small

ENVIRONMENT = Path(__file__).parents[2] / ".envs" / "go"
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(not (ENVIRONMENT / "ready").exists(), reason="no Go: make .envs/go/ready"),
]


def turns(*contents: str, system: str = "") -> list[dict[str, str]]:
    roles = [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]
    return [{"role": "system", "content": system}, *roles] if system else roles


CONVERSATIONS = [
    turns('What is {{ .x }} "a\\b"?'),
    turns("Grüße,\nzwei Zeilen", system="Be brief."),
    turns("one", "two.", "three"),
    turns("one", "two.", "three", "four", "five", system="<|im_end|>"),
]


def rendered(template: str, conversations: list[list[dict[str, str]]]) -> list[str]:
    request = json.dumps({"Template": template, "Conversations": conversations})
    done = subprocess.run([ENVIRONMENT / "render"], input=request, capture_output=True, text=True, check=True)
    found: list[str] = json.loads(done.stdout)
    return found


def go_template(tokenizer: Any) -> str:
    return modelfile(tokenizer, []).split('TEMPLATE """')[1].split('"""\n')[0]


@pytest.mark.parametrize("template", [PLAIN, RAW, CHATML, CHATML_BLOCKS, LLAMA3, REASONING])
def test_the_prompts_are_the_tokenizers(template: str) -> None:
    tokenizer: Any = small(template, bos="<|bos|>")
    expected = [tokenizer.apply_chat_template(c, add_generation_prompt=True, tokenize=False) for c in CONVERSATIONS]
    assert rendered(go_template(tokenizer), CONVERSATIONS) == expected


def test_a_system_turn_that_the_template_refuses() -> None:
    tokenizer: Any = small(GEMMA, bos="<|bos|>")
    folded = turns("Be brief.\n\none", "two.", "three")
    expected = tokenizer.apply_chat_template(folded, add_generation_prompt=True, tokenize=False)
    assert rendered(go_template(tokenizer), [turns("one", "two.", "three", system="Be brief.")]) == [expected]


def test_an_answer_that_brings_its_space() -> None:
    """What a model in the plain format writes begins with the space that its template puts before an answer."""
    tokenizer: Any = small(PLAIN)
    template = go_template(tokenizer)
    once, again = rendered(template, [turns("one", " two", "three"), turns("one", "two", "three")])
    assert once == again
    assert "Assistant: two" in once
    assert rendered(template, [turns("one", "", "three")])[0].count("Assistant: ") == 1
