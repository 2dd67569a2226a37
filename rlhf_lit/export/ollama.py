"""An Ollama Modelfile beside whole weights: the chat template in Go's syntax, where that can say it, and the stops.

Ollama does not run the tokenizer's own template. What its Go templates can say of a Jinja template is found by
rendering conversations: the text before each turn's content, by its role and by that of the turn before it, and the
text that opens an answer. A template that does anything else (it writes the date, or a turn otherwise once others
follow) is not written down approximately: there is no Modelfile then, and the card says why.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lit.data.rows import Message
from rlhf_lit.data.templates import ChatTemplate
from rlhf_lit.errors import UserError
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_tokenizer

MODELFILE, GGUF = "Modelfile", "model.gguf"
# Contents that stand in no template, and the orders of turns that end in a question.
_WORDS = ("Quxone", "Quxtwo", "Quxthree", "Quxfour", "Quxfive", "Quxsix", "Quxseven")
_ORDERS = ("u", "su", "uau", "suau", "uauau", "suauau")
_ROLES = {"s": "system", "u": "user", "a": "assistant"}


class InexpressibleTemplate(Exception):
    """A chat template that Go's syntax cannot say with what Ollama gives it; the message says why."""


@dataclass(frozen=True)
class Turns:
    """A chat template as the texts around the contents of its turns.

    Attributes:
        system: before the content of a system turn, which opens the conversation.
        first: before that of a user turn that opens it.
        after_system, after_answer: before that of a user turn after one of those.
        assistant: before that of an assistant turn.
        answer: after the last question, where an answer begins.
    """

    system: str
    first: str
    after_system: str
    after_answer: str
    assistant: str
    answer: str

    @property
    def writes_its_space(self) -> bool:
        """Whether the space between ``Assistant:`` and an answer is the model's to write, so that an answer of Ollama's
        that comes back as a turn brings its own."""
        return self.assistant == self.answer + " "

    def prompt(self, messages: list[Message]) -> str:
        """The text of a conversation, as the Go template renders it; an answer at its end is gone on with."""
        parts, before = [], ""
        for message in messages:
            users = {"": self.first, "system": self.after_system}.get(before, self.after_answer)
            opened = {"system": self.system, "assistant": self.assistant}.get(message.role, users)
            if message.role == "assistant" and self.writes_its_space and message.content.startswith(" "):
                opened = self.answer
            parts += [opened, message.content]
            before = message.role
        return "".join(parts) + (self.answer if before != "assistant" else "")

    def go(self) -> str:
        """The same as a template for Go's ``text/template``, over the ``.Messages`` that Ollama gives."""
        assistant = _literal(self.assistant)
        if self.writes_its_space:
            has_space = '{{- if not (and .Content (eq (slice .Content 0 1) " ")) }}{{ " " }}{{ end }}'
            assistant = f"{_literal(self.answer)}{has_space}"
        lines = [
            '{{- $before := "" }}',
            "{{- range .Messages }}",
            f'{{{{- if eq .Role "system" }}}}{_literal(self.system)}',
            f'{{{{- else if eq .Role "assistant" }}}}{assistant}',
            f'{{{{- else if eq $before "" }}}}{_literal(self.first)}',
            f'{{{{- else if eq $before "system" }}}}{_literal(self.after_system)}',
            f"{{{{- else }}}}{_literal(self.after_answer)}",
            "{{- end }}{{ .Content }}",
            "{{- $before = .Role }}",
            "{{- end }}",
            f'{{{{- if ne $before "assistant" }}}}{_literal(self.answer)}{{{{- end }}}}',
        ]
        return "\n".join(lines)


def turns_of(tokenizer: Any) -> Turns:
    """A tokenizer's chat template as texts around contents, checked on conversations of up to six turns.

    A system turn that the template refuses stands before the first question, as in training.

    Args:
        tokenizer: with its chat template.

    Raises:
        InexpressibleTemplate: the template does more than that, or begins otherwise than what Ollama gives the model.
    """
    if not tokenizer.chat_template:
        raise InexpressibleTemplate("the tokenizer has no chat template")
    template = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
    if "strftime_now" in template.source:
        raise InexpressibleTemplate("the chat template writes the date")
    bos = _bos_that_is_added(tokenizer)
    texts = {order: _rendered(template, order, bos) for order in _ORDERS}
    first, after = _around(texts["u"], 1)
    system, after_system, _ = _around(texts["su"], 2)
    _, assistant, after_answer, _ = _around(texts["uau"], 3)
    found = Turns(system, first, after_system, after_answer, assistant, after)
    for order, text in texts.items():
        if found.prompt(_conversation(order)) != text:
            names = ", ".join(_ROLES[role] for role in order)
            raise InexpressibleTemplate(
                f"the chat template writes a conversation of {names} otherwise than turn by turn"
            )
    return found


def modelfile(tokenizer: Any, stops: list[str]) -> str:
    """The text of a Modelfile for ``model.gguf`` beside it.

    Args:
        tokenizer: with its chat template.
        stops: tokens that end an answer.

    Raises:
        InexpressibleTemplate: see :func:`turns_of`.
    """
    turns = turns_of(tokenizer)
    template = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map)
    remarks = [
        f"# {GGUF} is made of this folder by llama.cpp's convert_hf_to_gguf.py; then: ollama create NAME -f {MODELFILE}"
    ]
    if " Quxone " not in template.render([Message("user", " Quxone ")]):
        remarks.append("# The model's own template strips white space around a turn's text; Go's cannot.")
    if template.unknown([Message("user", "Quxone")], [{}]) is None:
        remarks.append("# Tools, which the model's own template renders, are left out.")
    lines = [*remarks, f"FROM ./{GGUF}", f'TEMPLATE """{turns.go()}"""']
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    # Ollama's own default, 1.1, draws from another distribution than the model's.
    lines.append("PARAMETER repeat_penalty 1")
    return "\n".join(lines) + "\n"


def write_modelfile(folder: Path, trust_remote_code: bool) -> str:
    """Write the Modelfile of a policy's whole weights, if there can be one. → in words, for the card.

    Args:
        folder: the export, with its tokenizer and its generation config.
        trust_remote_code: run tokenizer code that comes with it.
    """
    from transformers import GenerationConfig

    tokenizer = load_tokenizer(Base(str(folder), trust_remote_code=trust_remote_code))
    found = GenerationConfig.from_pretrained(folder).eos_token_id
    stops = tokenizer.convert_ids_to_tokens(found if isinstance(found, list) else [found])
    try:
        text = modelfile(tokenizer, stops)
    except InexpressibleTemplate as reason:
        return f"no Ollama Modelfile: {reason}"
    (folder / MODELFILE).write_text(text, encoding="utf-8")
    return f"`{MODELFILE}` is Ollama's, for a `{GGUF}` made of this folder by llama.cpp's `convert_hf_to_gguf.py`"


def _conversation(order: str) -> list[Message]:
    return [Message(_ROLES[role], word) for role, word in zip(order, _WORDS, strict=False)]


def _rendered(template: ChatTemplate, order: str, bos: str) -> str:
    """The prompt of a conversation, without the BOS that is put before it."""
    messages = _conversation(order)
    if order[0] == "s" and _WORDS[0] not in (template.rendered(messages, answer_next=True) or ""):
        # The template knows no system turn: in training its text stands before that of the first question.
        messages = [Message("user", f"{_WORDS[0]}\n\n{_WORDS[1]}"), *messages[2:]]
    try:
        text = template.render(messages, answer_next=True)
    except UserError as error:
        raise InexpressibleTemplate(str(error)) from None
    if not text.startswith(bos):
        # Engines would put one before the model's prompts all the same, and it was trained without.
        raise InexpressibleTemplate(f"the tokenizer begins texts with {bos}, and the chat template writes none")
    return text.removeprefix(bos)


def _bos_that_is_added(tokenizer: Any) -> str:
    """The BOS that the tokenizer puts before a text by itself, as engines that read a GGUF then do; "" for none."""
    ids = tokenizer("a")["input_ids"]
    return str(tokenizer.bos_token) if ids and ids[0] == tokenizer.bos_token_id else ""


def _around(text: str, count: int) -> list[str]:
    """The texts around the contents of the first turns."""
    parts, rest = [], text
    for word in _WORDS[:count]:
        before, found, rest = rest.partition(word)
        if not found:
            raise InexpressibleTemplate("the chat template leaves turns out")
        parts.append(before)
    return [*parts, rest]


def _literal(text: str) -> str:
    """An action that writes a text as it stands; JSON's escapes are Go's too."""
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _quoted(word: str) -> str:
    """A Modelfile knows no escapes, but two kinds of quotes."""
    return f'"""{word}"""' if '"' in word else f'"{word}"'
