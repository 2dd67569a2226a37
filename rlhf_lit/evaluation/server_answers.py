"""A server's answers to the prompts that a model answers: a baseline that is not here."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlhf_lit.batches import Sequences
from rlhf_lit.data.chat import ChatFormat
from rlhf_lit.data.records import Message, Prompt, Source
from rlhf_lit.errors import UserError, say
from rlhf_lit.evaluation.answers import Answers, encoded
from rlhf_lit.randomness import derive_seed, row_keys
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.server import SEEDS, Body, Server, ask, require_answers

ROLE = "baseline"


def require_no_tools(prompts: Sequence[Prompt], source: Source) -> None:
    """Refuse prompts whose answer may be no text.

    Raises:
        UserError: one with tools, or a turn that calls one.
    """
    for prompt in prompts:
        if prompt.tools or any(turn.tool_calls or turn.role == "tool" for turn in prompt.prompt):
            raise UserError(
                f"{ROLE}: row {prompt.row} of {source.label} has tools, and what a server answers with them is no text "
                "that could be compared; leave such rows out"
            )


def require_server(server: Server, sampling: Sampling) -> None:
    """Find out whether a server answers, before anything is sampled.

    Raises:
        UserError: it does not, or not with these settings.
    """
    require_answers(server, {**_settings(sampling), "seed": 0}, ROLE)


def server_answers(
    server: Server, prompts: Sequence[Prompt], samples: int, sampling: Sampling, chat: ChatFormat, stream: int
) -> Answers:
    """What a server answers. It is sent the turns themselves and renders them by a template of its own.

    Args:
        server: who is asked.
        prompts: turns without tools.
        samples: answers to each.
        sampling: length and temperature, top-k and top-p where they are set.
        chat: how conversations become tokens here, in which the answers are measured and judged.
        stream: keeps this round of sampling apart from another: each row's seed comes from the key of its noise.

    Raises:
        UserError: the server does not answer, or without a text.
    """
    index = torch.arange(len(prompts) * samples)
    seeds = row_keys(derive_seed("sampling", stream), index // samples, index % samples) % SEEDS
    asked = [prompt for prompt in prompts for _ in range(samples)]
    bodies: list[Body] = [
        {"messages": [_as_sent(turn) for turn in prompt.prompt], **_settings(sampling), "seed": seed}
        for prompt, seed in zip(asked, seeds.tolist(), strict=True)
    ]
    replies = ask(server, bodies, ROLE)
    texts = []
    for prompt, reply in zip(asked, replies, strict=True):
        if reply.text is None:
            advice = "leave the row out, or name another model"
            if reply.finish == "length":
                advice = "raise sampling.max_new_tokens"
            raise UserError(
                f"{ROLE}: {server.address} answered row {prompt.row} without a text (finish_reason {reply.finish!r}); "
                f"{advice}"
            )
        texts.append(reply.text.strip())
    ended = np.array([reply.finish != "length" for reply in replies], dtype=float)
    cut = int((1 - ended).sum())
    if cut:
        say(
            f"note: {ROLE}: {cut} of {len(replies)} answers of {server.address} were cut at {sampling.limit} "
            "tokens; raise sampling.max_new_tokens for whole ones"
        )
    sequences: Sequences = encoded(
        chat, [(prompt.prompt, Message("assistant", text), ()) for prompt, text in zip(asked, texts, strict=True)]
    )
    by_prompt = [texts[i : i + samples] for i in range(0, len(texts), samples)]
    return Answers(by_prompt, sequences, ended.reshape(len(prompts), samples))


def _settings(sampling: Sampling) -> Body:
    return {
        "max_tokens": sampling.limit,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
    }


def _as_sent(turn: Message) -> Body:
    """A turn as a server reads it; what else it holds (a name) goes along."""
    return {"role": turn.role, "content": turn.content, **turn.extra}
