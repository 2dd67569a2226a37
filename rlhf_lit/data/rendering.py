"""Conversations as text: what is rendered, and which characters of it are to be learned."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lit.data.rows import Message
from rlhf_lit.data.spans import AnswerFinder, Span
from rlhf_lit.data.templates import ChatTemplate, names_called
from rlhf_lit.errors import UserError


@dataclass(frozen=True)
class Conversation:
    """What is to be tokenised.

    Attributes:
        messages: the turns, or one turn of raw text (role ``text``).
        answer: number of the message with which the final answer begins; what stands before is the prompt.
        first: assistant turns from this message on are supervised, where the turn itself allows it.
        tools: the tools that its template is told of, as the file has them.
    """

    messages: Sequence[Message]
    answer: int
    first: int = 0
    tools: Sequence[Any] = ()


@dataclass(frozen=True)
class Rendered:
    """A rendered conversation: its text, and what is to be learned of it.

    Attributes:
        text: of the whole.
        prompt: of its prompt with what opens an answer; None where it has none (raw text).
        shown: the prompt as a reader sees it.
        spans: supervised answers.
        in_blocks: the spans are the template's ``{% generation %}`` blocks, without what closes them.
        last: number of the last turn where that is an assistant's, so that the sequence ends with its EOS; else None.
        unsupervised: answers that were not found.
        left_out: fields of turns that hold text and that the template does not write.
    """

    text: str
    prompt: str | None
    shown: str
    spans: Sequence[Span] = ()
    in_blocks: bool = False
    last: int | None = None
    unsupervised: int = 0
    left_out: frozenset[str] = frozenset()


class Renderer:
    """Renders conversations with a tokenizer's template.

    Args:
        template: renders turns.
        bos, eos: the text of these tokens, "" of a BOS that there is not.
        offsets: the tokenizer tells where each token stands in a text, so that ``{% generation %}`` blocks can be used.
    """

    def __init__(self, template: ChatTemplate, bos: str, eos: str, offsets: bool) -> None:
        self.template = template
        self._bos, self._eos = bos, eos
        self._finder = AnswerFinder(template)
        self._marks_answers = template.marks_answers and offsets

    def wholes(self, conversations: Sequence[Conversation]) -> list[Rendered | str]:
        """Whole conversations, or in a few words why the template does not render one."""
        return [_or_reason(self._whole, one) for one in conversations]

    def prompts(self, conversations: Sequence[Conversation]) -> list[Rendered | str]:
        """Prompts alone, or why the template does not render one."""
        return [_or_reason(self._prompt, one) for one in conversations]

    def _whole(self, conversation: Conversation) -> Rendered | str:
        messages, tools = conversation.messages, conversation.tools
        if len(messages) == 1 and messages[0].role == "text":
            text = self._raw(messages[0]) + self._eos
            spans = [Span(0, 0, len(text))] if messages[0].supervised else []
            return Rendered(text, None, "", spans, last=0)
        reason = self.template.unknown(messages, tools)
        if reason is not None:
            return reason
        turns, answer, first = self.template.with_system_folded(messages, conversation.answer, conversation.first)
        answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
        wanted = [i for i in answers if i >= first and turns[i].supervised]
        blocks = None
        if self._marks_answers:
            text, blocks = self.template.render_marked(turns, tools)
        else:
            text = self.template.render(turns, tools)
        if any(not _is_told(text, turn) for turn in turns if turn.tool_calls):
            return "the chat template leaves out a part of a turn with tool calls"
        places = self._finder.places(text, turns, tools)
        if places is not None and answer in places:
            prompt = text[: places[answer][0]]
        else:
            prompt = self.template.render(turns[:answer], tools, answer_next=True)
        shown = messages[0].content if conversation.answer == 1 else self.without_bos(prompt)
        spans, in_blocks = self._place(text, blocks, places, turns, tools, answers, wanted)
        lost = len(set(wanted) - {span.message for span in spans})
        last = len(turns) - 1 if turns and turns[-1].role == "assistant" else None
        return Rendered(text, prompt, shown, spans, in_blocks, last, lost, self.template.left_out(messages))

    def _place(
        self,
        text: str,
        blocks: list[tuple[int, int]] | None,
        places: dict[int, tuple[int, int]] | None,
        turns: Sequence[Message],
        tools: Sequence[Any],
        answers: Sequence[int],
        wanted: Sequence[int],
    ) -> tuple[list[Span], bool]:
        """The spans of the ``wanted`` turns, as far as they are found, and whether they are the template's blocks."""
        if blocks is not None and len(blocks) == len(answers):
            of_answer = dict(zip(answers, blocks, strict=True))
            return [Span(i, *of_answer[i]) for i in wanted], True
        if places is not None:
            found = [Span(i, *places[i]) for i in wanted]
        else:
            found = [span for span in self._finder.one_by_one(text, turns, tools, wanted) if span is not None]
        if blocks is None:
            return found, False
        # A template that marks some answers alone, or one of them in several parts.
        return [
            Span(span.message, start, end, span.moved)
            for span in found
            for start, end in blocks
            if span.start <= start and end <= span.end
        ], True

    def _prompt(self, conversation: Conversation) -> Rendered | str:
        messages, tools = conversation.messages[: conversation.answer], conversation.tools
        if len(messages) == 1 and messages[0].role == "text":
            return Rendered(self._raw(messages[0]), None, messages[0].content)
        reason = self.template.unknown(messages, tools)
        if reason is not None:
            return reason
        turns, answer, _ = self.template.with_system_folded(messages, len(messages), 0)
        text = self.template.render(turns[:answer], tools, answer_next=True)
        return Rendered(text, text, messages[0].content if len(messages) == 1 else self.without_bos(text))

    def _raw(self, message: Message) -> str:
        """Raw text behind a BOS, as the template ``none`` writes it, unless BOS is what opens a turn."""
        marker = self.template.writes_bos_between_turns
        return message.content if marker else self._bos + message.content

    def without_bos(self, text: str) -> str:
        """A text without the BOS it begins with, as a reader sees it."""
        return text.removeprefix(self._bos) if self._bos else text


def _or_reason(make: Callable[[Conversation], Rendered | str], conversation: Conversation) -> Rendered | str:
    try:
        draft = make(conversation)
    except UserError as error:
        return str(error)
    if not isinstance(draft, str) and not _is_unicode(draft.text):
        return "half a surrogate pair, which is no text"
    return draft


def _is_told(text: str, turn: Message) -> bool:
    """Whether a turn with tool calls stands in a text with the names of what it calls and with what it says."""
    said = turn.content.split("</think>")[-1].strip()
    return said in text and all(name in text for name in names_called(turn))


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
