"""One row of a known shape, as turns: a conversation, a pair of answers, a prompt."""

from __future__ import annotations

import math

from rlhf_lit.data.columns import Column
from rlhf_lit.data.messages import (
    begins_before_the_answer,
    check_alternation,
    check_answers,
    holds_messages,
    messages,
    parse_dialogue,
    turns,
)
from rlhf_lit.data.messages import check_prompt as _check_prompt
from rlhf_lit.data.rows import LARGEST, BadRow, Message, Row, Turns, checked_text, number
from rlhf_lit.data.shapes import Shape


def demonstration(shape: Shape, row: Row) -> Turns:
    """A whole conversation that ends with the assistant, or one turn of raw text; of two answers, the better one.

    Raises:
        BadRow: as the name of the reason says.
    """
    assert shape.prompt is not None or shape.answer is not None
    if shape.form == "answer":
        assert shape.answer is not None
        found = _answered(shape.checked_prompt(row), shape.answer, row)
    elif shape.form == "chat":
        assert shape.prompt is not None
        found = shape.messages(shape.prompt, row)
    elif shape.form == "text":
        assert shape.answer is not None
        return (Message("text", shape.answer.text(row)),)
    else:
        prompt, chosen, _ = preference(shape, row)
        return prompt + chosen
    if found[-1].role != "assistant":
        raise BadRow("no final assistant turn")
    check_answers(found, "empty response")
    return found


def _answered(prompt: Turns, column: Column, row: Row) -> Turns:
    """The prompt with its answer, which may be a whole dialogue that begins with that prompt. Raises BadRow."""
    value = column.of(row)
    if begins_before_the_answer(value):
        found = _dialogue(column, row)
        if _said(found[: len(prompt)]) != _said(prompt):
            raise BadRow("prompt differs from that of the dialogue")
        return found
    found = prompt + turns(value, column.name, "assistant")
    check_alternation(found)
    return found


def _said(turns: Turns) -> list[tuple[str, str]]:
    return [(turn.role, turn.content) for turn in turns]


def preference(shape: Shape, row: Row) -> tuple[Turns, Turns, Turns]:
    """Prompt, chosen, rejected. The prompt of two whole dialogues is what stands before the last assistant turn.

    Raises:
        Tie: of two answers with a verdict, none won.
        BadRow: as the name of the reason says.
    """
    prompt, answers = two_answers(shape, row)
    better, worse = shape.verdict.order(row) if shape.verdict is not None else (0, 1)
    return prompt, answers[better], answers[worse]


def two_answers(shape: Shape, row: Row) -> tuple[Turns, tuple[Turns, Turns]]:
    """The prompt and its two answers in the order of their columns. Raises BadRow."""
    assert shape.answer is not None
    assert shape.other is not None
    sides = (shape.answer, shape.other)
    values = [side.of(row) for side in sides]
    whole = shape.prompt is None or any(map(begins_before_the_answer, values))
    if whole:
        prompt, first, second = _two_dialogues(shape, row, sides)
    else:
        prompt = shape.checked_prompt(row)
        first, second = (_answered(prompt, side, row)[len(prompt) :] for side in sides)
    for side, answer in zip(sides, (first, second), strict=True):
        if answer[0].role != "assistant" or answer[-1].role != "assistant":
            raise BadRow("no final assistant turn")
        check_answers(answer, f"empty {side.name}")
    if first == second:
        raise BadRow(f"{sides[0].name} equals {sides[1].name}")
    return prompt, (first, second)


def _two_dialogues(shape: Shape, row: Row, sides: tuple[Column, Column]) -> tuple[Turns, Turns, Turns]:
    """The turns before the last ones, which both dialogues share, and the last ones."""
    first, second = (_dialogue(side, row) for side in sides)
    if first[-1].role != "assistant" or second[-1].role != "assistant":
        raise BadRow("no final assistant turn")
    prompt = first[:-1]
    if prompt != second[:-1]:
        raise BadRow("prompts differ")
    if not any(turn.role == "user" and turn.content.strip() for turn in prompt):
        raise BadRow("empty prompt")
    if shape.prompt is not None and shape.prompt.mapped:
        # The user named the prompt: it must be the dialogues' own.
        asked = shape.checked_prompt(row)
        if _said(asked) != _said(prompt):
            raise BadRow("prompt differs from that of the dialogues")
    else:
        prompt = shape.behind_system(prompt, row)
    return prompt, first[-1:], second[-1:]


def _dialogue(column: Column, row: Row) -> Turns:
    value = column.of(row)
    if holds_messages(value):
        found = messages(value, column.name)
        check_alternation(found)
        return found
    found_or_none = parse_dialogue(checked_text(value, column.name))
    if found_or_none is None:
        raise BadRow(f"no 'Human:' turn in {column.name}")
    return found_or_none


def prompt(shape: Shape, row: Row) -> Turns:
    """A prompt to be answered, from any shape, its answer dropped. Raises BadRow."""
    if shape.prompt is not None:
        found = shape.prompt_turns(row)
    elif shape.form == "text":
        assert shape.answer is not None
        found = (Message("user", shape.answer.text(row)),)
    else:
        assert shape.answer is not None
        found = _dialogue(shape.answer, row)
        found = shape.behind_system(found, row)
    while found and found[-1].role == "assistant":
        found = found[:-1]
    _check_prompt(found)
    return found


def margin(shape: Shape, row: Row, needed: bool) -> float:
    """How much better the chosen answer was rated: ``margin``, else ``score_chosen`` − ``score_rejected``, else 0.

    Args:
        shape: of the file.
        row: one of it.
        needed: a loss reads it, so that a null one makes a bad row; it is 0 otherwise.

    Raises:
        BadRow: no number, or one that says that the rejected answer is the better one.
    """
    if "margin" in shape.parts:
        found = _rating(shape.parts["margin"], row, needed)
        if found < 0:
            raise BadRow("margin below 0")
    elif "score_chosen" in shape.parts and "score_rejected" in shape.parts:
        found = _rating(shape.parts["score_chosen"], row, needed) - _rating(shape.parts["score_rejected"], row, needed)
        if found < 0:
            raise BadRow("chosen and scores disagree")
    else:
        return 0.0
    if found > LARGEST:
        raise BadRow("non-number margin")
    return 0.0 if math.isnan(found) else found


def _rating(column: Column, row: Row, needed: bool) -> float:
    """The number; NaN of a null one (or an empty cell) that nothing needs."""
    value = column.of(row)
    return math.nan if value in (None, "") and not needed else number(value, column.name)
