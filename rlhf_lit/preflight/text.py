"""Whether a tokenizer keeps the text of the rows."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from typing import Any

from rlhf_lit.preflight.check import Check, count

LOOKED_AT = 2000  # characters of a text
AROUND = 20  # characters that are shown on either side of the first that is lost


def text_kept(tokenizer: Any, rows: Sequence[tuple[int, Any]]) -> Check:
    """Texts that come back from their tokens as they were; what is lost, no model can learn.

    Equal are a text and its composed form (é in one code point or two), and texts that differ by one space at the
    start, which some tokenizers add or take.

    Args:
        tokenizer: without special tokens, and without what cleans up after it.
        rows: (number in the data file, the row as the file has it).
    """
    texts = [(number, text[:LOOKED_AT]) for number, row in rows for text in _texts_in(row)]
    if not texts:
        return Check("text kept", "ok", "no text in the rows")
    encoded = tokenizer([text for _, text in texts], add_special_tokens=False).input_ids
    lost = {}
    for (number, text), tokens in zip(texts, encoded, strict=True):
        back = tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if number not in lost and _composed(text) != _composed(back):
            lost[number] = _first_difference(text, back)
    if not lost:
        return Check("text kept", "ok", f"every text of {count(len(rows), 'row')} comes back from its tokens")
    number, (text, back) = next(iter(lost.items()))
    return Check(
        "text kept",
        "warning",
        f"not in {len(lost)} of {count(len(rows), 'row')}: in row {number} {text!r} comes back as {back!r}",
        "the model never sees what the tokenizer loses: choose another, or mend its normalizer and decoder",
    )


def _texts_in(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _texts_in(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _texts_in(inner)


def _composed(text: str) -> str:
    return unicodedata.normalize("NFC", text).removeprefix(" ")


def _first_difference(text: str, back: str) -> tuple[str, str]:
    """What stands around the first place where two texts differ, in each of them."""
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(text, back, strict=False)))
    start = max(0, same - AROUND)
    return text[start : same + AROUND], back[start : same + AROUND]
