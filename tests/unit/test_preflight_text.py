"""A tokenizer that loses text is seen before the first step."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from rlhf_lit.preflight.text import text_kept

REAL = Path(os.environ.get("RLHF_LIT_DATA", Path(__file__).parents[3] / "shared" / "data"))
SENTENCE = "Hello, world"


def by_words(*, spaces: bool) -> Any:
    """A tokenizer of a few words, which knows whether a space stands before one or does not."""
    pieces = ["[UNK]", "Hello", ",", "world", " world", "▁Hello", "▁world", "e\u0301", "é"]
    tokenizer = Tokenizer(models.WordLevel({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    if spaces:
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()])
        tokenizer.decoder = decoders.Metaspace()
    else:
        tokenizer.normalizer = normalizers.NFC()
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def test_spaces_that_are_lost() -> None:
    check = text_kept(
        by_words(spaces=False), [(3, {"text": "Hello"}), (5, {"text": SENTENCE}), (6, {"text": SENTENCE})]
    )
    assert check.verdict == "warning"
    assert check.found == "not in 2 of 3 rows: in row 5 'Hello, world' comes back as 'Hello,world'"
    assert "choose another" in check.advice


def test_texts_of_messages_and_lists_count() -> None:
    rows = [(0, {"messages": [{"role": "Hello", "content": SENTENCE}], "score": 1, "none": None})]
    assert text_kept(by_words(spaces=False), rows).verdict == "warning"
    assert text_kept(by_words(spaces=True), rows).verdict == "ok"


def test_what_is_the_same_text_is_no_loss() -> None:
    """A composed accent, and the space that some tokenizers put before the first word."""
    tokenizer = by_words(spaces=False)
    assert text_kept(tokenizer, [(0, {"text": "e\u0301"}), (1, {"text": " Hello"})]).verdict == "ok"
    check = text_kept(tokenizer, [(0, {"label": 1})])
    assert (check.verdict, check.found) == ("ok", "no text in the rows")


def test_an_example_shows_the_place_of_a_long_text() -> None:
    text = ",".join(["Hello"] * 100) + ", world" + ",Hello" * 100
    check = text_kept(by_words(spaces=False), [(0, {"text": text})])
    assert "'ello,Hello,Hello,Hello, world" not in check.found
    assert ", world,Hello,Hello" in check.found
    assert len(check.found) < 150


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL} (set RLHF_LIT_DATA)")
def test_real_tokenizers() -> None:
    folder = REAL / "tok_torchtune_small"
    rows = [(0, {"prompt": "One\n\ttwo  three", "chosen": "naïve – 你好 😀"}), (1, {"prompt": SENTENCE})]
    for name, verdict in (("tokenizer.json", "ok"), ("tiny_bpe_tokenizer.json", "warning")):
        check = text_kept(PreTrainedTokenizerFast(tokenizer_file=str(folder / name)), rows)
        assert check.verdict == verdict, check
    assert check.found.startswith("not in 1 of 2 rows: in row 0 ")
