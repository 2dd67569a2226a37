"""``chat``: try a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.commands.training import Parser, quiet_libraries
from rlhf_lit.data.chat import ChatFormat
from rlhf_lit.data.records import Message
from rlhf_lit.errors import UserError, hand_over, say, tell
from rlhf_lit.evaluation.sampling import draw
from rlhf_lit.models.base import Base
from rlhf_lit.models.rope import room
from rlhf_lit.rollout.engine import Sampling

HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends it"
UNBOUNDED = 8192  # tokens of an answer of a model whose context has no end


def converse(
    model: str,
    system: str | None = None,
    sampling: Sampling = Sampling(),
    single_turn: bool = False,
    base: str | None = None,
) -> None:
    """Read turns from standard input and answer each.

    Args:
        model: a run folder, an `hf/` folder or a hub name.
        system: a system message that opens every conversation.
        sampling: length and temperature of the answers. Without `max_new_tokens` an answer may take what the
            conversation has left of the model's context.
        single_turn: forget the conversation after every answer.
        base: where the base of an adapter is now; null is where the adapter says that it was.

    Raises:
        UserError: the model cannot be loaded, or the context has no room for an answer and nobody is at the terminal to
            change that.
    """
    module = SFT(Base(name=model, adapter_base=base), sampling=replace(sampling, rows_at_once=1))
    module.configure_model()
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    opening = [Message("system", system)] if system else []
    turns, answered = list(opening), 0
    interactive = sys.stdin.isatty()
    if interactive:
        tell(HELP)
    while True:
        try:
            line = input("> " if interactive else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line == "/reset":
            turns = list(opening)
        if not line or line == "/reset":
            continue
        asked = [*turns, Message("user", line)]
        try:
            answer, cut = _answer(module, asked, sampling, answered)
        except UserError as error:
            if not interactive:
                raise
            say(f"error: {error}")
            continue
        except KeyboardInterrupt:
            if not interactive:
                raise
            say("interrupted; the turn is forgotten")
            continue
        answered += 1
        hand_over(answer)
        if cut:
            say("note: the answer ends where the model's context does; /reset forgets the conversation")
        turns = list(opening) if single_turn else [*asked, Message("assistant", answer)]


def _answer(module: SFT, turns: Sequence[Message], sampling: Sampling, stream: int) -> tuple[str, bool]:
    """What the model says next, and whether the context cut it off.

    Raises:
        UserError: the context has no room for it.
    """
    left = None
    if sampling.max_new_tokens is None:
        length = len(ChatFormat(module.tokenizer).prompt(turns))
        left = room(module.roles.policy, length)
        if left is not None and left < 1:
            raise UserError(f"the conversation has {length} tokens and fills the model's context; /reset forgets it")
        module.sampling = replace(module.sampling, max_new_tokens=UNBOUNDED if left is None else left)
    samples, texts = draw(module, [turns], stream=stream)
    return texts[0][0], left is not None and not samples.ended[0]


def main(argv: list[str]) -> int:
    """Run ``chat``."""
    parser = Parser(prog="rlhf-lit chat", description=f"Talk to a model; {HELP}.")
    parser.add_function_arguments(converse, as_positional=True)
    arguments = parser.instantiate_classes(parser.parse_args(argv))
    quiet_libraries()
    converse(**arguments.as_dict())
    return 0
