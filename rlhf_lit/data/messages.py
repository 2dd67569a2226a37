"""Messages of a chat, as files write them, become turns: roles, tool calls, content parts, and what is not learned."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf_lit.data.rows import BadRow, Message, Turns, check_characters, checked_text

ROLES = {
    "system": "system",
    "developer": "system",
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
    "ipython": "tool",
    "function": "tool",
    "function_response": "tool",
    "tool_response": "tool",
}
# Fields of a message by which files say that a turn is not learned: OpenAI's, LLaMA-Factory's, axolotl's.
LEARNED = ("weight", "loss_weight", "loss", "train", "training")
# Fields that chat templates read.
EXTRA = ("name", "tool_call_id", "reasoning_content", "reasoning", "thinking")
_READ = frozenset(("role", "from", "content", "value", "tool_calls", "function_call", *LEARNED, *EXTRA))
# A turn begins at a marker after a blank line (or at the very start): "Human:" inside a turn is text.
_HH_TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
_HH_ROLES = {"Human": "user", "Assistant": "assistant"}
# Text that is a list of messages: JSON of a CSV cell, or what Python prints of such a list.
_CELL = re.compile(r"""\s*\[?\s*\{\s*["'](role|from|content|value)["']\s*:""")
_BEFORE = {"user": {"start", "assistant", "tool"}, "assistant": {"user", "tool"}, "tool": {"assistant", "tool"}}


def parse_dialogue(dialogue: str) -> Turns | None:
    """The turns of ``"\\n\\nHuman: … \\n\\nAssistant: …"``; None for text that does not begin with a turn.

    The turns are stripped, since their separators carry white space of their own.
    """
    if not dialogue.lstrip().startswith(("Human:", "Assistant:")):
        return None
    before, *parts = _HH_TURN.split(dialogue)
    if before.strip() or not parts:
        return None
    return tuple(Message(_HH_ROLES[who], said.strip()) for who, said in zip(parts[::2], parts[1::2], strict=True))


def messages(value: Any, name: str) -> Turns:
    """The turns of a list of messages, of one message, or of the JSON text of either. Raises BadRow."""
    if isinstance(value, str):
        value = _parsed(value, name)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"null {name}" if value is None else f"non-message {name}")
    if not value:
        raise BadRow(f"empty {name}")
    return tuple([_message(item, name) for item in value])


def unread_fields(value: Any) -> set[str]:
    """Fields of a list of messages that hold text and are never read."""
    if not isinstance(value, list):
        return set()
    return {
        key
        for item in value
        if isinstance(item, Mapping) and len(item) > 2 and not item.keys() <= _READ
        for key in item.keys() - _READ
        if isinstance(item[key], str) and item[key].strip()
    }


def holds_messages(value: Any) -> bool:
    """Whether a value is messages rather than the text of a turn."""
    if isinstance(value, str):
        return value[:1] in ("[", "{", " ", "\n") and _CELL.match(value) is not None
    return isinstance(value, list | Mapping)


def turns(value: Any, name: str, role: str) -> Turns:
    """Messages, or the text of one turn of ``role``. Raises BadRow."""
    if holds_messages(value):
        return messages(value, name)
    return (Message(role, checked_text(value, name)),)


def begins_before_the_answer(value: Any) -> bool:
    """Whether a value is a dialogue, as messages or as text, that does not begin with the assistant, so that it repeats
    the prompt."""
    if isinstance(value, str) and holds_messages(value):
        value = _parsed(value, "")
    if isinstance(value, str):
        dialogue = parse_dialogue(value)
        return dialogue is not None and [dialogue[0].role, dialogue[-1].role] == ["user", "assistant"]
    if not isinstance(value, list) or not value or not isinstance(value[0], Mapping):
        return False
    role = value[0].get("role", value[0].get("from"))
    return isinstance(role, str) and ROLES.get(role.lower()) != "assistant"


def check_alternation(turns: Turns) -> None:
    """System turns first, then a user turn; no two users or two assistants in a row; tools answer an assistant.

    Raises:
        BadRow: otherwise.
    """
    previous = "start"
    for turn in turns:
        if turn.role == "system" and previous == "start":
            continue
        if turn.role == "system" or previous not in _BEFORE[turn.role]:
            raise BadRow("roles do not alternate")
        previous = turn.role


def check_answers(turns: Turns, reason: str) -> None:
    """Refuse an assistant turn that neither says nor calls anything. Raises BadRow for ``reason``."""
    for turn in turns:
        if turn.role == "assistant" and not turn.tool_calls and (not turn.content or turn.content.isspace()):
            raise BadRow(reason)


def check_prompt(turns: Turns) -> None:
    """A prompt ends with something to answer. Raises BadRow."""
    if not turns or turns[-1].role not in ("user", "tool"):
        raise BadRow("prompt does not end with a user turn")
    if not turns[-1].content.strip():
        raise BadRow("empty prompt")


def history(value: Any, name: str) -> Turns:
    """Earlier turns: pairs of what a user and the assistant said, or messages. Raises BadRow."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        value = _parsed(value, name)
    if value is None or value in ("", []):
        return ()
    if not isinstance(value, list):
        raise BadRow(f"non-list {name}")
    if all(isinstance(item, Mapping) for item in value):
        return messages(value, name)
    found: list[Message] = []
    for pair in value:
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise BadRow(f"{name} is no list of pairs")
        found += [Message("user", checked_text(pair[0], name)), Message("assistant", checked_text(pair[1], name))]
    return tuple(found)


def tools(value: Any, name: str) -> tuple[Any, ...]:
    """The tools that a conversation may call: a list of descriptions, or the JSON text of one. Raises BadRow."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return ()
    if isinstance(value, str):
        value = _parsed(value, name)
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(item, Mapping) for item in value):
        raise BadRow(f"non-list {name}")
    return tuple(value)


def _parsed(value: str, name: str) -> Any:
    """JSON in a text, as a CSV cell has it; another text comes back as it is."""
    if not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise BadRow(f"invalid JSON in {name}") from None


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow(f"non-message {name}")
    written = value.get("role", value.get("from"))
    role = ROLES.get(written) or ROLES.get(written.lower()) if isinstance(written, str) else None
    if role is None:
        raise BadRow("unknown role")
    content = value.get("content", value.get("value"))
    if type(content) is str and len(value) == 2 and written != "function_call":
        if not content.isascii():
            check_characters(content, name)
        return Message(role, content)
    content = _joined_parts(content)
    calls = _calls(value, name) if role == "assistant" else ()
    if written == "function_call" and isinstance(content, str) and not calls:
        calls = _calls_in_text(content)
        content = "" if calls else content
    if content is None and calls:
        content = ""
    if content is None:
        raise BadRow(f"null message in {name}")
    if not isinstance(content, str):
        raise BadRow(f"non-text message in {name}")
    check_characters(content, name)
    extra = {key: value[key] for key in EXTRA if value.get(key) is not None}
    return Message(role, content, calls, role != "assistant" or _learned(value), extra)


def _joined_parts(content: Any) -> Any:
    """The text of content parts, as multi-modal chats write them; what is not text stays."""
    if not isinstance(content, list):
        return content
    parts = [part.get("text", part.get("value")) if isinstance(part, Mapping) else None for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    return "".join(texts) if len(texts) == len(parts) else parts


def _learned(value: Mapping[str, Any]) -> bool:
    """Whether an assistant turn is learned, by one of the fields of ``LEARNED``. Raises BadRow."""
    learned = True
    for key in LEARNED:
        given = value.get(key)
        if given is None:
            continue
        if not isinstance(given, bool | int | float) or given not in (0, 1):
            raise BadRow(f"turn with a {key} other than 0 and 1")
        learned = learned and bool(given)
    return learned


def _calls(value: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    """An assistant's tool calls: ``tool_calls``, or ``function_call``, its older form."""
    given = value.get("tool_calls")
    if given is None and value.get("function_call") is not None:
        given = [{"type": "function", "function": value["function_call"]}]
    if isinstance(given, str) and given:
        given = _parsed(given, name)
    if given is None or given in ("", []):
        return ()
    if not isinstance(given, list) or not all(isinstance(call, Mapping) for call in given):
        raise BadRow(f"tool calls in {name} that are no list of calls")
    return tuple(_with_arguments(call) for call in given)


def _calls_in_text(content: str) -> tuple[Any, ...]:
    """The calls of a ShareGPT turn, ``{"name": …, "arguments": …}`` or a list of such; none where it is other text."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return ()
    calls = found if isinstance(found, list) else [found]
    if not calls or not all(isinstance(call, dict) and {"name", "arguments"} <= call.keys() for call in calls):
        return ()
    return tuple({"type": "function", "function": _with_arguments(call)} for call in calls)


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call whose arguments are an object, where they are one in JSON."""
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_arguments(call["function"])}
    arguments = call.get("arguments")
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments)
        except (ValueError, RecursionError):
            return dict(call)
        if isinstance(arguments, dict):
            return {**call, "arguments": arguments}
    return dict(call)
