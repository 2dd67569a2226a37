"""Where a conversation's answers stand in its text.

An answer begins where the text of the turns before it, with what opens an answer, ends; and ends where the text of the
turns up to it does. A template may write a turn otherwise once others follow (it drops earlier turns' reasoning). Such
an answer is found by writing the conversation once more with a mark in that turn: the texts differ from there on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_lit.data.rows import Message
from rlhf_lit.data.templates import ChatTemplate

# In contents of a layout's conversation: a mark that no template writes, and a space that only trimming takes away.
_MARK, _SPACE = "\ue000{}\ue001", "\u2003"
_ONE_MARK = _MARK.format("")
# Layouts are made per sequence of roles, of which a file may have many.
KEPT_LAYOUTS = 4096


@dataclass(frozen=True)
class Span:
    """An answer in the text of its conversation.

    Attributes:
        message: number of the turn.
        start, end: its characters, with what closes it.
        moved: the turns before it, rendered alone, are not the beginning of the text.
    """

    message: int
    start: int
    end: int
    moved: bool = False


@dataclass(frozen=True)
class Layout:
    """How a template writes turns of certain roles, whatever they say.

    Attributes:
        between: what it writes before the first content, between two, and after the last.
        trimmed: of each turn, whether its content loses white space at both ends.
        answers: of each assistant turn, how many characters of what stands before its content open it, and how many of
            what stands after it close it.
    """

    between: tuple[str, ...]
    trimmed: tuple[bool, ...]
    answers: dict[int, tuple[int, int]]

    def places(self, text: str, messages: Sequence[Message]) -> dict[int, tuple[int, int]] | None:
        """First character and end of each answer in a text; None where it is not written as the layout says."""
        at = 0
        pieces: list[str] = []
        contents = []
        for before, message, trimmed in zip(self.between, messages, self.trimmed, strict=False):
            content = message.content.strip() if trimmed else message.content
            start = at + len(before)
            contents.append((at, start + len(content)))
            at = start + len(content)
            pieces += before, content
        if "".join((*pieces, self.between[-1])) != text:
            return None
        return {i: (contents[i][0] + opens, contents[i][1] + closes) for i, (opens, closes) in self.answers.items()}


class AnswerFinder:
    """Finds answers in the texts that a template writes."""

    def __init__(self, template: ChatTemplate) -> None:
        self._template = template
        self._layouts: dict[tuple[str, ...], Layout | None] = {}

    def places(self, text: str, messages: Sequence[Message], tools: Sequence[Any]) -> dict[int, tuple[int, int]] | None:
        """First character and end of each answer in the text of a whole conversation.

        What stands before an answer is then the text of the turns before it, with what opens an answer.

        Returns:
            None where the text is not as the template writes turns of these roles: ``one_by_one`` may find them.
        """
        if tools or any(message.tool_calls or message.extra for message in messages):
            return None
        layout = self._layout(tuple(message.role for message in messages))
        return layout.places(text, messages) if layout else None

    def one_by_one(
        self, text: str, messages: Sequence[Message], tools: Sequence[Any], wanted: Sequence[int]
    ) -> list[Span | None]:
        """The wanted turns in the text of the whole conversation, None for one that cannot be found."""
        return _One(self._template, text, messages, tools).find(wanted)

    def _layout(self, roles: tuple[str, ...]) -> Layout | None:
        if roles not in self._layouts:
            if len(self._layouts) >= KEPT_LAYOUTS:
                self._layouts.clear()
            self._layouts[roles] = self._make_layout(roles)
        return self._layouts[roles]

    def _make_layout(self, roles: tuple[str, ...]) -> Layout | None:
        marks = [_MARK.format(i) for i in range(len(roles))]
        turns = [Message(role, _SPACE + mark + _SPACE) for role, mark in zip(roles, marks, strict=True)]
        text = self._template.rendered(turns)
        if text is None or any(text.count(mark) != 1 for mark in marks):
            return None
        contents, trimmed = [], []
        for mark in marks:
            start = text.index(mark)
            end = start + len(mark)
            kept = (text[max(0, start - 1) : start] == _SPACE, text[end : end + 1] == _SPACE)
            if kept[0] != kept[1]:
                return None
            trimmed.append(not kept[0])
            contents.append((start - kept[0], end + kept[1]))
        edges = [0, *(edge for content in contents for edge in content), len(text)]
        if edges != sorted(edges):
            return None
        answers = {}
        for i, role in enumerate(roles):
            if role != "assistant":
                continue
            begins = contents[i - 1][1] if i else 0
            before = self._template.rendered(turns[:i], answer_next=True)
            if before is None and not i:
                before = ""
            through = self._template.rendered(turns[: i + 1])
            known = before is not None and text.startswith(before) and begins <= len(before) <= contents[i][0]
            if not known or through is None or not through.startswith(text[: contents[i][1]]):
                return None
            assert before is not None
            answers[i] = (len(before) - begins, _shared(through, text) - contents[i][1])
            if i + 1 < len(roles) and contents[i + 1][0] < contents[i][1] + answers[i][1]:
                return None
        between = tuple(text[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True))
        return Layout(between, tuple(trimmed), answers)


class _One:
    """A single conversation, rendered turn by turn."""

    def __init__(self, template: ChatTemplate, text: str, messages: Sequence[Message], tools: Sequence[Any]) -> None:
        self._template, self._text, self._messages, self._tools = template, text, messages, tools

    def find(self, wanted: Sequence[int]) -> list[Span | None]:
        spans: list[Span | None] = []
        last = 0
        for i in wanted:
            span = self._span(i)
            if span is not None and not last <= span.start <= span.end:
                span = None
            last = span.end if span else last
            spans.append(span)
        return spans

    def _span(self, i: int) -> Span | None:
        before = self._template.rendered(self._messages[:i], self._tools, answer_next=True)
        if before is None and not i:
            before = ""
        stable = before is not None and self._text.startswith(before)
        start = len(before) if before is not None and stable else self._start_by_mark(i, before)
        if start is None:
            return None
        through = self._template.rendered(self._messages[: i + 1], self._tools)
        last = i + 1 == len(self._messages)
        if last:
            end: int | None = len(self._text)
        elif through is not None and self._text.startswith(through) and len(through) > start:
            end = len(through)
        else:
            end = self._end_by_mark(i, through)
        if end is None or end < start:
            return None
        return Span(i, start, end, not stable)

    def _start_by_mark(self, i: int, before: str | None) -> int | None:
        """Where an answer begins that does not follow the turns before it as they are rendered alone."""
        marked = self._rendered_with(i, replace(self._messages[i], content=_ONE_MARK))
        if marked is None or _ONE_MARK not in marked:
            return None
        content = _shared(self._text, marked)
        base = self._template.rendered(self._messages[:i], self._tools)
        if before is not None and base is not None and before.startswith(base) and self._text.startswith(base):
            return max(len(base), min(_shared(before, self._text), content))
        opening = before[len(base) :] if before is not None and base is not None and before.startswith(base) else ""
        ended = self._content_end(i - 1) if i else 0
        if opening and ended is not None:
            found = self._text.rfind(opening, ended, content)
            if found >= 0:
                return found + len(opening)
        # The template opens this answer otherwise than one that is yet to be given: from its content on.
        found = marked.find(_ONE_MARK)
        return content if found == content else None

    def _end_by_mark(self, i: int, through: str | None) -> int | None:
        """Where an answer ends that is written otherwise once turns follow."""
        content = self._content_end(i)
        if content is None:
            return None
        closing = ""
        if through is not None:
            message = self._messages[i]
            marked = self._template.rendered(
                [*self._messages[:i], replace(message, content=message.content + _ONE_MARK)], self._tools
            )
            closing = through[_shared(through, marked) :] if marked is not None else ""
        return content + _shared(closing, self._text[content : content + len(closing)])

    def _content_end(self, i: int) -> int | None:
        """Where the content of a turn ends in the text."""
        message = self._messages[i]
        marked = self._rendered_with(i, replace(message, content=message.content + _ONE_MARK))
        if marked is None:
            return None
        end = _shared(self._text, marked)
        found = marked.find(_ONE_MARK, end)
        return end if found >= 0 and not marked[end:found].strip() else None

    def _rendered_with(self, i: int, message: Message) -> str | None:
        return self._template.rendered([*self._messages[:i], message, *self._messages[i + 1 :]], self._tools)


def _shared(a: str, b: str) -> int:
    """How many characters two texts begin with in common."""
    shortest = min(len(a), len(b))
    if a[:shortest] == b[:shortest]:
        return shortest
    return next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
