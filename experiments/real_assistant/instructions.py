"""Instructions that a program can check, composed for training, and those of IFEval that a short answer can follow.

The checks and the names of their arguments are IFEval's (Zhou et al. 2023, 2311.07911); the wordings and the tasks of
the training prompts are not: no training prompt is one of IFEval's.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

WORDS = (
    "garden", "river", "music", "window", "summer", "paper", "coffee", "mountain", "friend", "market", "winter",
    "letter", "bridge", "ocean", "kitchen", "story", "light", "morning", "travel", "school",
)  # fmt: skip
CLOSINGS = ("That is all for now.", "Is there anything else?", "I hope this helps.", "Have a lovely day!")


@dataclass(frozen=True)
class Instruction:
    """A check, its arguments, and how it is asked for."""

    check: str
    arguments: dict[str, Any]
    asked: str


def _words(draw: random.Random) -> Instruction:
    most = draw.choice((15, 20, 25, 30, 40))
    asked = draw.choice((f"Use fewer than {most} words.", f"Stay below {most} words."))
    return Instruction("length_constraints:number_words", {"relation": "less than", "num_words": most}, asked)


def _sentences(draw: random.Random) -> Instruction:
    number, relation = draw.choice(((2, "less than"), (3, "less than"), (2, "at least"), (3, "at least")))
    asked = f"Write {'fewer than' if relation == 'less than' else relation} {number} sentences."
    return Instruction("length_constraints:number_sentences", {"relation": relation, "num_sentences": number}, asked)


def _bullets(draw: random.Random) -> Instruction:
    number = draw.randint(2, 4)
    asked = f"Give exactly {number} bullet points, each a line that begins with an asterisk: * like this"
    return Instruction("detectable_format:number_bullet_lists", {"num_bullets": number}, asked)


def _highlights(draw: random.Random) -> Instruction:
    number = draw.randint(1, 3)
    asked = f"Highlight at least {number} phrase{'s' * (number > 1)} with asterisks, as in *these words*."
    return Instruction("detectable_format:number_highlighted_sections", {"num_highlights": number}, asked)


def _placeholders(draw: random.Random) -> Instruction:
    number = draw.randint(1, 3)
    asked = f"Leave at least {number} placeholder{'s' * (number > 1)} in square brackets, for example [name]."
    return Instruction("detectable_content:number_placeholders", {"num_placeholders": number}, asked)


def _closing(draw: random.Random) -> Instruction:
    phrase = draw.choice(CLOSINGS)
    asked = f'The very last words must be "{phrase}"'
    return Instruction("startend:end_checker", {"end_phrase": phrase}, asked)


def _with_word(draw: random.Random) -> Instruction:
    words = sorted(draw.sample(WORDS, draw.randint(1, 2)))
    asked = f"The answer must contain the word{'s' * (len(words) > 1)} {' and '.join(words)}."
    return Instruction("keywords:existence", {"keywords": words}, asked)


def _often(draw: random.Random) -> Instruction:
    word, number = draw.choice(WORDS), draw.randint(2, 3)
    asked = f"Use the word {word} {number} times or more."
    given = {"relation": "at least", "keyword": word, "frequency": number}
    return Instruction("keywords:frequency", given, asked)


def _without(draw: random.Random) -> Instruction:
    words = sorted(draw.sample(("the", "very", "important", "can", "you", "is", "help", "also"), 2))
    asked = f"Never use the words {words[0]} and {words[1]}."
    return Instruction("keywords:forbidden_words", {"forbidden_words": words}, asked)


def _capitals(draw: random.Random) -> Instruction:
    number = draw.randint(1, 3)
    asked = f"Put at least {number} word{'s' * (number > 1)} in CAPITALS."
    given = {"capital_relation": "at least", "capital_frequency": number}
    return Instruction("change_case:capital_word_frequency", given, asked)


def _fixed(check: str, *wordings: str, **arguments: Any) -> Callable[[random.Random], Instruction]:
    return lambda draw: Instruction(check, arguments, draw.choice(wordings))


KINDS: tuple[Callable[[random.Random], Instruction], ...] = (
    _words,
    _sentences,
    _bullets,
    _highlights,
    _placeholders,
    _closing,
    _with_word,
    _often,
    _without,
    _capitals,
    _fixed("punctuation:no_comma", "Use no commas at all.", "Write it without a single comma."),
    _fixed("change_case:english_lowercase", "Write in lower case only.", "Use small letters only, in English."),
    _fixed("change_case:english_capital", "WRITE IN CAPITAL LETTERS ONLY.", "Use capital letters only, in English."),
    _fixed("startend:quotation", "Put the whole answer between double quotation marks."),
    _fixed("detectable_format:title", "Begin with a title in double angular brackets, such as <<a title>>."),
    _fixed("detectable_content:postscript", "Close with a postscript that starts with P.S.", postscript_marker="P.S."),
    _fixed("combination:two_responses", "Give two different answers, with ****** (six asterisks) between them."),
)
"""What a training prompt may ask for."""

AT_ODDS = (
    {"change_case:english_lowercase", "change_case:english_capital", "change_case:capital_word_frequency"},
    {"length_constraints:number_words", "length_constraints:number_sentences", "combination:two_responses"},
    {"startend:end_checker", "startend:quotation", "detectable_content:postscript", "combination:two_responses"},
    {"change_case:english_lowercase", "startend:end_checker"},
    {"change_case:english_capital", "startend:end_checker"},
    {"change_case:english_lowercase", "detectable_content:postscript"},
    {"detectable_format:number_bullet_lists", "detectable_format:number_highlighted_sections"},
    {"detectable_format:number_bullet_lists", "combination:two_responses"},
    {"detectable_format:title", "startend:quotation"},
    {"length_constraints:number_words", "detectable_format:number_bullet_lists"},
)
"""Checks of which no two stand in one prompt: an answer could hardly follow both."""


def compose(tasks: Sequence[str], seed: int) -> Iterator[dict[str, Any]]:
    """A prompt for each task, with one or two instructions, as a row that ``InstructionReward`` reads."""
    draw = random.Random(seed)
    for task in tasks:
        chosen: list[Instruction] = []
        for kind in draw.sample(KINDS, draw.choice((1, 1, 2))):
            one = kind(draw)
            if not any({one.check, other.check} <= group for other in chosen for group in AT_ODDS):
                chosen.append(one)
        yield {
            "prompt": " ".join([task, *(one.asked for one in chosen)]),
            "instruction_id_list": [one.check for one in chosen],
            "kwargs": [one.arguments for one in chosen],
        }


MOST = {
    "num_words": 50, "num_sentences": 4, "num_paragraphs": 3, "num_placeholders": 6, "num_bullets": 5,
    "num_highlights": 4, "num_sections": 3, "frequency": 5, "let_frequency": 10, "capital_frequency": 10,
}  # fmt: skip
"""The largest number that an answer of 96 tokens has room for, by the name of the argument."""


def within_reach(row: dict[str, Any]) -> bool:
    """Whether an answer of 96 tokens can follow all of a row's instructions: by their numbers, whatever the model."""
    for arguments in row["kwargs"]:
        given = {key: value for key, value in (arguments or {}).items() if value is not None}
        at_most = "less than" in given.values()
        if not at_most and any(given.get(name, 0) > most for name, most in MOST.items()):
            return False
        if any(len(str(given.get(name, ""))) > 200 for name in ("prompt_to_repeat", "end_phrase")):
            return False
    return True
