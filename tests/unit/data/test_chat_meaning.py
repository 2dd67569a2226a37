"""What a conversation is beside its texts: tool calls, turns not to be learned, system turns, raw text; batches."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rlhf_lit.data.chat import ChatFormat, Conversation, Encoded, Template
from rlhf_lit.data.rows import Message
from rlhf_lit.data.templates import ChatTemplate
from tests.unit.data.chats import CHATML, CHATML_BLOCKS, DIALOGUE, HEAD, LLAMA3, REASONING, STRICT, small, supervised

# --- tool use ----------------------------------------------------------------------------------------------------

TOOLS = (  # Qwen's way: tools in the system turn, calls as JSON in tags, results as a user's turn
    "{% if tools %}{{'<|im_start|>system\\n# Tools\\n'}}{% for t in tools %}{{t | tojson + '\\n'}}{% endfor %}"
    "{{'<|im_end|>\\n'}}{% endif %}"
    "{% for m in messages %}"
    "{% if m.role == 'tool' %}"
    "{{'<|im_start|>user\\n<tool_response>\\n' + m.content + '\\n</tool_response><|im_end|>\\n'}}"
    "{% else %}" + HEAD + "{% if m.content %}{{m.content}}{% endif %}"
    "{% for c in m.tool_calls or [] %}"
    '{{\'<tool_call>\\n{"name": "\' + c.function.name + \'", "arguments": \'}}'
    "{{ARGUMENTS}}{{'}\\n</tool_call>'}}{% endfor %}{{'<|im_end|>\\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}"
)
OBJECTS = TOOLS.replace("ARGUMENTS", "c.function.arguments | tojson")
TEXTS = TOOLS.replace("ARGUMENTS", "c.function.arguments")
WEATHER = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def call(arguments: object, framed: bool = True) -> dict[str, object]:
    body = {"name": "weather", "arguments": arguments}
    return {"id": "c1", "type": "function", "function": body} if framed else body


def asking(one: object) -> Conversation:
    return Conversation(
        (
            Message("user", "Is it 4?"),
            Message("assistant", "", (one,)),
            Message("tool", "It is 4", extra={"tool_call_id": "c1"}),
            Message("assistant", "It is 4."),
        ),
        answer=3,
        tools=(WEATHER,),
    )


@pytest.mark.parametrize("template", [OBJECTS, TEXTS])
@pytest.mark.parametrize(
    "one", [call({"city": "Oslo"}), call('{"city": "Oslo"}'), call('{"city": "Oslo"}', framed=False)]
)
def test_calls_are_learned_and_results_are_not(template: str, one: object) -> None:
    tokenizer = small(template)
    (encoded,) = ChatFormat(tokenizer).encode([asking(one)])
    assert isinstance(encoded, Encoded)
    assert supervised(tokenizer, encoded) == [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call><|im_end|>',
        "It is 4.<|im_end|>",
    ]
    assert '{"type": "function", "function": {"name": "weather"' in tokenizer.decode(encoded.prompt)
    assert tokenizer.decode(encoded.prompt).endswith("It is 4\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert encoded.tokens[: len(encoded.prompt)] == encoded.prompt
    assert encoded.unsupervised == 0


def test_what_a_template_does_not_know_is_refused_by_name() -> None:
    calls, told = asking(call({})), Conversation((Message("user", "Hi"), Message("assistant", "It")), 1, 0, (WEATHER,))
    results = Conversation((Message("user", "Hi"), Message("tool", "4"), Message("assistant", "It")), 2)
    for template in (CHATML, CHATML_BLOCKS, None):
        assert ChatFormat(small(template)).encode([calls, told]) == [
            "the chat template does not render tool calls",
            "the chat template does not render the list of tools",
        ]
    only_two = CHATML.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'tool' %}")
    assert ChatFormat(small(only_two)).encode([results]) == ["the chat template does not render tool results"]
    assert ChatFormat(small(only_two)).prompts([replace(calls, answer=1), replace(results, answer=2)]) == [
        "the chat template does not render the list of tools",
        "the chat template does not render tool results",
    ]
    silent = OBJECTS.replace("{% if m.content %}", "{% if m.content and not m.tool_calls %}")
    spoken = replace(
        calls, messages=(calls.messages[0], replace(calls.messages[1], content="Let me see"), *calls.messages[2:])
    )
    assert ChatFormat(small(silent)).encode([spoken]) == [
        "the chat template leaves out a part of a turn with tool calls"
    ]
    assert isinstance(ChatFormat(small(OBJECTS)).encode([spoken])[0], Encoded)


THINKING = OBJECTS.replace(  # thoughts are kept after the last question alone, as Qwen 3 has it
    "{% for m in messages %}",
    "{% set ns = namespace(asked=0) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.asked = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}",
).replace(
    "{% if m.content %}{{m.content}}{% endif %}",
    "{% if m.role == 'assistant' and loop.index0 < ns.asked %}{{m.content.split('</think>')[-1]}}"
    "{% else %}{{m.content}}{% endif %}",
)


def test_earlier_answers_are_found_where_they_stand_in_the_whole() -> None:
    """Alone, the turns before "It is 4." keep the thought, which the whole conversation drops."""
    tokenizer = small(THINKING)
    first = asking(call({}))
    thought = replace(first.messages[1], content="<think>dog</think>")
    turns = (first.messages[0], thought, *first.messages[2:], Message("user", "Sure?"), Message("assistant", "Yes"))
    (encoded,) = ChatFormat(tokenizer).encode([Conversation(turns, 5)])
    assert isinstance(encoded, Encoded)
    assert supervised(tokenizer, encoded) == [
        '<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call><|im_end|>',
        "It is 4.<|im_end|>",
        "Yes<|im_end|>",
    ]
    assert (encoded.unsupervised, encoded.boundary_moved) == (0, True)


@pytest.mark.parametrize("eos", ["<|im_end|>", "<|endoftext|>"])
def test_a_text_that_ends_with_something_of_its_own_does_not_let_answers_run_on(eos: str) -> None:
    """Phi: what closes a conversation does not close its first answer."""
    tokenizer = small(
        CHATML.replace("{% if add", "{% if not add_generation_prompt %}{{eos_token}}{% endif %}{% if add"), eos=eos
    )
    encoded = ChatFormat(tokenizer).demonstration(DIALOGUE)
    end = "<|im_end|>" if eos == "<|im_end|>" else "<|im_end|>\n"
    assert supervised(tokenizer, encoded)[0] == f"Hello you!{end}"
    assert supervised(tokenizer, encoded)[1].startswith("It is 4.<|im_end|>")


def test_an_answer_that_is_not_in_the_text_is_counted() -> None:
    tokenizer = small(CHATML.replace("in messages %}", "in messages if m['content'] != 'Hello you!' %}"))
    encoded = ChatFormat(tokenizer).demonstration(DIALOGUE)
    assert supervised(tokenizer, encoded) == ["It is 4.<|im_end|>"]
    assert encoded.unsupervised == 1


def test_a_turn_says_whether_it_is_learned() -> None:
    for template in (CHATML, CHATML_BLOCKS, LLAMA3, None):
        tokenizer = small(template, bos="<|bos|>")
        chat = ChatFormat(tokenizer)
        whole = chat.demonstration(DIALOGUE)
        for place, kept in ((2, 1), (4, 0)):
            turns = [replace(turn, supervised=i != place) for i, turn in enumerate(DIALOGUE)]
            encoded = chat.demonstration(turns)
            assert encoded.tokens == whole.tokens
            assert supervised(tokenizer, encoded) == [supervised(tokenizer, whole)[kept]]
            assert encoded.unsupervised == 0


@pytest.mark.parametrize("marked", ["<think>a</think>", ""])
def test_a_template_that_marks_parts_of_an_answer(marked: str) -> None:
    """Two blocks in each answer: what stands between them is not learned."""
    parts = CHATML_BLOCKS.replace(
        "{% generation %}{{m['content']}}{% endgeneration %}",
        "{% generation %}{{'<think>'}}{% endgeneration %}{{'dog'}}{% generation %}{{m['content']}}{% endgeneration %}",
    )
    tokenizer = small(parts)
    encoded = ChatFormat(tokenizer).demonstration([*DIALOGUE[:4], Message("assistant", marked + "It is 4.")])
    assert supervised(tokenizer, encoded) == [
        "<think>",
        "Hello you!<|im_end|>",
        "<think>",
        f"{marked}It is 4.<|im_end|>",
    ]
    assert encoded.unsupervised == 0


PARTS = CHATML.replace("m['content']", "(m['content'] | map(attribute='text') | join)")


def test_texts_go_in_parts_to_a_template_that_reads_them_so() -> None:
    chats = [ChatFormat(small(template)) for template in (CHATML, PARTS)]
    assert chats[0].demonstration(DIALOGUE) == chats[1].demonstration(DIALOGUE)
    silent = CHATML.replace("m['content']", "''")
    assert ChatFormat(small(silent)).encode([Conversation(DIALOGUE, 4)]) == ["the chat template renders no texts"]


def test_a_prompt_that_opens_a_thought_which_the_answer_fills() -> None:
    """Qwen 3.5 without thinking: a prompt ends with an empty thought, which an answer with one of its own replaces."""
    empty = CHATML.replace("assistant\\n'}}{% endif", "assistant\\n<think>\\n\\n</think>\\n'}}{% endif")
    tokenizer = small(empty)
    turns = (*DIALOGUE[:4], Message("assistant", "<think>\n4</think>\nIt is 4."))
    (encoded,) = ChatFormat(tokenizer).encode([Conversation(turns, 4, first=4)])
    assert isinstance(encoded, Encoded)
    assert supervised(tokenizer, encoded) == ["<think>\n4</think>\nIt is 4.<|im_end|>"]
    assert (encoded.unsupervised, encoded.boundary_moved) == (0, True)
    assert tokenizer.decode(encoded.prompt).endswith("<think>\n\n</think>\n")


# --- system turns, raw text ---------------------------------------------------------------------------------------

GEMMA = CHATML.replace(
    "{% for", "{% if messages[0]['role'] == 'system' %}{{raise_exception('no system')}}{% endif %}{% for", 1
)


@pytest.mark.parametrize("template", [GEMMA, CHATML.replace("messages %}", "messages if m['role'] != 'system' %}", 1)])
def test_a_system_text_that_the_template_does_not_take_goes_before_the_users(
    template: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = small(template)
    chat = ChatFormat(tokenizer)
    one = Conversation(DIALOGUE, 4)
    first, second = chat.encode([one, replace(one, first=4)])
    assert isinstance(first, Encoded)
    assert isinstance(second, Encoded)
    assert tokenizer.decode(first.tokens).startswith("<|im_start|>user\nBe brief.\n\nHi there<|im_end|>\n")
    assert supervised(tokenizer, first) == ["Hello you!<|im_end|>", "It is 4.<|im_end|>"]
    assert supervised(tokenizer, second) == ["It is 4.<|im_end|>"]
    assert chat.prompt(DIALOGUE[:-1]) == first.prompt == first.tokens[: len(first.prompt)]
    assert capsys.readouterr().err.count("takes no system turn") == 1


def raw(tokenizer: PreTrainedTokenizerFast, text: str, template: Template = "auto") -> str:
    (encoded,) = ChatFormat(tokenizer, template).encode([Conversation([Message("text", text)], 0)])
    assert isinstance(encoded, Encoded)
    assert encoded.mask == [False] + [True] * (len(encoded.tokens) - 1)
    assert (encoded.prompt, encoded.text, encoded.boundary_moved) == ([], "", False)
    return tokenizer.decode(encoded.tokens)


@pytest.mark.parametrize("template", [None, CHATML, CHATML_BLOCKS, GEMMA])
def test_raw_text_is_learned_as_it_stands(template: str | None) -> None:
    assert raw(small(template), "What is") == "What is<|im_end|>"
    assert raw(small(template, bos="<|bos|>"), "What is") == "<|bos|>What is<|im_end|>"
    assert raw(small(template, bos="<|bos|>"), "<|bos|>What is<|im_end|>") == "<|bos|>What is<|im_end|>"
    written = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nIt<|im_end|>"
    assert raw(small(template), written) == written


def test_raw_text_gets_no_bos_where_that_opens_a_turn() -> None:
    assert raw(small(CHATML, bos="<|im_start|>"), "What") == "What<|im_end|>"
    assert raw(small(CHATML, bos="<|im_start|>"), "What", "none") == "<|im_start|>What<|im_end|>"


# --- many at once -------------------------------------------------------------------------------------------------


def test_refusals_stand_in_their_places() -> None:
    chat = ChatFormat(small(STRICT))
    good = Conversation((Message("user", "a"), Message("assistant", "b")), 1)
    bad = Conversation((Message("user", "a"), Message("user", "b"), Message("assistant", "b")), 2)
    half = Conversation((Message("user", "a\ud83d"), Message("assistant", "b")), 1)
    refused = (
        "the chat template refuses a conversation with roles user, user, assistant: Conversation roles must alternate"
    )
    found = chat.encode([bad, good, half, good])
    assert found[0] == refused
    assert found[2] == "half a surrogate pair, which is no text"
    assert found[1] == found[3] == chat.demonstration(good.messages)
    assert chat.prompts([bad, good])[0] == refused.replace("user, assistant", "user")
    assert chat.encode([]) == chat.prompts([]) == []


def test_a_prompt_is_shown_bare_or_rendered() -> None:
    chat = ChatFormat(small(bos="<|bos|>"))
    single, dialogue = Conversation(DIALOGUE[1:3], 1), Conversation(DIALOGUE, 4)
    for found in (chat.encode([single, dialogue]), chat.prompts([single, dialogue])):
        texts = [one.text for one in found if isinstance(one, Encoded)]
        assert texts == ["Hi there", chat.render_prompt(DIALOGUE[:4])]
        assert [one.prompt for one in found if isinstance(one, Encoded)] == [
            chat.prompt(DIALOGUE[1:2]),
            chat.prompt(DIALOGUE[:4]),
        ]


@pytest.mark.parametrize("template", [None, CHATML, REASONING])
def test_a_tokenizer_in_python_gives_the_same_answers(template: str | None) -> None:
    tokenizer = ByT5Tokenizer(eos_token="</s>")
    tokenizer.chat_template = template
    encoded = ChatFormat(tokenizer).demonstration(DIALOGUE)
    closing = {None: "</s>", CHATML: "<|im_end|>\n", REASONING: "<|im_end|>\n"}[template]
    assert [text.removeprefix("<think>\n\n").strip(" ") for text in supervised(tokenizer, encoded)] == [
        f"Hello you!{closing}",
        f"It is 4.{closing}</s>" if template else "It is 4.</s>",
    ]
    assert encoded.tokens[: len(encoded.prompt)] == encoded.prompt


def test_templates_are_rendered_as_transformers_renders_them() -> None:
    tokenizer = small("{{messages | tojson}}{{strftime_now('%Y')}}{{eos_token}}\n{% if true %}\n  a{% endif %}")
    conversation = [{"role": turn.role, "content": turn.content} for turn in DIALOGUE]
    text = tokenizer.apply_chat_template(conversation, tokenize=False)
    assert ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens_map).render(DIALOGUE) == text


def test_a_format_travels_to_another_process() -> None:
    chat = ChatFormat(small(OBJECTS))
    one = asking(call({}))
    assert pickle.loads(pickle.dumps(chat)).encode([one]) == chat.encode([one])
