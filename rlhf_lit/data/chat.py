"""The one room where text is rendered, tokenised once, and masked.

Every format, the raw one included, is a Jinja chat template, so that training, rollouts and an exported tokenizer
cannot disagree about it.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from rlhf_lit.data.beginnings import BatchTokenizer, Beginning
from rlhf_lit.data.rendering import Conversation, Rendered, Renderer
from rlhf_lit.data.rows import Message
from rlhf_lit.data.templates import PLAIN, RAW, ChatTemplate
from rlhf_lit.errors import UserError

__all__ = ["ChatFormat", "Conversation", "Encoded", "Template"]

Template = Literal["auto", "tokenizer", "plain", "none"]

# The white space that templates write after an answer is a token or two.
BLANK_TOKENS = 8
KEPT_BLANKS = 1000


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
        prompt: tokens of what stands before the final answer, with what opens an answer; none before raw text.
        text: that prompt as a reward function and a reader see it: a single turn bare, a dialogue rendered.
        unsupervised: assistant turns that should have been supervised and are not: they are not found in the text of
            the conversation, or have no token there.
        left_out: fields of turns that hold text and that the chat template does not write.
    """

    tokens: list[int]
    mask: list[bool]
    boundary_moved: bool
    prompt: list[int] = field(default_factory=list)
    text: str = ""
    unsupervised: int = 0
    left_out: frozenset[str] = frozenset()


def _shared_prompts(drafts: Sequence[Rendered]) -> list[int]:
    """Of each text, the characters of its prompt where the text before it has the same one; else 0."""
    shared: list[int] = []
    before: str | None = None
    for draft in drafts:
        prompt = draft.prompt if draft.prompt and draft.text.startswith(draft.prompt) else None
        shared.append(len(prompt) if prompt is not None and prompt == before else 0)
        before = prompt
    return shared


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
        self._bos, self._eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._template = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
        self._renderer = Renderer(
            self._template, tokenizer.bos_token or "", tokenizer.eos_token, offsets=tokenizer.is_fast
        )
        self._blank: dict[tuple[int, ...], bool] = {}

    @cached_property
    def _batch(self) -> BatchTokenizer:
        return BatchTokenizer(self.tokenizer)

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | str]:
        """Each conversation's tokens with its prompt, or in a few words why the template does not render it."""
        drafts = self._renderer.wholes(conversations)
        good = [draft for draft in drafts if not isinstance(draft, str)]
        texts = [draft.text for draft in good]
        ids = self._batch.ids_of_groups(texts, _shared_prompts(good))
        ends: list[set[int]] = []
        apart = []
        for draft in good:
            wanted = {span.start for span in draft.spans}
            if not draft.in_blocks:
                wanted |= {span.end for span in draft.spans if span.message != draft.last}
            if draft.prompt is not None and draft.text.startswith(draft.prompt):
                wanted.add(len(draft.prompt))
            elif draft.prompt is not None:
                apart.append(draft.prompt)
            ends.append(wanted)
        beginnings = self._batch.beginnings(texts, ids, ends)
        alone = self._batch.of_each(apart)
        done = iter(
            self._masked(draft, tokens, found, alone)
            for draft, tokens, found in zip(good, ids, beginnings, strict=True)
        )
        return [draft if isinstance(draft, str) else next(done) for draft in drafts]

    def prompts(self, conversations: Sequence[Conversation]) -> list[Encoded | str]:
        """The prompts alone: each result's tokens are its prompt's, none of them supervised."""
        drafts = self._renderer.prompts(conversations)
        tokens = self._batch.of_each(draft.text for draft in drafts if not isinstance(draft, str))
        results: list[Encoded | str] = []
        for draft in drafts:
            if isinstance(draft, str):
                results.append(draft)
                continue
            found = self._without_surplus(tokens[draft.text])
            results.append(Encoded(found, [False] * len(found), False, found, draft.shown))
        return results

    def demonstration(self, messages: Sequence[Message]) -> Encoded:
        """The conversation, supervised on every assistant turn.

        Raises:
            UserError: the tokenizer's template refuses the conversation.
        """
        return self._required(self.encode([Conversation(messages, max(0, len(messages) - 1))]))[0]

    def pair(
        self, prompt: Sequence[Message], chosen: Sequence[Message], rejected: Sequence[Message]
    ) -> tuple[Encoded, Encoded]:
        """``answers`` of two."""
        first, second = self.answers(prompt, [chosen, rejected])
        return first, second

    def answers(
        self, prompt: Sequence[Message], answers: Sequence[Sequence[Message]], tools: Sequence[Any] = ()
    ) -> list[Encoded]:
        """The conversations of :func:`answers_to`, encoded.

        Raises:
            UserError: the tokenizer's template refuses a conversation.
        """
        return self._required(self.encode(answers_to(prompt, answers, tools)))

    def prompt(self, messages: Sequence[Message], tools: Sequence[Any] = ()) -> list[int]:
        """Tokens of the prompt with what opens an answer.

        Raises:
            UserError: the tokenizer's template refuses the conversation.
        """
        return self._required(self.prompts([Conversation(messages, len(messages), tools=tools)]))[0].tokens

    def render_prompt(self, messages: Sequence[Message]) -> str:
        """The text of :meth:`prompt`, a leading BOS left out.

        Raises:
            UserError: the tokenizer's template refuses the conversation.
        """
        turns, answer, _ = self._template.with_system_folded(messages, len(messages), 0)
        return self._renderer.without_bos(self._template.render(turns[:answer], answer_next=True))

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides the tokens: the tokenizer's content, the template, BOS and EOS."""
        tokenizer = self.tokenizer
        if tokenizer.is_fast:
            content: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
            content["truncation"] = content["padding"] = None  # changed by calls, and never used here
        else:
            content = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
        parts = [content, self._template.source, tokenizer.special_tokens_map]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def _required(self, results: Sequence[Encoded | str]) -> list[Encoded]:
        found = []
        for result in results:
            if isinstance(result, str):
                raise UserError(result)
            found.append(result)
        return found

    # Masks

    def _masked(
        self, draft: Rendered, ids: list[int], beginnings: dict[int, Beginning], alone: dict[str, list[int]]
    ) -> Encoded:
        """Tokens and mask of a conversation.

        Args:
            draft: its text.
            ids: the tokens of that.
            beginnings: tokens of the text up to the places that matter.
            alone: tokens of prompts that are not the beginning of their text.
        """
        surplus = self._surplus_bos(ids)
        tokens = ids[surplus:] if surplus else ids
        mask, moved, start = [False] * len(tokens), False, 0
        without = {span.message for span in draft.spans}  # turns of which no token is learned
        for span in draft.spans:
            start, short = self._start(tokens, ids, beginnings[span.start])
            moved |= short or span.moved
            if span is draft.spans[-1] and span.message == draft.last:
                end = len(tokens)
            elif draft.in_blocks:
                end = self._close(tokens, start, self._block_end(draft.text, ids, span.end) - surplus)
            else:
                end = self._close(tokens, start, max(start, beginnings[span.end].agreement(ids) - surplus))
            mask[start:end] = [True] * (end - start)
            if end > start or span.message == draft.last:
                without.discard(span.message)
        if draft.last is not None:
            learned = bool(draft.spans) and draft.spans[-1].message == draft.last
            stop = self._last_eos(tokens, start if learned else 0, len(tokens))
            tokens = tokens[:stop] if stop is not None else [*tokens, self._eos]
            mask = mask[: len(tokens)] + [learned] * (len(tokens) - len(mask))
        if mask:
            mask[0] = False
        prompt: list[int] = []
        if draft.prompt is not None:
            apart = alone.get(draft.prompt)
            prompt = self._without_surplus(beginnings[len(draft.prompt)].tokens(ids) if apart is None else apart)
        lost = draft.unsupervised + len(without)
        return Encoded(tokens, mask, moved, prompt, draft.shown, lost, draft.left_out)

    def _start(self, tokens: list[int], ids: list[int], before: Beginning) -> tuple[int, bool]:
        """How many tokens an answer shares with what stands before it, and whether that is less than all of those."""
        if tokens is ids and not (before.shared == 0 and self._surplus_bos(before.tail)):
            start = before.agreement(ids)
            return start, start < before.shared + len(before.tail)
        alone = self._without_surplus(before.tokens(ids))
        start = Beginning(0, alone).agreement(tokens)
        return start, start < len(alone)

    def _block_end(self, text: str, ids: list[int], end: int) -> int:
        """How many tokens begin before a character."""
        found = self._batch.token_at(text, ids, end)
        return bisect_left(self._batch.starts(text), end) if found is None else found

    def _without_surplus(self, tokens: list[int]) -> list[int]:
        return tokens[self._surplus_bos(tokens) :]

    def _surplus_bos(self, tokens: Sequence[int]) -> int:
        """How many leading tokens to drop so that at most one BOS remains (a text may bring one of its own)."""
        bos = self._bos
        if bos is None or list(tokens[:2]) != [bos, bos]:
            return 0
        return next((i for i, token in enumerate(tokens) if token != bos), len(tokens)) - 1

    def _close(self, tokens: list[int], start: int, end: int) -> int:
        """The end of an answer with its EOS and without the white space that templates write after it."""
        if end < len(tokens) and tokens[end] == self._eos:
            return end + 1
        return self._last_eos(tokens, start, end) or end

    def _last_eos(self, tokens: list[int], start: int, end: int) -> int | None:
        """One past the last EOS of tokens[start:end], None unless only white space follows it."""
        for i in range(end - 1, start - 1, -1):
            if tokens[i] == self._eos:
                if not self._is_blank(tokens[i + 1 : end]):
                    return None
                while (
                    i > start and tokens[i - 1] == tokens[i]
                ):  # the text brought its own EOS, and the template another
                    i -= 1
                return i + 1
        return None

    def _is_blank(self, tokens: list[int]) -> bool:
        """Whether tokens are white space; asked of the same few again and again."""
        key = tuple(tokens)
        if len(key) > BLANK_TOKENS:
            return not self.tokenizer.decode(tokens).strip()
        if key not in self._blank and len(self._blank) > KEPT_BLANKS:
            self._blank.clear()
        if key not in self._blank:
            self._blank[key] = not self.tokenizer.decode(tokens).strip() if key else True
        return self._blank[key]
