"""The gold reward of the built-in world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rlhf_lit.errors import UserError
from rlhf_lit.playground.grammar import REFUSAL, Task, table

# Words that may stand around a right answer. Anything else beside it makes the response wrong, so listing several
# candidates, or repeating the answer, earns nothing.
_FILLER = "the answer is it that this sure well i think hope helps"
FILLER = frozenset(_FILLER.split())
REFUSAL_FILLER = frozenset({"i", "am", "sorry", "but", "with", "that", "this", "request"})
PUNCTUATION = str.maketrans("", "", ".,:!?")

EXTRA_WORD = 0.2
RIGHT_AT_LEAST = 0.2
WRONG = -0.5
WRONGLY_REFUSED_OR_OBEYED = -1.0


def task_of(prompt: str) -> Task:
    """The task a prompt sets, with or without the chat template around it.

    Raises:
        UserError: the prompt is not one of the world's.
    """
    text = prompt.removeprefix("<bos>").strip()
    task = table().get(text)
    if task is None:
        raise UserError(
            f"the playground's gold reward cannot judge the prompt {text!r}: it knows only the built-in world's own "
            "prompts, so give another reward for other data"
        )
    return task


def _spare_words(words: list[str], answer: list[str], filler: frozenset[str]) -> int | None:
    """Words beside the answer, or None where the response is not the answer in filler alone."""
    for start in range(len(words) - len(answer) + 1):
        end = start + len(answer)
        if words[start:end] == answer and filler.issuperset(words[:start] + words[end:]):
            return len(words) - len(answer)
    return None


def _judge(task: Task, response: str) -> float:
    words = response.translate(PUNCTUATION).split()
    declining = task.kind == "decline"
    spare = _spare_words(words, task.answer.split(), REFUSAL_FILLER if declining else FILLER)
    if spare is not None:
        return max(RIGHT_AT_LEAST, 1.0 - EXTRA_WORD * spare)
    refused = _spare_words(words, REFUSAL.split(), REFUSAL_FILLER) is not None
    return WRONGLY_REFUSED_OR_OBEYED if declining or refused else WRONG


def gold_reward(
    prompts: Sequence[str], responses: Sequence[str], rows: Sequence[Mapping[str, Any]] | None = None
) -> list[float]:
    """The exact reward of each response, in [-1, 1].

    * right: 1 for the bare answer, 0.2 less for each word of filler around it, never under 0.2;
    * wrong, cut short, or several answers at once: -0.5;
    * a refusal of what can be answered, or anything but a refusal of what should be declined: -1.

    It can be named as the reward of PPO: ``rlhf_lit.playground.gold_reward``.

    Args:
        prompts: the instructions, bare or rendered by the playground's chat template.
        responses: as text, without special tokens.
        rows: not needed, as the prompt tells everything; taken because every reward function is given them.

    Raises:
        UserError: a prompt is not one of the world's.
    """
    return [_judge(task_of(prompt), response) for prompt, response in zip(prompts, responses, strict=True)]


def is_right(prompt: str, response: str) -> bool:
    """Whether the response answers (or declines) as it should, however wordy."""
    return _judge(task_of(prompt), response) > 0
