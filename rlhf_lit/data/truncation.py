"""Cutting what is too long: the prompt, never the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from rlhf_lit.data.chat import Encoded

Truncation = Literal["keep_start", "keep_end", "drop"]


def truncate_prompt(
    tokens: list[int], mask: list[bool], max_length: int, policy: Truncation, bos_token_id: int | None = None
) -> tuple[list[int], list[bool]] | None:
    """A sequence of at most ``max_length`` tokens, cut in what stands before its first supervised token.

    Args:
        tokens, mask: as in :class:`Encoded`; with no supervised token the whole is a prompt.
        max_length: tokens that may remain.
        policy: ``keep_start`` drops the prompt's last tokens, what opens the answer included; ``keep_end`` its first
            ones, a leading BOS excepted; ``drop`` cuts nothing.
        bos_token_id: tells ``keep_end`` what a leading BOS is.

    Returns:
        The cut sequence; None where it must be dropped: by policy, or since the answer and one token before it do not
        fit.
    """
    surplus = len(tokens) - max_length
    if surplus <= 0:
        return tokens, mask
    prompt_length = mask.index(True) if True in mask else len(tokens)
    return _cut(tokens, mask, prompt_length, surplus, policy, bos_token_id)


def truncate_pair(
    chosen: Encoded, rejected: Encoded, max_length: int, policy: Truncation, bos_token_id: int | None = None
) -> tuple[Encoded, Encoded] | None:
    """Both sides of a pair, the same prompt tokens cut from each: see :func:`truncate_group`."""
    sides = truncate_group([chosen, rejected], max_length, policy, bos_token_id)
    return None if sides is None else (sides[0], sides[1])


def truncate_group(
    sides: Sequence[Encoded], max_length: int, policy: Truncation, bos_token_id: int | None = None
) -> list[Encoded] | None:
    """Answers to one prompt, the same prompt tokens cut from each, so that the longest has at most ``max_length``.

    Only tokens that all of them share before any answer may be cut; arguments and None as in :func:`truncate_prompt`.
    """
    surplus = max(len(side.tokens) for side in sides) - max_length
    if surplus <= 0:
        return list(sides)
    shared = min(side.mask.index(True) if True in side.mask else len(side.tokens) for side in sides)
    first = sides[0].tokens[:shared]
    for side in sides[1:]:
        if side.tokens[: len(first)] != first:
            shared = next(i for i, token in enumerate(first) if side.tokens[i] != token)
            first = first[:shared]
    kept = []
    for side in sides:
        cut = _cut(side.tokens, side.mask, shared, surplus, policy, bos_token_id)
        if cut is None:
            return None
        kept.append(replace(side, tokens=cut[0], mask=cut[1]))
    return kept


def _cut(
    tokens: list[int], mask: list[bool], prompt_length: int, surplus: int, policy: Truncation, bos_token_id: int | None
) -> tuple[list[int], list[bool]] | None:
    """The sequence without ``surplus`` of its first ``prompt_length`` tokens, of which at least one must remain."""
    if policy == "drop" or surplus >= prompt_length:
        return None
    if policy == "keep_start":
        start = prompt_length - surplus
    else:
        start = 1 if bos_token_id is not None and tokens[0] == bos_token_id else 0
    end = start + surplus
    return tokens[:start] + tokens[end:], mask[:start] + mask[end:]
