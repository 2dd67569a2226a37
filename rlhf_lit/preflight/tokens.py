"""What the tokens of a batch tell, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from rlhf_lit.batches import Sequences
from rlhf_lit.preflight.check import Check, count, judge


def one_bos(sides: Sequence[Sequences], rows: Sequence[int], bos: int | None, stops: tuple[int, ...]) -> Check:
    """At most one BOS: at a row's start, or after an EOS where a template opens each turn with one.

    In most rows a surplus comes from the template or the tokenizer, and stops the run. In a few it comes from their own
    text (an HTML tag that reads like a BOS), and is worth a warning.

    Args:
        sides: sequences, each of the given rows.
        rows: their numbers in the data file.
        bos: id of the tokenizer's BOS, if it has one.
        stops: ids of the tokens that end a turn.
    """
    if bos is None:
        return Check("one BOS", "ok", "the tokenizer has none")
    bad = sorted({row for row, tokens, mask in rows_of(sides, rows) if _surplus_bos(tokens, mask, bos, stops)})
    if not bad:
        return Check("one BOS", "ok", f"no second one in {count(len(rows), 'row')}")
    found = f"a second one in {len(bad)} of {count(len(rows), 'row')}, first in row {bad[0]}"
    if 2 * len(bad) > len(rows):
        return Check("one BOS", "failed", found, "let the chat template or the text write it, not both (data.template)")
    return Check("one BOS", "warning", found, "their text itself holds one")


def _surplus_bos(tokens: list[int], mask: list[bool], bos: int, stops: tuple[int, ...]) -> bool:
    if bos in stops:  # one token for both (GPT-2): only at the start is it certain which of the two it is
        return tokens[:2] == [bos, bos] and not mask[1]
    return any(token == bos and before not in stops for before, token in pairwise(tokens))


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
