"""The checks of IFEval (Zhou et al., 2311.07911), as `if-verifiable` has them from the paper's code, without downloads.

Four differ from that code: sentences and words are found without NLTK's data files, by pySBD; the language detector is
seeded, so that a response always has the same language, and a text of no language follows no instruction about it (it
would follow every one); a letter to be counted may be any character (else another one is drawn at random).

Imported where it is used, as the packages are optional.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import langdetect
import pysbd
from if_verifiable.ifeval import instructions
from if_verifiable.ifeval.instructions_registry import INSTRUCTION_DICT
from nltk.tokenize import NLTKWordTokenizer

langdetect.DetectorFactory.seed = 0


@cache
def _segmenter() -> Any:
    return pysbd.Segmenter(language="en", clean=False)


def sentences(text: str) -> list[str]:
    """The sentences of a text."""
    return [sentence for sentence in _segmenter().segment(text) if sentence.strip()]


def _compared(count: int, relation: str, threshold: int) -> bool:
    return count < threshold if relation == "less than" else count >= threshold


class SentenceCount(instructions.NumberOfSentences):
    """A number of sentences, as pySBD splits them."""

    def check_following(self, value: str) -> bool:
        return _compared(len(sentences(value)), self._comparison_relation, self._num_sentences_threshold)


class CapitalWords(instructions.CapitalWordFrequencyChecker):
    """A number of words in capitals."""

    def check_following(self, value: str) -> bool:
        words = (word for sentence in sentences(value) for word in NLTKWordTokenizer().tokenize(sentence))
        return _compared(sum(word.isupper() for word in words), self._comparison_relation, self._frequency)


class Language(instructions.ResponseLanguageChecker):
    """The language of the whole response."""

    def check_following(self, value: str) -> bool:
        try:
            return bool(langdetect.detect(value) == self._language)
        except langdetect.LangDetectException:
            return False


class LetterCount(instructions.LetterFrequencyChecker):
    """A number of occurrences of any one character."""

    def build_description(self, *, letter: str, let_frequency: int, let_relation: str) -> str:
        if len(letter) != 1:
            raise ValueError(f"{letter!r} is not one letter")
        said: str = super().build_description(letter="a", let_frequency=let_frequency, let_relation=let_relation)
        self._letter = letter.lower()
        return said


CHECKS: dict[str, Any] = INSTRUCTION_DICT | {
    "length_constraints:number_sentences": SentenceCount,
    "change_case:capital_word_frequency": CapitalWords,
    "language:response_language": Language,
    "keywords:letter_frequency": LetterCount,
}
"""By IFEval's name: the class that checks it."""


def problem(name: str, arguments: dict[str, Any]) -> str | None:
    """Why an instruction cannot be checked: the library would draw at random what is missing or out of range.

    Args:
        name: of the instruction, as IFEval has it.
        arguments: its own, without nulls.

    Returns:
        A few words; None where all is well.
    """
    if name not in CHECKS:
        return f"unknown instruction {name}"
    checker = CHECKS[name](name)
    try:
        needed = set(checker.get_instruction_args_keys())
        if missing := sorted(needed - set(arguments)):
            return f"{name} without {', '.join(missing)}"
        checker.build_description(**arguments)
        taken = checker.get_instruction_args() or {}
        numbers = {key: value for key, value in arguments.items() if isinstance(value, int | float)}
        if any(taken[key] != value for key, value in numbers.items()):
            return f"{name} with a number out of range"
        if name.endswith("nth_paragraph_first_word") and arguments["nth_paragraph"] > arguments["num_paragraphs"]:
            return f"{name} with a number out of range"
        checker.check_following("A word.")
    except Exception as error:  # the library's checks raise what their arguments make them raise
        return f"{name} that cannot be checked ({type(error).__name__})"
    return None
