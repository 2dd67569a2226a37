"""Masks, tested by the exact tokens and the decoded text that they supervise."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf_lit.data.chat import ChatFormat, Encoded
from rlhf_lit.data.records import Message, Source, preferences, read_rows
from rlhf_lit.data.truncation import truncate_pair, truncate_prompt
from rlhf_lit.errors import UserError
from tests.unit.data.chats import CHATML, CHATML_BLOCKS, DIALOGUE, LLAMA3, REASONING, STRICT, small, supervised

REAL = Path(os.environ.get("RLHF_LIT_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL} (set RLHF_LIT_DATA)")

# --- templates ---------------------------------------------------------------------------------------------------


def test_plain_text_and_mask() -> None:
    tokenizer = small(bos="<|bos|>")
    encoded = ChatFormat(tokenizer).demonstration(DIALOGUE)
    assert tokenizer.decode(encoded.tokens) == (
        "<|bos|>System: Be brief.\n\nUser: Hi there\n\nAssistant: Hello you!<|im_end|>"
        "\n\nUser: What is 2+2?\n\nAssistant: It is 4.<|im_end|>"
    )
    assert supervised(tokenizer, encoded) == [" Hello you!<|im_end|>", " It is 4.<|im_end|>"]
    assert not encoded.boundary_moved


def test_none_joins_the_contents() -> None:
    tokenizer = small(template=CHATML, bos="<|bos|>")
    encoded = ChatFormat(tokenizer, "none").demonstration((Message("user", "Once "), Message("assistant", "upon")))
    assert tokenizer.decode(encoded.tokens) == "<|bos|>Once upon<|im_end|>"
    assert supervised(tokenizer, encoded) == ["upon<|im_end|>"]


def test_text_alone_is_supervised_but_for_its_first_token() -> None:
    with_bos, without = small(bos="<|bos|>"), small()
    story = (Message("assistant", "It is"),)
    encoded = ChatFormat(with_bos, "none").demonstration(story)
    assert (encoded.mask[0], supervised(with_bos, encoded)) == (False, ["It is<|im_end|>"])
    encoded = ChatFormat(without, "none").demonstration(story)
    assert encoded.mask == [False] + [True] * (len(encoded.tokens) - 1)


@pytest.mark.parametrize("template", [CHATML, CHATML_BLOCKS, REASONING])
def test_chatml(template: str) -> None:
    tokenizer = small(template)
    encoded = ChatFormat(tokenizer).demonstration(DIALOGUE)
    thought = "<think>\n\n" if template is REASONING else ""
    assert supervised(tokenizer, encoded) == ["Hello you!<|im_end|>", f"{thought}It is 4.<|im_end|>"]
    assert encoded.tokens[-1] == tokenizer.eos_token_id  # the line end after it is cut
    assert encoded.mask[-1]


def test_blocks_and_prefixes_agree() -> None:
    blocks = ChatFormat(small(CHATML_BLOCKS)).demonstration(DIALOGUE)
    assert blocks == ChatFormat(small(CHATML)).demonstration(DIALOGUE)


def test_eos_is_appended_where_the_template_ends_otherwise() -> None:
    tokenizer = small(CHATML, eos="<|endoftext|>")
    encoded = ChatFormat(tokenizer).demonstration(DIALOGUE)
    assert supervised(tokenizer, encoded)[-1] == "It is 4.<|im_end|>\n<|endoftext|>"


def test_an_answer_with_its_own_eos_gets_no_second() -> None:
    tokenizer = small()
    messages = (Message("user", "Hi"), Message("assistant", "It<|im_end|>"))
    assert supervised(tokenizer, ChatFormat(tokenizer).demonstration(messages)) == [" It<|im_end|>"]


def test_llama3_has_one_bos() -> None:
    tokenizer = small(LLAMA3, bos="<|bos|>", eos="<|eot|>")
    encoded = ChatFormat(tokenizer).demonstration(DIALOGUE)
    assert encoded.tokens.count(tokenizer.bos_token_id) == 1
    assert encoded.tokens[0] == tokenizer.bos_token_id
    assert supervised(tokenizer, encoded) == ["Hello you!<|eot|>", "It is 4.<|eot|>"]


def test_a_text_that_brings_a_bos_gets_no_second() -> None:
    tokenizer = small(bos="<|bos|>")
    chat = ChatFormat(tokenizer, "none")
    messages = (Message("user", "<|bos|>What"), Message("assistant", " is"))
    encoded = chat.demonstration(messages)
    assert tokenizer.decode(encoded.tokens) == "<|bos|>What is<|im_end|>"
    assert supervised(tokenizer, encoded) == [" is<|im_end|>"]
    assert tokenizer.decode(chat.prompt(messages[:1])) == "<|bos|>What"


@pytest.mark.parametrize("template", [None, CHATML, CHATML_BLOCKS, LLAMA3])
def test_the_prompt_is_a_prefix_up_to_the_mask(template: str | None) -> None:
    chat = ChatFormat(small(template, bos="<|bos|>"))
    prompt = chat.prompt(DIALOGUE[:-1])
    chosen, rejected = chat.pair(DIALOGUE[:-1], DIALOGUE[-1:], (Message("assistant", "Dunno"),))
    for side in (chosen, rejected):
        assert side.tokens[: len(prompt)] == prompt
        assert side.mask == [False] * len(prompt) + [True] * (len(side.tokens) - len(prompt))
        assert not side.boundary_moved


def test_pair_supervises_the_answers_not_the_prompts_turns() -> None:
    tokenizer = small(CHATML)
    answers = (Message("assistant", "It is 4."), Message("user", "Sure?"), Message("assistant", "Yes"))
    chosen, rejected = ChatFormat(tokenizer).pair(DIALOGUE[:-1], answers, (Message("assistant", "Dunno"),))
    assert supervised(tokenizer, chosen) == ["It is 4.<|im_end|>", "Yes<|im_end|>"]
    assert supervised(tokenizer, rejected) == ["Dunno<|im_end|>"]


@pytest.mark.parametrize("template", [None, "{% for m in messages %}{{m['content']}}{% endfor %}"])
def test_a_merge_across_the_boundary_moves_it_to_the_common_prefix(template: str | None) -> None:
    tokenizer = small(template)
    chat = ChatFormat(tokenizer, "none" if template is None else "tokenizer")
    assert len(tokenizer("dog")["input_ids"]) == 1
    encoded = chat.demonstration((Message("user", "What do"), Message("assistant", "g")))
    assert encoded.boundary_moved
    assert supervised(tokenizer, encoded) == [" dog<|im_end|>"]


def test_rendered_prompt_has_no_bos() -> None:
    chat = ChatFormat(small(bos="<|bos|>"))
    assert chat.render_prompt(DIALOGUE[1:2]) == "User: Hi there\n\nAssistant:"
    assert chat.prompt(DIALOGUE[1:2]) == chat.tokenizer("<|bos|>User: Hi there\n\nAssistant:")["input_ids"]


def test_the_chosen_format_travels_with_the_tokenizer(tmp_path: Path) -> None:
    chat = ChatFormat(small(bos="<|bos|>"), "none")
    chat.tokenizer.save_pretrained(tmp_path)
    again = ChatFormat(AutoTokenizer.from_pretrained(tmp_path))
    assert again.demonstration(DIALOGUE) == chat.demonstration(DIALOGUE)
    assert again.fingerprint == chat.fingerprint


def test_fingerprint_follows_content() -> None:
    prints = {
        ChatFormat(small()).fingerprint,
        ChatFormat(small(), "none").fingerprint,
        ChatFormat(small(CHATML)).fingerprint,
        ChatFormat(small(bos="<|bos|>")).fingerprint,
        ChatFormat(small(eos="<|eot|>")).fingerprint,
    }
    assert len(prints) == 5
    tokenizer = small()
    tokenizer.pad_token = "<|end|>"
    tokenizer(["a", "bc"], padding=True, truncation=True, max_length=2)
    bare = small()
    bare.pad_token = "<|end|>"
    assert ChatFormat(tokenizer).fingerprint == ChatFormat(bare).fingerprint


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(UserError, match="has no chat template"):
        ChatFormat(small(), "tokenizer")
    tokenizer = small()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="has no EOS token"):
        ChatFormat(tokenizer)
    with pytest.raises(UserError, match="roles user, user: Conversation roles must alternate"):
        ChatFormat(small(STRICT)).prompt((Message("user", "a"), Message("user", "b")))


# --- real tokenizers ---------------------------------------------------------------------------------------------


def stories() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(REAL / "stories260k" / "hf")


def gpt2() -> PreTrainedTokenizerBase:
    path = REAL / "tok_gpt2_json" / "gpt2.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(path), bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def torchtune() -> PreTrainedTokenizerBase:
    path = REAL / "tok_torchtune_small" / "tokenizer.json"
    return PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="</s>")


def lossy() -> PreTrainedTokenizerBase:
    path = REAL / "tok_torchtune_small" / "tiny_bpe_tokenizer.json"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML_BLOCKS
    return tokenizer


@real_data
@pytest.mark.parametrize(
    ("make", "answers"),
    [
        (stories, [["▁He", "ll", "o", "▁you", "!", "</s>"], ["▁I", "t", "▁", "is", "▁", "4", ".", "</s>"]]),
        (gpt2, [["ĠHello", "Ġyou", "!", "<|endoftext|>"], ["ĠIt", "Ġis", "Ġ4", ".", "<|endoftext|>"]]),
        (torchtune, [["ĠH", "ell", "o", "Ġyou", "!", "</s>"], ["ĠIt", "Ġis", "Ġ", "4", ".", "</s>"]]),
        (lossy, [["H", "ell", "o", "Ġyou", "!", "<|im_end|>"], ["I", "t", "Ġis", "Ġ", "4", ".", "<|im_end|>"]]),
    ],
)
def test_exact_supervised_tokens(make: Callable[[], PreTrainedTokenizerBase], answers: list[list[str]]) -> None:
    tokenizer = make()
    chat = ChatFormat(tokenizer)
    encoded = chat.demonstration(DIALOGUE)
    on = [t for t, m in zip(encoded.tokens, encoded.mask, strict=True) if m]
    assert tokenizer.convert_ids_to_tokens(on) == [piece for answer in answers for piece in answer]
    assert not encoded.boundary_moved
    last = len(answers[-1])
    assert chat.prompt(DIALOGUE[:-1]) == encoded.tokens[:-last]


@real_data
def test_stories_start_like_the_models_own_training_text() -> None:
    tokenizer = stories()
    text = "Once upon a time, there was"
    assert ChatFormat(tokenizer, "none").prompt((Message("user", text),)) == [1, *tokenizer(text)["input_ids"]]


@real_data
@pytest.mark.parametrize("make", [stories, torchtune, lossy])
def test_hh_answers_are_supervised_whole(make: Callable[[], PreTrainedTokenizerBase]) -> None:
    tokenizer = make()
    chat = ChatFormat(tokenizer)
    source = Source(str(REAL / "hh_harmless_test" / "test.jsonl.gz"), limit=150)
    for record in preferences(read_rows(source), source, on_bad_row="skip")[0]:
        prompt = chat.prompt(record.prompt)
        sides = chat.pair(record.prompt, record.chosen, record.rejected)
        for side, answer in zip(sides, (record.chosen, record.rejected), strict=True):
            assert side.tokens[: len(prompt)] == prompt
            assert side.mask == [False] * len(prompt) + [True] * (len(side.tokens) - len(prompt))
            assert side.tokens[-1] == tokenizer.eos_token_id
            if make is torchtune:  # the one of the three that loses nothing
                text = tokenizer.decode(side.tokens[len(prompt) : -1])
                assert text == " " + answer[0].content


# --- truncation --------------------------------------------------------------------------------------------------

BOS = 1
TOKENS, MASK = [BOS, 10, 11, 12, 13, 20, 21], [False] * 5 + [True] * 2


@pytest.mark.parametrize(
    ("policy", "bos", "length", "kept"),
    [
        ("keep_end", BOS, 7, TOKENS),
        ("drop", BOS, 7, TOKENS),
        ("drop", BOS, 6, None),
        ("keep_end", BOS, 5, [BOS, 12, 13, 20, 21]),
        ("keep_end", None, 5, [11, 12, 13, 20, 21]),
        ("keep_start", None, 5, [BOS, 10, 11, 20, 21]),
        ("keep_end", BOS, 3, [BOS, 20, 21]),
        ("keep_end", None, 3, [13, 20, 21]),
        ("keep_start", None, 2, None),
        ("keep_end", BOS, 2, None),
    ],
)
def test_prompts_are_cut_and_answers_are_not(policy: str, bos: int | None, length: int, kept: list[int] | None) -> None:
    result = truncate_prompt(TOKENS, MASK, length, policy, bos)  # type: ignore[arg-type]
    assert result == (None if kept is None else (kept, [False] * (len(kept) - 2) + [True] * 2))


def test_a_prompt_alone_is_cut_too() -> None:
    assert truncate_prompt([BOS, 10, 11, 12], [False] * 4, 2, "keep_end", BOS) == ([BOS, 12], [False] * 2)


def test_both_sides_of_a_pair_lose_the_same_tokens() -> None:
    chosen = Encoded(TOKENS, MASK, False)
    rejected = Encoded([*TOKENS[:5], 20, 30, 31], [False] * 5 + [True] * 3, True)
    cut = truncate_pair(chosen, rejected, 6, "keep_end", BOS)
    assert cut == (
        Encoded([BOS, 12, 13, 20, 21], [False] * 3 + [True] * 2, False),
        Encoded([BOS, 12, 13, 20, 30, 31], [False] * 3 + [True] * 3, True),
    )
    cut = truncate_pair(chosen, rejected, 6, "keep_start")
    assert cut is not None
    assert cut[0].tokens == [BOS, 10, 11, 20, 21]
    assert cut[1].tokens == [BOS, 10, 11, 20, 30, 31]
    assert truncate_pair(chosen, rejected, 6, "drop") is None
    assert truncate_pair(chosen, rejected, 8, "drop") == (chosen, rejected)


def test_tokens_in_which_the_sides_differ_are_never_cut() -> None:
    chosen = Encoded([BOS, 10, 11, 12, 20], [False] * 4 + [True], False)
    rejected = Encoded([BOS, 10, 99, 12, 21], [False] * 4 + [True], True)  # differ inside what each masks as prompt
    assert truncate_pair(chosen, rejected, 4, "keep_end", BOS) == (
        Encoded([BOS, 11, 12, 20], [False] * 3 + [True], False),
        Encoded([BOS, 99, 12, 21], [False] * 3 + [True], True),
    )
    assert truncate_pair(chosen, rejected, 3, "keep_end", BOS) is None
    cut = truncate_pair(chosen, rejected, 4, "keep_start")
    assert cut is not None
    assert cut[0].tokens == [BOS, 11, 12, 20]
