"""Chat templates: the built-in ones, how any of them is rendered, and what a template can render.

What a template knows is found by rendering: a system turn, a tool call, a tool's result or a list of tools with a
marker in it, which stands in the text or does not.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import (
    _compile_jinja_template,
    _render_with_assistant_indices,
    render_jinja_template,
)

from rlhf_lit.data.rows import Message
from rlhf_lit.errors import UserError, say

# The space before an answer belongs to the answer: " word" is one piece for most tokenizers, so the prompt's own tokens
# stay a prefix of the whole.
PLAIN = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:' }}{{ ' ' + message['content'] + (eos_token or '') }}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
RAW = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ message['content'] + (eos_token or '') }}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a template raises on a conversation that it was not made for: its own refusals, and expressions that fail.
_REFUSALS = (TemplateError, TypeError, ValueError, AttributeError, LookupError, ArithmeticError)

# Markers of the probes: words that no template writes by itself.
_SAID, _CALLED, _KEY, _VALUE, _RESULT = "Quxsaid", "quxcalled", "quxkey", "quxvalue", "Quxresult"
# Fields of an assistant's turn that hold what it thought.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")


@cache
def _compiled(source: str) -> Any:
    """The template as transformers compiles it."""
    template = _compile_jinja_template(source)
    template.globals = dict(template.globals)  # each rendering goes through them, which takes long of a chain of maps
    return template


@dataclass(frozen=True)
class ToolUse:
    """Which parts of tool use a template renders.

    Attributes:
        calls: an assistant's calls.
        results: turns of role ``tool``.
        tools: the list of tools.
        text_arguments: it wants a call's arguments as JSON text; an object would be written as Python has it.
    """

    calls: bool
    results: bool
    tools: bool
    text_arguments: bool


class ChatTemplate:
    """A Jinja chat template with the special tokens it may write.

    Args:
        source: the template's text.
        special: the tokenizer's ``special_tokens_map``.
    """

    def __init__(self, source: str, special: Mapping[str, Any]) -> None:
        self.source = source
        self.special = dict(special)
        self.marks_answers = bool(_GENERATION_BLOCK.search(source))
        self._told_of_folding = False
        self._written: dict[str, bool] = {}

    def render(self, messages: Sequence[Message], tools: Sequence[Any] = (), answer_next: bool = False) -> str:
        """The conversation as text; with ``answer_next`` also what opens an answer.

        Raises:
            UserError: the template refuses the conversation.
        """
        try:
            if _is_plain(messages, tools):
                template = _compiled(self.source)
                return str(
                    template.render(
                        messages=[self._as_turn(message) for message in messages],
                        tools=None,
                        documents=None,
                        add_generation_prompt=answer_next,
                        **self.special,
                    )
                )
            texts, _ = render_jinja_template(
                [[self._as_template_data(message) for message in messages]],
                tools=list(tools) or None,
                chat_template=self.source,
                add_generation_prompt=answer_next,
                **self.special,
            )
            return str(texts[0])
        except _REFUSALS as error:
            raise _refusal(messages, error) from error

    def render_marked(
        self, messages: Sequence[Message], tools: Sequence[Any] = ()
    ) -> tuple[str, list[tuple[int, int]]]:
        """The conversation as text, and the [start, end) characters of each ``{% generation %}`` block.

        Raises:
            UserError: the template refuses the conversation.
        """
        try:
            if _is_plain(messages, tools):
                return _render_with_assistant_indices(
                    _compiled(self.source),
                    [self._as_turn(message) for message in messages],
                    tools=None,
                    documents=None,
                    add_generation_prompt=False,
                    **self.special,
                )
            texts, blocks = render_jinja_template(
                [[self._as_template_data(message) for message in messages]],
                tools=list(tools) or None,
                chat_template=self.source,
                return_assistant_tokens_mask=True,
                **self.special,
            )
        except _REFUSALS as error:
            raise _refusal(messages, error) from error
        return texts[0], list(blocks[0])

    def rendered(self, messages: Sequence[Message], tools: Sequence[Any] = (), answer_next: bool = False) -> str | None:
        """``render``, None where the template refuses."""
        try:
            return self.render(messages, tools, answer_next)
        except UserError:
            return None

    # What the template knows

    def with_system_folded(
        self, messages: Sequence[Message], answer: int, first: int
    ) -> tuple[list[Message], int, int]:
        """The turns as the template takes them: where it knows no system role, the text of leading system turns stands
        before that of the first user turn.

        Args:
            messages: the turns.
            answer, first: numbers of turns, as in ``Conversation``.

        Returns:
            The turns, and the two numbers among them.
        """
        count = next((i for i, message in enumerate(messages) if message.role != "system"), len(messages))
        if not count or self._takes_system:
            return list(messages), answer, first
        rest = list(messages[count:])
        user = next((i for i, message in enumerate(rest) if message.role == "user"), None)
        if user is None:
            return list(messages), answer, first
        if not self._told_of_folding:
            self._told_of_folding = True
            say("note: the chat template takes no system turn; its text is put before that of the first user turn")
        text = "\n\n".join(message.content for message in (*messages[:count], rest[user]))
        rest[user] = replace(rest[user], content=text)
        return rest, max(0, answer - count), max(0, first - count)

    def unknown(self, messages: Sequence[Message], tools: Sequence[Any]) -> str | None:
        """Why a conversation cannot be rendered whole, None where it can."""
        if self._in_parts is None:
            return "the chat template renders no texts"
        calls = any(message.tool_calls for message in messages)
        results = any(message.role == "tool" for message in messages)
        if calls and not self._tool_use.calls:
            return "the chat template does not render tool calls"
        if results and not self._tool_use.results:
            return "the chat template does not render tool results"
        if tools and not self._tool_use.tools:
            return "the chat template does not render the list of tools"
        return None

    def left_out(self, messages: Sequence[Message]) -> frozenset[str]:
        """Which thoughts of the turns the template never writes, by the name of their field."""
        found = {name for message in messages if message.extra for name in THOUGHTS if name in message.extra}
        return frozenset(name for name in found if not self._writes(name))

    def _writes(self, name: str) -> bool:
        if name not in self._written:
            turns = (Message("user", "Hi"), Message("assistant", "A", extra={name: _SAID}))
            self._written[name] = _SAID in (self.rendered(turns) or "")
        return self._written[name]

    @cached_property
    def writes_bos_between_turns(self) -> bool:
        """Whether the BOS token opens every turn rather than the text."""
        bos = self.special.get("bos_token")
        turns = (Message("user", "Hi"), Message("assistant", "Hello"))
        return isinstance(bos, str) and (self.rendered(turns) or "").count(bos) > 1

    @cached_property
    def _in_parts(self) -> bool | None:
        """Whether the template reads a turn's text from a list of parts, as those of multi-modal models do; None where
        it renders neither that nor a plain text."""
        for in_parts in (False, True):
            turn = {"role": "user", "content": [{"type": "text", "text": _SAID}] if in_parts else _SAID}
            if _SAID in self._probe([turn]):
                return in_parts
        # A template that refuses a user's turn alone has said why when it is asked for a conversation.
        return False if not self._probe([{"role": "user", "content": _SAID}]) else None

    @cached_property
    def _takes_system(self) -> bool:
        return _SAID in (self.rendered((Message("system", _SAID), Message("user", "Hi"))) or "")

    @cached_property
    def _tool_use(self) -> ToolUse:
        tool = {
            "name": _CALLED,
            "description": _SAID,
            "parameters": {"type": "object", "properties": {_KEY: {"type": "string", "description": _KEY}}},
        }
        tools = [{"type": "function", "function": tool}]
        knows_tools = _CALLED in (self.rendered((Message("user", "Hi"),), tools) or "")
        ends = Message("tool", _RESULT, extra={"name": _CALLED, "tool_call_id": "quxcall01"}), Message("assistant", "A")
        for arguments in ({_KEY: _VALUE}, json.dumps({_KEY: _VALUE})):
            call = {"id": "quxcall01", "type": "function", "function": {"name": _CALLED, "arguments": arguments}}
            turns = (Message("user", "Hi"), Message("assistant", "", (call,)), *ends)
            # As a caller has it: normalising would turn the text into an object again.
            data = [self._as_turn(message, list(message.tool_calls)) for message in turns]
            whole = self._probe(data)
            text = whole or self._probe(data[:2])
            if _CALLED in text and _VALUE in text and f"'{_KEY}'" not in text:
                return ToolUse(True, _RESULT in whole, knows_tools, isinstance(arguments, str))
        plain = self.rendered((Message("user", "Hi"), Message("assistant", "A"), *ends)) or ""
        return ToolUse(False, _RESULT in plain, knows_tools, False)

    def _probe(self, turns: list[dict[str, Any]]) -> str:
        """The text of turns in the template's own form, "" where it refuses them."""
        try:
            texts, _ = render_jinja_template([turns], chat_template=self.source, **self.special)
        except _REFUSALS:
            return ""
        return str(texts[0])

    def _as_template_data(self, message: Message) -> dict[str, Any]:
        calls = [_normalised(call, self._tool_use.text_arguments) for call in message.tool_calls]
        return self._as_turn(message, calls)

    def _as_turn(self, message: Message, calls: Sequence[Any] = ()) -> dict[str, Any]:
        content: Any = message.content
        if self._in_parts:
            content = [{"type": "text", "text": content}]
        data = {**message.extra, "role": message.role, "content": content}
        return {**data, "tool_calls": calls} if calls else data


def names_called(message: Message) -> list[str]:
    """The functions that a turn calls, as far as its calls name them."""
    bodies = [call.get("function", call) if isinstance(call, Mapping) else {} for call in message.tool_calls]
    return [str(body["name"]) for body in bodies if isinstance(body, Mapping) and body.get("name")]


def _normalised(call: Any, text_arguments: bool) -> Any:
    """A call as templates read it: ``{type, function: {name, arguments}}`` with the arguments as an object, or as JSON
    text where the template writes them down as they are. OpenAI's files have text, with or without the frame."""
    if not isinstance(call, Mapping):
        return call
    framed = isinstance(call.get("function"), Mapping)
    body = dict(call["function"] if framed else call)
    arguments = body.get("arguments", body.pop("parameters", None) if "arguments" not in body else None)
    if isinstance(arguments, str) and not text_arguments:
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = arguments
        arguments = parsed if isinstance(parsed, dict) else arguments
    elif text_arguments and arguments is not None and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if framed:
        return {"type": "function", **call, "function": {**body, "arguments": arguments}}
    known = {key: body.pop(key) for key in ("id", "type") if key in body}
    return {"type": "function", **known, "function": {**body, "arguments": arguments}}


def _is_plain(messages: Sequence[Message], tools: Sequence[Any]) -> bool:
    """Whether roles and contents are all there is, so that nothing needs to be copied for the template's sandbox."""
    return not tools and not any(message.tool_calls or message.extra for message in messages)


def _refusal(messages: Sequence[Message], error: Exception) -> UserError:
    roles = ", ".join(message.role for message in messages)
    return UserError(f"the chat template refuses a conversation with roles {roles}: {error}")
