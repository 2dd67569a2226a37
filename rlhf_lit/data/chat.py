"""The one room where text is rendered, tokenised once, and masked.

Every format, the raw one included, is a Jinja chat template, so that training, rollouts and an exported tokenizer
cannot disagree about it.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from rlhf_lit.data.rows import Message
from rlhf_lit.errors import UserError

Template = Literal["auto", "tokenizer", "plain", "none"]

# The space before an answer belongs to the answer: " word" is one piece for most tokenizers, so the prompt's own tokens
# stay a prefix of the whole.
PLAIN = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ 'Assistant:' }}{% generation %}{{ ' ' + message['content'] + (eos_token or '') }}{% endgeneration %}"
    "{% else %}{{ message['role'] | capitalize + ': ' + message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)
RAW = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + (eos_token or '') }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}"
    "{% endfor %}"
)
_GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


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


def answers_to(
    prompt: Sequence[Message], answers: Sequence[Sequence[Message]], tools: Sequence[Any] = ()
) -> list[Conversation]:
    """The prompt with each answer, supervised on the answer alone (not on assistant turns of the prompt)."""
    return [Conversation([*prompt, *answer], len(prompt), len(prompt), tools) for answer in answers]


@dataclass(frozen=True)
class Encoded:
    """A conversation as tokens.

    Attributes:
        tokens: token ids.
        mask: True on supervised tokens, each answer's closing EOS included; False on the first token always. All False
            where nothing is left to supervise: the caller counts and drops such a row.
        boundary_moved: the tokens of a prompt alone are not a prefix of the tokens of prompt and answer, so that
            supervision starts at their common prefix, before the answer's first character.
        prompt: tokens of what stands before the final answer, with what opens an answer.
        text: that prompt as a reward function and a reader see it: a single turn bare, a dialogue rendered.
        unsupervised: assistant turns that should have been supervised and are not.
    """

    tokens: list[int]
    mask: list[bool]
    boundary_moved: bool
    prompt: list[int] = field(default_factory=list)
    text: str = ""
    unsupervised: int = 0


class ChatFormat:
    """A tokenizer with the template it is used with.

    Args:
        tokenizer: must have an EOS token, which closes every answer.
        template: ``tokenizer``, its own chat template; ``plain``, "User: …\\n\\nAssistant: …"; ``none``, the contents
            joined as they stand, without role names (story continuation, base models); ``auto``, its own if it has one,
            else plain. A chosen built-in template becomes ``tokenizer.chat_template``, so that the tokenizer saved with
            a model goes on with the format the model was trained in.

    Raises:
        UserError: ``tokenizer`` without a template, or no EOS token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: Template = "auto") -> None:
        name = tokenizer.name_or_path or type(tokenizer).__name__
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"the tokenizer {name} has no EOS token, so a model could not learn to stop: "
                "set eos_token in its tokenizer_config.json"
            )
        if template == "tokenizer" and not tokenizer.chat_template:
            raise UserError(f"the tokenizer {name} has no chat template: set template to auto, plain or none")
        if template == "none":
            tokenizer.chat_template = RAW
        elif template == "plain" or not tokenizer.chat_template:
            tokenizer.chat_template = PLAIN
        self.tokenizer = tokenizer
        self._template: str = tokenizer.get_chat_template()
        self._marks_answers = bool(_GENERATION_BLOCK.search(self._template)) and tokenizer.is_fast

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | str]:
        """Each conversation's tokens with its prompt, or why the template refuses it."""
        return [self._or_reason(self._whole, one) for one in conversations]

    def prompts(self, conversations: Sequence[Conversation]) -> list[Encoded | str]:
        """The prompts alone, whose tokens are all of each result."""
        return [self._or_reason(self._prompt_of, one) for one in conversations]

    def _or_reason(self, make: Callable[[Conversation], Encoded], conversation: Conversation) -> Encoded | str:
        try:
            return make(conversation)
        except UserError as error:
            return str(error)

    def _whole(self, conversation: Conversation) -> Encoded:
        before = self._prompt_of(conversation)
        return replace(self._encode(conversation.messages, conversation.first), prompt=before.prompt, text=before.text)

    def _prompt_of(self, conversation: Conversation) -> Encoded:
        messages = conversation.messages[: conversation.answer]
        text = messages[0].content if len(messages) == 1 else self.render_prompt(messages)
        tokens = self.prompt(messages)
        return Encoded(tokens, [False] * len(tokens), False, tokens, text)

    def demonstration(self, messages: Sequence[Message]) -> Encoded:
        """The conversation, supervised on every assistant turn.

        Raises:
            UserError: the tokenizer's template refuses the conversation.
        """
        return self._encode(messages, first=0)

    def pair(
        self, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]
    ) -> tuple[Encoded, Encoded]:
        """``answers`` of two."""
        first, second = self.answers(prompt, [chosen, rejected])
        return first, second

    def answers(self, prompt: Sequence[Message], answers: Sequence[Sequence[Message]]) -> list[Encoded]:
        """Prompt with each answer, supervised on the answer alone (not on assistant turns of the prompt).

        Raises:
            UserError: the tokenizer's template refuses a conversation.
        """
        return [self._encode([*prompt, *answer], first=len(prompt)) for answer in answers]

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Tokens of the prompt with what opens an answer.

        Raises:
            UserError: the tokenizer's template refuses the conversation.
        """
        return self._tokenise(self._render(messages, answer_next=True))

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """The text of :meth:`prompt`, a leading BOS left out."""
        text = self._render(messages, answer_next=True)
        bos = self.tokenizer.bos_token
        return text.removeprefix(bos) if bos else text

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the tokens: the tokenizer's content, the template, BOS and EOS."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
            content["truncation"] = content["padding"] = None  # changed by calls, and never used here
        else:
            content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
        parts = [content, self._template, tokenizer.special_tokens_map]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _render(self, messages: Sequence[Message], answer_next: bool = False) -> str:
        return self._render_marked(messages, answer_next, mark=False)[0]

    def _render_marked(
        self, messages: Sequence[Message], answer_next: bool, mark: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """The text, and where ``mark`` the [start, end) characters of each ``{% generation %}`` block."""
        conversation = [{"role": message.role, "content": message.content} for message in messages]
        try:
            texts, blocks = render_jinja_template(
                [conversation],
                chat_template=self._template,
                return_assistant_tokens_mask=mark,
                add_generation_prompt=answer_next,
                **self.tokenizer.special_tokens_map,
            )
        except (TemplateError, TypeError) as error:
            roles = ", ".join(message.role for message in messages)
            raise UserError(f"the chat template refuses a conversation with roles {roles}: {error}") from error
        return texts[0], list(blocks[0]) if mark else []

    def _tokenise(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens[self._surplus_bos(tokens) :]

    def _surplus_bos(self, tokens: list[int]) -> int:
        """How many leading tokens to drop so that at most one BOS remains (a text may bring one of its own)."""
        bos = self.tokenizer.bos_token_id
        count = next((i for i, token in enumerate(tokens) if token != bos), len(tokens)) if bos is not None else 0
        return max(0, count - 1)

    def _encode(self, messages: Sequence[Message], first: int) -> Encoded:
        """Tokens, with the assistant turns from message ``first`` on supervised."""
        answers = [i for i, message in enumerate(messages) if message.role == "assistant"]
        skipped = sum(i < first for i in answers)
        if self._marks_answers:
            tokens, spans, moved = self._spans_from_blocks(messages, skipped)
        else:
            tokens, spans, moved = self._spans_from_prefixes(messages, answers[skipped:])
        mask = [False] * len(tokens)
        for start, end in spans[:-1]:
            end = self._close(tokens, start, end)
            mask[start:end] = [True] * (end - start)
        if spans and messages[-1].role == "assistant":
            start = spans[-1][0]
            stop = self._last_eos(tokens, start, len(tokens))
            tokens = tokens[:stop] if stop is not None else [*tokens, self.tokenizer.eos_token_id]
            mask = mask[:start] + [True] * (len(tokens) - start)
        elif spans:
            start, end = spans[-1]
            end = self._close(tokens, start, end)
            mask[start:end] = [True] * (end - start)
        if mask:
            mask[0] = False
        return Encoded(tokens, mask, moved)

    def _spans_from_blocks(
        self, messages: Sequence[Message], skipped: int
    ) -> tuple[list[int], list[tuple[int, int]], bool]:
        """Token spans of the template's ``{% generation %}`` blocks, the first ``skipped`` left out."""
        text, blocks = self._render_marked(messages, answer_next=False, mark=True)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        surplus = self._surplus_bos(encoding["input_ids"])
        tokens: list[int] = encoding["input_ids"][surplus:]
        starts = [start for start, _ in encoding["offset_mapping"]][surplus:]
        spans, moved = [], False
        for block_start, block_end in blocks[skipped:]:
            before = self._tokenise(text[:block_start])
            start = _common_prefix(before, tokens)
            moved |= start < len(before)
            spans.append((start, bisect_left(starts, block_end)))
        return tokens, spans, moved

    def _spans_from_prefixes(
        self, messages: Sequence[Message], answers: list[int]
    ) -> tuple[list[int], list[tuple[int, int]], bool]:
        """Token spans of the given assistant turns: what each adds to the tokens of the conversation before it."""
        tokens = self._tokenise(self._render(messages))
        spans, moved = [], False
        for i in answers:
            before = self._tokenise(self._render(messages[:i], answer_next=True)) if i else []
            start = _common_prefix(before, tokens)
            through = self._tokenise(self._render(messages[: i + 1]))
            end = _common_prefix(through, tokens)
            moved |= start < len(before)
            if end < len(through) and self.tokenizer.eos_token_id in tokens[start:]:
                # The template writes this turn differently once others follow (it drops earlier turns' reasoning).
                end = tokens.index(self.tokenizer.eos_token_id, start) + 1
            spans.append((start, max(start, end)))
        return tokens, spans, moved

    def _close(self, tokens: list[int], start: int, end: int) -> int:
        """The end of an answer with its EOS and without the white space that templates write after it."""
        if end < len(tokens) and tokens[end] == self.tokenizer.eos_token_id:
            return end + 1
        return self._last_eos(tokens, start, end) or end

    def _last_eos(self, tokens: list[int], start: int, end: int) -> int | None:
        """One past the last EOS of tokens[start:end], None unless only white space follows it."""
        for i in range(end - 1, start - 1, -1):
            if tokens[i] == self.tokenizer.eos_token_id:
                tail = tokens[i + 1 : end]
                if tail and self.tokenizer.decode(tail).strip():
                    return None
                while (
                    i > start and tokens[i - 1] == tokens[i]
                ):  # the text brought its own EOS, and the template another
                    i -= 1
                return i + 1
        return None


def _common_prefix(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
