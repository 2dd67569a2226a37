"""Tokens of beginnings, found from the last added token on, are those of the beginnings tokenised anew."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AddedToken, AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lit.data.beginnings import BatchTokenizer
from tests.unit.data.chats import small

REAL = Path(os.environ.get("RLHF_LIT_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
ADDED = (
    AddedToken("<|cut|>", special=True, normalized=False),
    AddedToken("<|cut|><|too|>", special=True, normalized=False),
    AddedToken("<|too|>", special=True, normalized=False),
    AddedToken("<left>", special=True, lstrip=True),
    AddedToken("<right>", special=True, rstrip=True),
    AddedToken("<word>", special=False, single_word=True),
    AddedToken("<norm>", special=False, normalized=True),
)
PARTS = st.sampled_from(
    [*(token.content for token in ADDED), *"<|> \n\té", "dog", " Hello", "  ", "🙂", "It is", "cut"]
)


def real(folder: str, file: str) -> Callable[[], PreTrainedTokenizerBase]:
    return lambda: PreTrainedTokenizerFast(tokenizer_file=str(REAL / folder / file))


TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "small": small,
    "python": ByT5Tokenizer,
    "gpt2": real("tok_gpt2_json", "gpt2.json"),
    "torchtune": real("tok_torchtune_small", "tokenizer.json"),
    "stories": lambda: AutoTokenizer.from_pretrained(REAL / "stories260k" / "hf"),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_beginnings_are_tokenised_as_if_alone(name: str) -> None:
    if name not in ("small", "python") and not REAL.is_dir():
        pytest.skip(f"no real data at {REAL} (set RLHF_LIT_DATA)")
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_tokens(list(ADDED))
    batch = BatchTokenizer(tokenizer)

    @settings(max_examples=100, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.lists(PARTS, max_size=8).map("".join), max_size=3))
    def check(texts: list[str]) -> None:
        ids = batch.ids(texts)
        ends = [range(len(text) + 1) for text in texts]
        for text, tokens, found in zip(texts, ids, batch.beginnings(texts, ids, ends), strict=True):
            assert tokens == tokenizer(text, add_special_tokens=False)["input_ids"]
            for end, beginning in found.items():
                alone = tokenizer(text[:end], add_special_tokens=False)["input_ids"]
                assert beginning.tokens(tokens) == alone
                common = next(
                    (i for i, (a, b) in enumerate(zip(alone, tokens, strict=False)) if a != b),
                    min(len(alone), len(tokens)),
                )
                assert beginning.agreement(tokens) == common

    check()


def test_only_what_stands_behind_the_last_cut_is_tokenised_again(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = small()
    batch = BatchTokenizer(tokenizer)
    text = "<|im_start|>user\nWhat is 4?<|im_end|>\n<|im_start|>assistant\nIt is<|im_end|>\n"
    ids = batch.ids([text])
    asked: list[list[str]] = []
    tokens_of = batch.ids
    monkeypatch.setattr(batch, "ids", lambda texts: asked.append(list(texts)) or tokens_of(texts))
    ends = [text.index("<|im_end|>"), text.index("It is"), len(text) - 1, len(text)]
    batch.beginnings([text, text], ids * 2, [ends, ends])
    batch.beginnings([text], ids, [ends])
    assert asked == [["<|im_start|>assistant\n"], []]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_texts_that_begin_alike_are_tokenised_as_if_alone(name: str) -> None:
    if name not in ("small", "python") and not REAL.is_dir():
        pytest.skip(f"no real data at {REAL} (set RLHF_LIT_DATA)")
    tokenizer = TOKENIZERS[name]()
    tokenizer.add_tokens(list(ADDED))
    batch = BatchTokenizer(tokenizer)
    parts = st.lists(PARTS, max_size=6).map("".join)

    @settings(max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.tuples(parts, st.lists(parts, min_size=1, max_size=3)), max_size=3))
    def check(groups: list[tuple[str, list[str]]]) -> None:
        texts = [prompt + answer for prompt, answers in groups for answer in answers]
        shared = [len(prompt) if i else 0 for prompt, answers in groups for i in range(len(answers))]
        assert batch.ids_of_groups(texts, shared) == [
            tokenizer(t, add_special_tokens=False)["input_ids"] for t in texts
        ]

    check()


def test_a_prompt_with_two_answers_is_tokenised_once(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = BatchTokenizer(small())
    prompt = "<|im_start|>user\nWhat is 4?<|im_end|>\n<|im_start|>assistant\n"
    asked: list[list[str]] = []
    tokens_of = batch.ids
    monkeypatch.setattr(batch, "ids", lambda texts: asked.append(list(texts)) or tokens_of(texts))
    batch.ids_of_groups([prompt + "4", prompt + "5"], [0, len(prompt)])
    assert asked == [[prompt + "4"], ["<|im_start|>assistant\n5"]]
