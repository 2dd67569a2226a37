"""Rows of any number and length, and a tokenizer for them: words made of syllables, drawn as often as words are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SHAPES = ("prompt", "messages", "pairs")
VOCABULARY = 8192
WORDS = 5000
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
ONSETS, VOWELS = (*"bcdfghklmnprstvw", "st", "tr", "pl", "ch"), (*"aeiou", "ea", "ou")
# Of this language a word with the blank before it is so many tokens.
TOKENS_PER_WORD = 1.2


def words(generator: np.random.Generator) -> np.ndarray:
    """The language's words, the commonest first."""
    found: dict[str, None] = {}
    while len(found) < WORDS:
        syllables = generator.integers(1, 4)
        found["".join(generator.choice(ONSETS) + generator.choice(VOWELS) for _ in range(syllables))] = None
    return np.array(list(found))


def texts(generator: np.random.Generator, known: np.ndarray, count: int, length: int) -> Iterator[str]:
    """Texts of about ``length`` tokens; the k-th word is drawn as often as 1/k (Zipf)."""
    chances = 1 / np.arange(1, len(known) + 1)
    chances /= chances.sum()
    size = max(1, round(length / TOKENS_PER_WORD))
    for start in range(0, count, 1000):
        drawn = known[generator.choice(len(known), (min(1000, count - start), size), p=chances)]
        for row in drawn:
            yield " ".join(row) + "."


def write_rows(path: Path, shape: str, count: int, tokens: int) -> None:
    """A JSON Lines file of conversations of about ``tokens`` tokens.

    Args:
        path: the file to be.
        shape: ``prompt`` and completion, ``messages`` of four turns, or ``pairs`` of answers, all as message lists.
        count: rows.
        tokens: of a row; of a pair, of the prompt and one answer.
    """
    generator = np.random.default_rng(0)
    parts = {"prompt": 2, "messages": 4, "pairs": 3}[shape]
    pieces = texts(generator, words(generator), count * parts, tokens // (4 if shape == "messages" else 2))
    with path.open("w") as file:
        for _ in range(count):
            row = _row(shape, [next(pieces) for _ in range(parts)])
            file.write(json.dumps(row) + "\n")


def _row(shape: str, said: list[str]) -> dict[str, Any]:
    user, assistant = (lambda text, role=role: {"role": role, "content": text} for role in ("user", "assistant"))
    if shape == "prompt":
        return {"prompt": [user(said[0])], "completion": [assistant(said[1])]}
    if shape == "pairs":
        return {"prompt": [user(said[0])], "chosen": [assistant(said[1])], "rejected": [assistant(said[2])]}
    return {"messages": [user(said[0]), assistant(said[1]), user(said[2]), assistant(said[3])]}


def save_tokenizer(folder: Path) -> None:
    """A byte-level BPE of the language, with ChatML's template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    generator = np.random.default_rng(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(generator, words(np.random.default_rng(0)), 20_000, 100), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")
    fast.chat_template = CHATML
    fast.save_pretrained(folder)
