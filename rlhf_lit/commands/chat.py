"""``chat``: try a model in the terminal."""

from __future__ import annotations

import sys
from dataclasses import replace

import torch

from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.commands.training import Parser, quiet_libraries
from rlhf_lit.data.records import Message
from rlhf_lit.evaluation.sampling import draw
from rlhf_lit.models.base import Base
from rlhf_lit.rollout.engine import Sampling

HELP = "/reset forgets the conversation, /quit (or Ctrl-D) ends it"


def converse(
    model: str,
    system: str | None = None,
    sampling: Sampling = Sampling(max_new_tokens=256),
    single_turn: bool = False,
    base: str | None = None,
) -> None:
    """Read turns from standard input and answer each.

    Args:
        model: a run folder, an `hf/` folder or a hub name.
        system: a system message that opens every conversation.
        sampling: length and temperature of the answers.
        single_turn: forget the conversation after every answer.
        base: where the base of an adapter is now; null is where the adapter says that it was.
    """
    module = SFT(Base(name=model, adapter_base=base), sampling=replace(sampling, rows_at_once=1))
    module.configure_model()
    module.to("cuda" if torch.cuda.is_available() else "cpu")
    opening = [Message("system", system)] if system else []
    turns, answered = list(opening), 0
    interactive = sys.stdin.isatty()
    if interactive:
        print(HELP)
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
        turns.append(Message("user", line))
        _, texts = draw(module, [turns], stream=answered)
        answered += 1
        print(texts[0][0])
        turns = list(opening) if single_turn else [*turns, Message("assistant", texts[0][0])]


def main(argv: list[str]) -> int:
    """Run ``chat``."""
    parser = Parser(prog="rlhf-lit chat", description=f"Talk to a model; {HELP}.")
    parser.add_function_arguments(converse, as_positional=True)
    arguments = parser.instantiate_classes(parser.parse_args(argv))
    quiet_libraries()
    converse(**arguments.as_dict())
    return 0
