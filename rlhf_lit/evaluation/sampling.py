"""Answers of a trained policy to any prompts, without a trainer or a data module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_lit.algorithms.policy import Writer
from rlhf_lit.batches import PromptBatch, Sequences
from rlhf_lit.data.chat import ChatFormat, Template
from rlhf_lit.data.records import Message
from rlhf_lit.rollout.engine import Samples

SCORING_TOKENS = 32768


def draw(
    module: Writer,
    conversations: Sequence[Sequence[Message]],
    samples: int = 1,
    stream: int = 0,
    template: Template = "auto",
    tools: Sequence[Sequence[Any]] | None = None,
) -> tuple[Samples, list[list[str]]]:
    """Sample responses with noise keyed by (seed, stream, row, sample).

    Args:
        module: an algorithm with a policy, its model built.
        conversations: what to answer, as turns.
        samples: responses to each.
        stream: keeps this round of sampling apart from another.
        template: how a conversation becomes text.
        tools: what each conversation may call; None is nothing.

    Returns:
        The samples, ``samples`` rows for each conversation, and their texts by conversation.
    """
    chat = ChatFormat(module.tokenizer, template)
    each = tools if tools is not None else [()] * len(conversations)
    asked = [chat.prompt(turns, may_call) for turns, may_call in zip(conversations, each, strict=True)]
    tokens = [row for row in asked for _ in range(samples)]
    rows = torch.arange(len(tokens))
    prompts = PromptBatch(
        Sequences.pad(tokens, [[False] * len(row) for row in tokens]),
        rows // samples,
        rows % samples,
        tuple(prompt_text(chat, turns) for turns in conversations for _ in range(samples)),
        tuple({} for _ in rows),
        SCORING_TOKENS,
    )
    module.eval()
    drawn = module.respond(prompts.to(module.device), stream)
    texts = module.response_texts(drawn)
    return drawn, [texts[i : i + samples] for i in range(0, len(texts), samples)]


def transcript(turns: Sequence[Message]) -> str:
    """A prompt as a judge elsewhere sees it, which knows no special tokens of ours: a single turn bare, a dialogue turn
    by turn under the roles' names."""
    if len(turns) == 1:
        return turns[0].content
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in turns)


def prompt_text(chat: ChatFormat, turns: Sequence[Message]) -> str:
    """A prompt as a judge and a reader see it: a single turn bare, a dialogue rendered."""
    return turns[0].content if len(turns) == 1 else chat.render_prompt(turns)
