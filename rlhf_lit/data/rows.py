"""One row of a file, in any of the known shapes, as conversation turns.

Text is kept as it stands, white space included; only the turns of a dialogue written as text (HH) are stripped, since
their separators carry white space of their own.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from typing import Any

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
PROMPT_COLUMNS = ("instruction", "prompt", "question")
ANSWER_COLUMNS = ("output", "response", "completion", "answer")
CHAT_COLUMNS = ("messages", "conversations")
# Several answers to one prompt. `ranked` stands for their order too: the best comes first.
LIST_COLUMNS = ("ranked", "answers", "responses", "completions")
KNOWN_COLUMNS = frozenset((*PROMPT_COLUMNS, *ANSWER_COLUMNS, *CHAT_COLUMNS, "input", "system", "text")) | frozenset(
    (*LIST_COLUMNS, "ranks", "scores", "chosen", "rejected", "margin", "score_chosen", "score_rejected", "label")
)
# A turn begins at a marker after a blank line (or at the very start): "Human:" inside a turn is text.
_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class Message:
    """One turn.

    Attributes:
        role: ``system``, ``user``, ``assistant`` or ``tool``; ``text`` of raw text, a conversation of that one turn.
        content: its text; "" of an assistant that calls tools and says nothing.
        tool_calls: what an assistant calls, as the file has it.
        supervised: whether an assistant turn is learned.
        extra: what else a chat template may read, e.g. ``name``, ``tool_call_id``, ``reasoning_content``.
    """

    role: str
    content: str
    tool_calls: tuple[Any, ...] = ()
    supervised: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict)


Turns = tuple[Message, ...]
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Unreadable:
    """Stands in the place of a row that could not be parsed; it is a bad row for the reason given."""

    reason: str


class BadRow(Exception):
    """A row that cannot be used; the text is the short reason it is counted under."""


def text(row: Row, column: str) -> str:
    """The column's text. Raises BadRow where it is null, not text, or blank."""
    value = row.get(column)
    if value is None:
        raise BadRow(f"null {column}")
    if not isinstance(value, str):
        raise BadRow(f"non-text {column}")
    if not value.strip():
        raise BadRow(f"empty {column}")
    return value


def optional_text(row: Row, column: str) -> str:
    """The column's text, "" where it is absent, null or blank. Raises BadRow where it is not text."""
    value = row.get(column)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"non-text {column}")
    return value if value.strip() else ""


def parse_dialogue(dialogue: str) -> Turns | None:
    """The turns of ``"\\n\\nHuman: … \\n\\nAssistant: …"``, stripped; None for text that does not begin with a turn."""
    before, *parts = _HH_TURN.split(dialogue)
    if before.strip() or not parts:
        return None
    roles = {"Human": "user", "Assistant": "assistant"}
    return tuple(Message(roles[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))


def _message(value: Any, column: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow(f"non-message {column}")
    role = value.get("role", value.get("from"))
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise BadRow("unknown role")
    content = value.get("content", value.get("value"))
    if isinstance(content, list):  # content parts, as multi-modal chats write them
        parts = [part.get("text", part.get("value")) if isinstance(part, Mapping) else None for part in content]
        texts = [part for part in parts if isinstance(part, str)]
        content = "".join(texts) if len(texts) == len(parts) else parts
    if content is None:
        raise BadRow(f"null message in {column}")
    if not isinstance(content, str):
        raise BadRow(f"non-text message in {column}")
    return Message(ROLES[role.lower()], content)


def _messages(row: Row, column: str) -> Turns:
    value = row.get(column)
    if value is None:
        raise BadRow(f"null {column}")
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"non-message {column}")
    if not value:
        raise BadRow(f"empty {column}")
    return tuple(_message(item, column) for item in value)


def turns_of(row: Row, column: str, role: str) -> Turns:
    """A column that holds messages, or the text of one turn of ``role``."""
    if isinstance(row.get(column), list | Mapping):
        return _messages(row, column)
    return (Message(role, text(row, column)),)


def check_alternation(turns: Turns) -> None:
    """System turns first, then a user turn; no two users or two assistants in a row; a tool answers an assistant.

    Raises:
        BadRow: otherwise.
    """
    before = {"user": {"start", "assistant", "tool"}, "assistant": {"user", "tool"}, "tool": {"assistant", "tool"}}
    previous = "start"
    for turn in turns:
        if turn.role == "system" and previous == "start":
            continue
        if turn.role == "system" or previous not in before[turn.role]:
            raise BadRow("roles do not alternate")
        previous = turn.role


def _system(row: Row) -> Turns:
    system = optional_text(row, "system")
    return (Message("system", system),) if system else ()


def check_prompt(turns: Turns) -> None:
    """A prompt ends with something to answer. Raises BadRow."""
    if not turns or turns[-1].role not in ("user", "tool"):
        raise BadRow("prompt does not end with a user turn")
    if not turns[-1].content.strip():
        raise BadRow("empty prompt")


def has_prompt(columns: Set[str]) -> bool:
    """Whether one of the columns holds a prompt."""
    return any(column in columns for column in (*PROMPT_COLUMNS, *CHAT_COLUMNS))


def prompt_turns(row: Row, columns: Set[str]) -> Turns:
    """The prompt from the column that holds it, without an answer: one of ``PROMPT_COLUMNS``, else a chat column."""
    column = next(c for c in (*PROMPT_COLUMNS, *CHAT_COLUMNS) if c in columns)
    if column in CHAT_COLUMNS or isinstance(row.get(column), list | Mapping):
        turns = _system(row) + _messages(row, column)
        check_alternation(turns)
        return turns
    prompt = text(row, column)
    dialogue = parse_dialogue(prompt)
    if dialogue is not None and dialogue[0].role == "user" and dialogue[-1] == Message("assistant", ""):
        return _system(row) + dialogue[:-1]
    given = optional_text(row, "input")
    return (*_system(row), Message("user", f"{prompt}\n\n{given}" if given else prompt))


def demonstration(row: Row, columns: Set[str]) -> Turns:
    """A whole conversation that ends with the assistant. Raises BadRow."""
    chat = next((c for c in CHAT_COLUMNS if c in columns), None)
    answer = next((c for c in ANSWER_COLUMNS if c in columns), None)
    if chat is not None and not {"chosen", "rejected"} <= columns:
        turns = _system(row) + _messages(row, chat)
        check_alternation(turns)
    elif answer is not None and has_prompt(columns):
        prompt = prompt_turns(row, columns)
        check_prompt(prompt)
        turns = prompt + turns_of(row, answer, "assistant")
    elif {"chosen", "rejected"} <= columns:
        prompt, chosen, _ = preference(row, columns)
        turns = prompt + chosen
    else:
        turns = (Message("assistant", text(row, "text")),)
    if turns[-1].role != "assistant":
        raise BadRow("no final assistant turn")
    if any(not turn.content.strip() for turn in turns if turn.role == "assistant"):
        raise BadRow("empty response")
    return turns


def _dialogue(row: Row, column: str) -> Turns:
    if isinstance(row.get(column), list | Mapping):
        turns = _messages(row, column)
        check_alternation(turns)
        return turns
    turns_or_none = parse_dialogue(text(row, column))
    if turns_or_none is None:
        raise BadRow(f"no 'Human:' turn in {column}")
    return turns_or_none


def _is_dialogue(value: Any) -> bool:
    """A message list that begins before the answer, so that it repeats the prompt."""
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    role = value[0].get("role", value[0].get("from"))
    return isinstance(role, str) and ROLES.get(role.lower()) != "assistant"


def preference(row: Row, columns: Set[str]) -> tuple[Turns, Turns, Turns]:
    """Prompt, chosen, rejected. The prompt of two whole dialogues is what stands before the last assistant turn.

    Raises:
        BadRow: as the name of the reason says.
    """
    if has_prompt(columns) and not _is_dialogue(row.get("chosen")) and not _is_dialogue(row.get("rejected")):
        prompt = prompt_turns(row, columns)
        check_prompt(prompt)
        chosen, rejected = turns_of(row, "chosen", "assistant"), turns_of(row, "rejected", "assistant")
    else:
        whole = {side: _dialogue(row, side) for side in ("chosen", "rejected")}
        if any(turns[-1].role != "assistant" for turns in whole.values()):
            raise BadRow("no final assistant turn")
        prompt, chosen, rejected = whole["chosen"][:-1], whole["chosen"][-1:], whole["rejected"][-1:]
        if prompt != whole["rejected"][:-1]:
            raise BadRow("prompts differ")
        if not any(turn.role == "user" and turn.content.strip() for turn in prompt):
            raise BadRow("empty prompt")
    for side, turns in (("chosen", chosen), ("rejected", rejected)):
        if turns[0].role != "assistant" or turns[-1].role != "assistant":
            raise BadRow("no final assistant turn")
        if any(not turn.content.strip() for turn in turns if turn.role == "assistant"):
            raise BadRow(f"empty {side}")
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    return prompt, chosen, rejected


def prompt(row: Row, columns: Set[str]) -> Turns:
    """A prompt to be answered, from any shape, its answer dropped. Raises BadRow."""
    if has_prompt(columns):
        turns = prompt_turns(row, columns)
    elif "chosen" in columns:
        turns = _dialogue(row, "chosen")
    else:
        turns = (Message("user", text(row, "text")),)
    while turns and turns[-1].role == "assistant":
        turns = turns[:-1]
    check_prompt(turns)
    return turns


def margin(row: Row, columns: Set[str]) -> float:
    """The ``margin`` column, else ``score_chosen`` − ``score_rejected``, else 0. Raises BadRow."""
    if "margin" in columns:
        return number(row, "margin")
    if {"score_chosen", "score_rejected"} <= columns:
        return number(row, "score_chosen") - number(row, "score_rejected")
    return 0.0


def label(row: Row) -> bool:
    """The ``label`` column: true or false, 1 or 0, or their words (a CSV has nothing else). Raises BadRow."""
    value = row.get("label")
    if value is None:
        raise BadRow("null label")
    word = value.strip().lower() if isinstance(value, str) else value
    if word in (True, "true", "1"):
        return True
    if word in (False, "false", "0"):
        return False
    raise BadRow("non-boolean label")


def number(row: Row, column: str) -> float:
    """The column's finite number, as text too. Raises BadRow."""
    value = row.get(column)
    try:
        found = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        found = math.nan
    if not math.isfinite(found):
        raise BadRow(f"non-number {column}")
    return found
