"""Masks of random conversations under the templates of ten families of models.

Each family is a Jinja template, and beside it a plain Python account of the same text in pieces, which says what the
answers are. The two must give the same text, and the tokens of the answers are found by tokenising the text up to each
place anew: nothing here asks the package where an answer stands.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lit.data.chat import ChatFormat, Conversation, Encoded
from rlhf_lit.data.rows import Message

REAL = Path(os.environ.get("RLHF_LIT_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
BOS = "<|bos|>"

Piece = tuple[str, bool]
"""Text, and whether it is an answer with what closes it."""


@dataclass(frozen=True)
class Family:
    """A kind of chat template.

    Attributes:
        template: as a model's tokenizer brings it.
        pieces: the same text in pieces.
        eos: the tokenizer's EOS.
        tokens: other added tokens.
        system: whether the template takes a system turn.
        bos: the tokenizer's BOS.
    """

    template: str
    pieces: Callable[[Sequence[Message]], list[Piece]]
    eos: str
    tokens: tuple[str, ...] = ()
    system: bool = True
    bos: str | None = None


def turns(
    opening: Callable[[str], str], closing: str, after: str = "", end: str = "", trim: bool = False, start: str = ""
) -> Callable[[Sequence[Message]], list[Piece]]:
    """Pieces of a template that writes every turn alike."""

    def pieces(messages: Sequence[Message]) -> list[Piece]:
        found: list[Piece] = [(start, False)]
        for message in messages:
            content = message.content.strip() if trim else message.content
            found += (opening(message.role), False), (content + closing, message.role == "assistant"), (after, False)
        return [*found, (end, False)]

    return pieces


def mistral(messages: Sequence[Message]) -> list[Piece]:
    found: list[Piece] = [(BOS, False)]
    for message in messages:
        if message.role == "user":
            found.append((f"[INST] {message.content} [/INST]", False))
        else:
            found.append((f" {message.content}</s>", True))
    return found


def qwen3(messages: Sequence[Message]) -> list[Piece]:
    found: list[Piece] = []
    asked = max(i for i, message in enumerate(messages) if message.role == "user")
    for i, message in enumerate(messages):
        found.append((f"<|im_start|>{message.role}\n", False))
        if message.role != "assistant":
            found.append((f"{message.content}<|im_end|>\n", False))
            continue
        content, thought = message.content, ""
        if "</think>" in content:
            thought = content.split("</think>")[0].rstrip("\n").split("<think>")[-1].lstrip("\n")
            content = content.split("</think>")[-1].lstrip("\n")
        if i > asked and (i == len(messages) - 1 or thought):
            found.append(("<think>\n" + thought.strip("\n") + "\n</think>\n\n" + content.lstrip("\n"), True))
            found[-1] = (found[-1][0] + "<|im_end|>", True)
        else:
            found.append((f"{content}<|im_end|>", True))
        found.append(("\n", False))
    return found


def deepseek(messages: Sequence[Message]) -> list[Piece]:
    found: list[Piece] = [(BOS, False)]
    for message in messages:
        if message.role == "system":
            found.append((message.content, False))
        elif message.role == "user":
            found.append((f"<｜User｜>{message.content}", False))
        else:
            found.append(("<｜Assistant｜>", False))
            found.append((message.content.split("</think>")[-1] + "<eos>", True))
    return found


def plain(messages: Sequence[Message]) -> list[Piece]:
    found: list[Piece] = [(BOS, False)]
    for i, message in enumerate(messages):
        found.append(("\n\n" if i else "", False))
        if message.role == "assistant":
            found += ("Assistant:", False), (f" {message.content}<eos>", True)
        else:
            found.append((f"{message.role.capitalize()}: {message.content}", False))
    return found


def chatml(body: str) -> str:
    return (
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n'}}" + body + "{{'\\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
    )


IM = ("<|im_start|>",)
ROLE_LINE = "{% for m in messages %}{{'<|' + m['role'] + '|>\\n' + m['content'] + CLOSE + '\\n'}}{% endfor %}"
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{raise_exception('System role not supported')}}{% endif %}"
FAMILIES = {
    "chatml": Family(
        chatml("{{m['content'] + '<|im_end|>'}}"),
        turns(lambda role: f"<|im_start|>{role}\n", "<|im_end|>", "\n"),
        "<|im_end|>",
        IM,
    ),
    "chatml with another eos": Family(
        chatml("{{m['content'] + '<|im_end|>'}}"),
        turns(lambda role: f"<|im_start|>{role}\n", "<|im_end|>\n"),
        "<eos>",
        (*IM, "<|im_end|>"),
    ),
    "chatml with blocks": Family(
        chatml(
            "{% if m['role'] == 'assistant' %}{% generation %}{{m['content']}}{% endgeneration %}"
            "{% else %}{{m['content']}}{% endif %}{{'<|im_end|>'}}"
        ),
        turns(lambda role: f"<|im_start|>{role}\n", "<|im_end|>", "\n"),
        "<|im_end|>",
        IM,
    ),
    "llama 3": Family(
        "{{bos_token}}{% for m in messages %}{{'<|start|>' + m['role'] + '<|end|>\\n\\n' + m['content'] | trim "
        "+ '<|eot|>'}}{% endfor %}{% if add_generation_prompt %}{{'<|start|>assistant<|end|>\\n\\n'}}{% endif %}",
        turns(lambda role: f"<|start|>{role}<|end|>\n\n", "<|eot|>", trim=True, start=BOS),
        "<|eot|>",
        ("<|start|>", "<|end|>"),
        bos=BOS,
    ),
    "mistral": Family(
        "{{bos_token}}{% for m in messages %}{% if m['role'] == 'user' %}{{'[INST] ' + m['content'] + ' [/INST]'}}"
        "{% elif m['role'] == 'assistant' %}{{' ' + m['content'] + eos_token}}"
        "{% else %}{{raise_exception('Only user and assistant roles are supported!')}}{% endif %}{% endfor %}",
        mistral,
        "</s>",
        system=False,
        bos=BOS,
    ),
    "gemma": Family(
        "{{bos_token}}" + REFUSES_SYSTEM + "{% for m in messages %}"
        "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
        "{{'<start_of_turn>' + role + '\\n' + m['content'] | trim + '<end_of_turn>\\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}",
        turns(
            lambda role: f"<start_of_turn>{'model' if role == 'assistant' else role}\n",
            "<end_of_turn>\n",
            trim=True,
            start=BOS,
        ),
        "<eos>",
        ("<start_of_turn>", "<end_of_turn>"),
        system=False,
        bos=BOS,
    ),
    "qwen 3": Family(
        "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
        "{% set ns.asked = loop.index0 %}{% endif %}{% endfor %}"
        "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n'}}"
        "{% if m['role'] == 'assistant' %}{% set content = m['content'] %}{% set thought = '' %}"
        "{% if '</think>' in content %}"
        "{% set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}"
        "{% set content = content.split('</think>')[-1].lstrip('\\n') %}{% endif %}"
        "{% if loop.index0 > ns.asked and (loop.last or thought) %}"
        "{{'<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n')}}"
        "{% else %}{{content}}{% endif %}{% else %}{{m['content']}}{% endif %}{{'<|im_end|>\\n'}}{% endfor %}"
        "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}",
        qwen3,
        "<|im_end|>",
        IM,
    ),
    "phi": Family(
        ROLE_LINE.replace("CLOSE", "'<|end|>'")
        + "{% if add_generation_prompt %}{{'<|assistant|>\\n'}}{% else %}{{eos_token}}{% endif %}",
        turns(lambda role: f"<|{role}|>\n", "<|end|>\n", end="<eos>"),
        "<eos>",
        ("<|end|>", "<|user|>", "<|assistant|>", "<|system|>"),
    ),
    "deepseek": Family(
        "{{bos_token}}{% for m in messages %}{% if m['role'] == 'system' %}{{m['content']}}"
        "{% elif m['role'] == 'user' %}{{'<｜User｜>' + m['content']}}"
        "{% else %}{{'<｜Assistant｜>' + m['content'].split('</think>')[-1] + eos_token}}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{'<｜Assistant｜><think>\\n'}}{% endif %}",
        deepseek,
        "<eos>",
        ("<｜User｜>", "<｜Assistant｜>"),
        bos=BOS,
    ),
    "zephyr": Family(
        ROLE_LINE.replace("CLOSE", "eos_token") + "{% if add_generation_prompt %}{{'<|assistant|>\\n'}}{% endif %}",
        turns(lambda role: f"<|{role}|>\n", "</s>", "\n"),
        "</s>",
    ),
    "plain": Family("", plain, "<eos>", bos=BOS),
}


def small() -> PreTrainedTokenizerFast:
    """A byte-level BPE whose merges cross from white space and marks into words."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), vocab_size=400, show_progress=False
    )
    texts = ["assistant\nHello there\n\n", "User: Hello\n\nAssistant: It is 4.", "] Hello </think>\n\nHello [/INST] It"]
    core.train_from_iterator(texts * 5, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def gpt2() -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(tokenizer_file=str(REAL / "tok_gpt2_json" / "gpt2.json"))


def stories() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(REAL / "stories260k" / "hf")


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {"small": small, "gpt2": gpt2, "stories": stories}


@cache
def chat_of(tokenizer_name: str, family_name: str) -> ChatFormat:
    tokenizer, family = TOKENIZERS[tokenizer_name](), FAMILIES[family_name]
    special: dict[str, Any] = {"eos_token": family.eos, "extra_special_tokens": list(family.tokens)}
    tokenizer.add_special_tokens({**special, **({"bos_token": BOS} if family.bos else {})})
    if not family.bos:
        tokenizer.bos_token = None
    tokenizer.chat_template = family.template or None
    return ChatFormat(tokenizer)


WORDS = ("Hello", "It is 4.", "dog", "<tag>", "[x]", "a", "é", "it's", "User: b", "你好", "\u200f", "🙂", "🤷🏽\u200d♀️")
RTL = ("שלום", "مرحبا")
SPACES = (" ", "  ", "\n", "\n\n", "\t", "\u00a0", "\u2003", "\r\n", "")
contents = st.lists(st.sampled_from((*WORDS, *RTL, *SPACES)), max_size=5).map("".join)
thoughtful = st.builds(
    lambda thought, answer: f"<think>\n{thought}\n</think>\n\n{answer}",
    contents,
    contents,
)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    messages = [Message("system", draw(contents))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 4))):
        messages.append(Message("user", draw(contents)))
        answer = draw(st.one_of(contents, contents, thoughtful))
        messages.append(Message("assistant", answer, supervised=draw(st.integers(0, 5)) > 0))
    return messages


def agreement(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def folded(family: Family, messages: Sequence[Message]) -> Sequence[Message]:
    """The turns with the system text before the first user's, where the template takes no system turn."""
    if messages[0].role != "system" or family.system:
        return messages
    return [replace(messages[1], content=f"{messages[0].content}\n\n{messages[1].content}"), *messages[2:]]


def asked(chat: ChatFormat, family: Family, messages: Sequence[Message]) -> list[int]:
    """The prompt's tokens, by the tokenizer's own methods."""
    conversation = [{"role": m.role, "content": m.content} for m in folded(family, messages)[:-1]]
    text = chat.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    return chat.tokenizer(text, add_special_tokens=False)["input_ids"]


def expected(chat: ChatFormat, family: Family, messages: Sequence[Message]) -> tuple[str, list[int], list[bool]]:
    """Text, tokens and mask by the account in pieces."""
    messages = folded(family, messages)
    pieces = family.pieces(messages)
    text = "".join(piece for piece, _ in pieces)

    def tokens_of(text: str) -> list[int]:
        return chat.tokenizer(text, add_special_tokens=False)["input_ids"]

    tokens = tokens_of(text)
    mask = [False] * len(tokens)
    learned = iter(message.supervised for message in messages if message.role == "assistant")
    at, start, last = 0, 0, False
    for piece, is_answer in pieces:
        if is_answer:
            last = next(learned)
            start = agreement(tokens_of(text[:at]), tokens)
            end = agreement(tokens_of(text[: at + len(piece)]), tokens)
            mask[start:end] = [last] * (end - start)
        at += len(piece)
    eos = chat.tokenizer.eos_token_id
    if eos in tokens[start:]:
        stop = len(tokens) - tokens[::-1].index(eos)
        tokens, mask = tokens[:stop], mask[:start] + [last] * (stop - start)
    else:
        tokens, mask = [*tokens, eos], mask[:start] + [last] * (len(tokens) + 1 - start)
    mask[0] = False
    return text, tokens, mask


@pytest.mark.parametrize("family_name", FAMILIES)
@pytest.mark.parametrize("tokenizer_name", TOKENIZERS)
def test_answers_are_supervised_as_they_are_rendered(tokenizer_name: str, family_name: str) -> None:
    if tokenizer_name != "small" and not REAL.is_dir():
        pytest.skip(f"no real data at {REAL} (set RLHF_LIT_DATA)")
    family = FAMILIES[family_name]
    chat = chat_of(tokenizer_name, family_name)

    @settings(
        max_examples=60,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(conversations(), min_size=1, max_size=4))
    def check(batch: list[list[Message]]) -> None:
        results = chat.encode([Conversation(messages, len(messages) - 1) for messages in batch])
        prompts = chat.prompts([Conversation(messages, len(messages) - 1) for messages in batch])
        for messages, encoded, prompt in zip(batch, results, prompts, strict=True):
            assert isinstance(encoded, Encoded), encoded
            text, tokens, mask = expected(chat, family, messages)
            assert encoded.tokens == tokens, text
            assert encoded.mask == mask, text
            assert encoded.unsupervised == 0
            assert isinstance(prompt, Encoded)
            assert prompt.tokens == encoded.prompt == asked(chat, family, messages)
            assert prompt.text == encoded.text

    check()
