"""What the tokens of a batch tell, without a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import Any

from rlhf_lit.batches import Sequences
from rlhf_lit.data.rows import Message
from rlhf_lit.data.templates import ChatTemplate
from rlhf_lit.preflight.check import Check, count, judge


@dataclass(frozen=True)
class Marks:
    """The tokens by which a tokenizer and its chat template mark texts and turns.

    Attributes:
        bos: id of the tokenizer's BOS, if it has one.
        stops: ids of the tokens that end a turn.
        is_blank: whether a token is white space, as templates write it between turns.
        opens_turns: BOS opens turns of the chat template that no stop token closed, so that only two of them side by
            side tell of a surplus.
    """

    bos: int | None
    stops: tuple[int, ...]
    is_blank: Callable[[int], bool]
    opens_turns: bool

    @classmethod
    def of(cls, tokenizer: Any, stops: tuple[int, ...]) -> Marks:
        """Those of a tokenizer with its template, found by rendering two exchanges."""

        @cache
        def is_blank(token: int) -> bool:
            return not tokenizer.decode([token]).strip()

        closed = cls(tokenizer.bos_token_id, stops, is_blank, False)
        turns = [Message(role, "Hi") for role in 2 * ("user", "assistant")]
        text = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map).rendered(turns)
        if closed.bos is None or text is None:
            return closed
        tokens: list[int] = tokenizer(text, add_special_tokens=False).input_ids
        return replace(closed, opens_turns=closed.surplus(tokens, [False] * len(tokens)))

    def surplus(self, tokens: list[int], mask: list[bool]) -> bool:
        """Whether a BOS stands where none belongs: behind another, or where no turn begins."""
        if self.bos in self.stops:  # one token for both (GPT-2): only at the start is it certain which of the two it is
            return tokens[:2] == [self.bos, self.bos] and not mask[1]
        places = [place for place, token in enumerate(tokens) if token == self.bos]
        if self.opens_turns:
            return any(after == before + 1 for before, after in pairwise(places))
        return any(not self._begins_turn(tokens, place) for place in places)

    def _begins_turn(self, tokens: list[int], place: int) -> bool:
        """Whether nothing but white space stands between a place and the start of the text, or the end of a turn."""
        while place and self.is_blank(tokens[place - 1]):
            place -= 1
        return place == 0 or tokens[place - 1] in self.stops


def one_bos(sides: Sequence[Sequences], rows: Sequence[int], marks: Marks) -> Check:
    """At most one BOS at a row's start, and others only where they mark turns: after an EOS, as in Llama-2's exchanges
    and ChatML with BOS ``<|im_start|>``, or wherever the chat template itself writes one.

    In most rows a surplus comes from the template or the tokenizer, and stops the run. In a few it comes from their own
    text (an HTML tag that reads like a BOS), and is worth a warning.

    Args:
        sides: sequences, each of the given rows.
        rows: their numbers in the data file.
        marks: of the tokenizer that made them.
    """
    if marks.bos is None:
        return Check("one BOS", "ok", "the tokenizer has none")
    bad = sorted({row for row, tokens, mask in rows_of(sides, rows) if marks.surplus(tokens, mask)})
    if not bad:
        return Check("one BOS", "ok", f"no second one in {count(len(rows), 'row')}")
    found = f"a second one in {len(bad)} of {count(len(rows), 'row')}, first in row {bad[0]}"
    if 2 * len(bad) > len(rows):
        return Check("one BOS", "failed", found, "let the chat template or the text write it, not both (data.template)")
    return Check("one BOS", "warning", found, "their text itself holds one")


def supervised_tokens(sides: Sequence[Sequences], rows: Sequence[int]) -> Check:
    """Something to learn in every row."""
    counts = [(sum(mask), row) for row, _, mask in rows_of(sides, rows)]
    (fewest, row), (most, _) = min(counts), max(counts)
    total = sum(len(tokens) for _, tokens, _ in rows_of(sides, rows))
    per_row = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    found = f"{per_row} per row, {sum(count for count, _ in counts)} of {total} tokens"
    return judge(
        "supervised tokens",
        fewest > 0,
        found if fewest else f"none in row {row}",
        "every row needs an answer to learn: look at its fields and at data.template",
    )


def supervised_eos(sides: Sequence[Sequences], rows: Sequence[int], stops: tuple[int, ...]) -> Check:
    """An end among the supervised tokens of every row, or the model never learns to stop."""
    bad = [
        row
        for row, tokens, mask in rows_of(sides, rows)
        if not any(kept and token in stops for token, kept in zip(tokens, mask, strict=True))
    ]
    return judge(
        "EOS supervised",
        not bad,
        f"none in row {bad[0]}, nor in {len(bad) - 1} more" if bad else "in every row",
        "the model would never learn to stop: its template must close each answer with the tokenizer's EOS",
    )


def rows_of(sides: Sequence[Sequences], rows: Sequence[int]) -> Iterator[tuple[int, list[int], list[bool]]]:
    """(number, tokens, mask) of each row of each side, without its padding."""
    for side in sides:
        for row, tokens, mask, length in zip(rows, side.tokens, side.mask, side.lengths.tolist(), strict=True):
            yield row, tokens[:length].tolist(), mask[:length].tolist()
