"""``playground``: preference pairs or ranked lists in the built-in world, from a policy's own samples."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from rlhf_lit import playground
from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.commands.training import Parser, quiet_libraries
from rlhf_lit.data.records import Message
from rlhf_lit.errors import UserError, tell
from rlhf_lit.evaluation.sampling import draw
from rlhf_lit.files import atomic
from rlhf_lit.models.base import Base
from rlhf_lit.rollout.engine import Sampling


def write_pairs(
    model: str,
    to: Path,
    split: Literal["train", "held_out"] = "train",
    samples: int = 4,
    max_new_tokens: int = 24,
    ranked: bool = False,
    world: playground.World = playground.World(),
) -> int:
    """Let a policy answer the world's prompts several times, and a noisy rater compare its answers.

    Args:
        model: the policy: a run folder, an `hf/` folder or a hub name.
        to: the JSON Lines file to write, one {prompt, chosen, rejected} a line.
        split: which of the world's prompts.
        samples: answers to each prompt; every two that differ make a pair.
        max_new_tokens: longest answer.
        ranked: write one list a prompt, {prompt, answers, ranks}, in the place of its pairs.
        world: the built-in world.

    Returns:
        The number of pairs, or of lists.

    Raises:
        UserError: there is none.
    """
    module = SFT(Base(name=model), sampling=Sampling(max_new_tokens=max_new_tokens, rows_at_once=512))
    module.configure_model()
    prompts = [row["prompt"] for row in playground.prompts(world, split)]
    # A prompt that comes twice would give its pairs twice: noise is keyed by the row, the rater's mistakes by the text.
    prompts = list(dict.fromkeys(prompts))
    _, texts = draw(module, [[Message("user", prompt)] for prompt in prompts], samples)
    label = playground.ranked_lists if ranked else playground.preference_pairs
    rows = label(prompts, texts, world)
    if not rows:
        raise UserError(f"{model}: no two of its answers to a prompt differ in worth; train it longer, or sample more")
    to.parent.mkdir(parents=True, exist_ok=True)
    with atomic(to) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return len(rows)


def main(argv: list[str]) -> int:
    """Run ``playground``."""
    parser = Parser(prog="rlhf-lit playground", description="Preference pairs or ranked lists in the built-in world.")
    parser.add_function_arguments(write_pairs)
    arguments = parser.parse_args(argv)
    arguments = parser.instantiate_classes(arguments)
    quiet_libraries()
    count = write_pairs(**arguments.as_dict())
    tell(f"{count} {'ranked lists' if arguments.ranked else 'pairs'} in {arguments.to}")
    return 0
