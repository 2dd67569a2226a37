"""Tokens of texts and of their beginnings, many at a time.

A prompt's tokens are those of the beginning of a text, and need not be the first tokens of the whole. A beginning is
tokenised again only from the last *cut* on, an added token (``<|im_start|>``) that splits the text before anything else
looks at it: what stands before it has the same tokens whatever follows.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# Short tails ("<|im_start|>assistant\n") come again in every row; longer ones are parts of contents.
KEPT_CHARACTERS = 48
KEPT_TAILS = 10_000
_PROBE = "a\u00e9 b\n  Zx. "


@dataclass(frozen=True)
class Beginning:
    """Tokens of the beginning of a text: the first ``shared`` of the whole text's, then ``tail``."""

    shared: int
    tail: Sequence[int]

    def tokens(self, whole: Sequence[int]) -> list[int]:
        """All of its tokens, given those of the whole text."""
        return [*whole[: self.shared], *self.tail]

    def agreement(self, whole: Sequence[int]) -> int:
        """How many tokens it begins with in common with the whole text."""
        for i, token in enumerate(self.tail, self.shared):
            if i >= len(whole) or whole[i] != token:
                return i
        return self.shared + len(self.tail)


class BatchTokenizer:
    """A tokenizer that adds no special tokens of its own, for many texts in one call.

    Args:
        tokenizer: a fast one is asked directly; any other works, row by row.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer: Any = tokenizer
        own = getattr(type(tokenizer), "_encode_plus", None)
        fast = tokenizer.is_fast and own is PreTrainedTokenizerFast._encode_plus
        self._direct = fast and not tokenizer.split_special_tokens
        self._kept: dict[str, list[int]] = {}
        self._cuts = self._find_cuts() if self._direct else {}
        longest_first = sorted(self._cuts, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text."""
        if not texts:
            return []
        if not self._direct:
            return list(self._tokenizer(list(texts), add_special_tokens=False)["input_ids"])
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return [one.ids for one in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def ids_of_groups(self, texts: Sequence[str], shared: Sequence[int]) -> list[list[int]]:
        """Token ids of each text; what it has in common with the first of its group is tokenised once.

        Args:
            texts: one group after the other.
            shared: how many characters each begins with in common with the first text of its group; 0 of that itself.
        """
        firsts = iter(self.ids([text for text, common in zip(texts, shared, strict=True) if not common]))
        results: list[list[int]] = []
        tails: list[tuple[int, str]] = []
        cuts: list[tuple[int, int, int]] | None = None
        for text, common in zip(texts, shared, strict=True):
            if not common:
                first, first_ids, cuts = text, next(firsts), None
                results.append(first_ids)
                continue
            if cuts is None:
                cuts = self._cuts_of(first, first_ids)
            token, start = next(((token, start) for token, start, end in reversed(cuts) if end <= common), (0, 0))
            tails.append((len(results), text[start:]))
            results.append(first_ids[:token])
        for (place, _), ids in zip(tails, self.ids([tail for _, tail in tails]), strict=True):
            results[place] = results[place] + ids
        return results

    def starts(self, text: str) -> list[int]:
        """The first character of each token of a text; fast tokenizers alone can tell."""
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return [start for start, _ in encoding["offset_mapping"]]

    def beginnings(
        self, texts: Sequence[str], ids: Sequence[list[int]], ends: Sequence[Iterable[int]]
    ) -> list[dict[int, Beginning]]:
        """Tokens of ``text[:end]`` for all ends wanted of each text.

        Args:
            texts: the whole texts.
            ids: their tokens.
            ends: character positions.
        """
        results: list[dict[int, Beginning]] = []
        open_ends: list[tuple[dict[int, Beginning], int, int, str]] = []
        for text, tokens, wanted in zip(texts, ids, ends, strict=True):
            found: dict[int, Beginning] = {}
            cuts = self._cuts_of(text, tokens)
            cut_ends = [end for _, _, end in cuts]
            starts = {start: token for token, start, _ in cuts}
            for end in wanted:
                if end in found:
                    continue
                if end >= len(text):
                    found[end] = Beginning(len(tokens), ())
                elif end in starts:
                    found[end] = Beginning(starts[end], ())
                elif end == 0:
                    found[end] = Beginning(0, ())
                else:
                    last = bisect_right(cut_ends, end) - 1
                    token, start = cuts[last][:2] if last >= 0 else (0, 0)
                    if last >= 0 and cut_ends[last] == end:
                        found[end] = Beginning(token + 1, ())
                    else:
                        open_ends.append((found, end, token, text[start:end]))
            results.append(found)
        tails = self.of_each({tail for _, _, _, tail in open_ends})
        for found, end, token, tail in open_ends:
            found[end] = Beginning(token, tails[tail])
        return results

    def of_each(self, texts: Iterable[str]) -> dict[str, list[int]]:
        """Token ids by text; short texts are remembered."""
        found, missing = {}, []
        for text in dict.fromkeys(texts):
            if text in self._kept:
                found[text] = self._kept[text]
            else:
                missing.append(text)
        for text, tokens in zip(missing, self.ids(missing), strict=True):
            found[text] = tokens
            if len(text) <= KEPT_CHARACTERS and len(self._kept) < KEPT_TAILS:
                self._kept[text] = tokens
        return found

    def token_at(self, text: str, tokens: list[int], character: int) -> int | None:
        """Number of the first token that starts at or after a character, where a cut says it without offsets."""
        if character >= len(text):
            return len(tokens)
        for token, start, end in self._cuts_of(text, tokens):
            if start == character:
                return token
            if end == character:
                return token + 1
        return None

    def _cuts_of(self, text: str, tokens: list[int]) -> list[tuple[int, int, int]]:
        """(token, first character, end) of each cut in a text; none where text and tokens do not tell the same."""
        if self._pattern is None:
            return []
        cuts, place = [], -1
        try:
            for match in self._pattern.finditer(text):
                place = tokens.index(self._cuts[match.group()], place + 1)
                cuts.append((place, *match.span()))
        except ValueError:
            return []
        seen = {tokens[token] for token, _, _ in cuts}
        return cuts if sum(map(tokens.count, seen)) == len(cuts) else []

    def _find_cuts(self) -> dict[str, int]:
        """Added tokens that split a text before it is normalised, and take no white space with them; tried out."""
        normalises = self._tokenizer.backend_tokenizer.normalizer is not None
        found = {
            token.content: number
            for number, token in self._tokenizer.added_tokens_decoder.items()
            if token.content
            and not (token.lstrip or token.rstrip or token.single_word)
            and not (token.normalized and normalises)
        }
        texts = [text for token in found for text in (f"{_PROBE}{token}{_PROBE}", f"{token}{_PROBE}")]
        ids = iter(self.ids(texts))
        good = {}
        for (token, number), whole, alone in zip(found.items(), ids, ids, strict=True):
            if whole.count(number) == 1 and alone[:1] == [number] and whole[whole.index(number) :] == alone:
                good[token] = number
        return good
