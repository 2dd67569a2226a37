"""IFEval's checks on good and bad answers written by hand, and instructions that cannot be checked."""

from __future__ import annotations

import json
from importlib import util
from typing import Any

import pytest

from rlhf_lit.errors import UserError
from rlhf_lit.rollout.ifeval_checks import CHECKS, sentences
from rlhf_lit.rollout.instruction_reward import InstructionReward

ENGLISH = "the weather has been lovely all week, and we went for a long walk by the river"
GERMAN = "Das Wetter war die ganze Woche schön, und wir gingen am Fluss spazieren."
WORDS = "one two three four five"

# instruction, its arguments, an answer that follows it, one that does not
CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("keywords:existence", {"keywords": ["river", "walk"]}, "A walk by the River.", "A walk by the sea."),
    ("keywords:frequency", {"keyword": "go", "frequency": 2, "relation": "at least"}, "go, go", "go"),
    ("keywords:forbidden_words", {"forbidden_words": ["bad"]}, "badly done", "a bad day"),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": "less than"}, "quick", "q Q"),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 2, "let_relation": "at least"}, "# #", "# a"),
    ("language:response_language", {"language": "de"}, GERMAN, ENGLISH),
    ("language:response_language", {"language": "de"}, GERMAN, "12 34"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 3, "relation": "less than"},
        "Mr. Smith saw Dr. Jones. They spoke of the U.S. economy.",
        "One. Two. Three.",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a\n***\nb", "a\n\nb"),
    ("length_constraints:number_words", {"num_words": 5, "relation": "at least"}, WORDS, "one two"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
        "First this.\n\nThen that.",
        "Then this.\n\nFirst that.",
    ),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [city]", "[name]"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\nP.S. Call me.", "Bye."),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* a\n* b", "* a"),
    ("detectable_format:constrained_response", {}, "My answer is yes.", "Certainly."),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 1}, "so *this*", "so this"),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Section", "num_sections": 2},
        "Section 1\na\nSection 2\nb",
        "Section 1\na",
    ),
    ("detectable_format:json_format", {}, '```json\n{"a": 1}\n```', '{"a": 1'),
    ("detectable_format:title", {}, "<<A title>>\ntext", "A title\ntext"),
    ("combination:two_responses", {}, "one******two", "one***two"),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Say hi."}, "Say hi. Hi!", "Hi! Say hi."),
    ("startend:end_checker", {"end_phrase": "The end."}, "So it was. The end.", "The end. So it was."),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": "at least"},
        "A BIG dog",
        "Big",
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_lowercase", {}, ENGLISH, ENGLISH.upper()),
    ("punctuation:no_comma", {}, "this and that", "this, that"),
    ("startend:quotation", {}, '"quoted"', '"not'),
]


def row(*instructions: tuple[str, dict[str, Any] | None]) -> dict[str, Any]:
    return {"instruction_id_list": [name for name, _ in instructions], "kwargs": [given for _, given in instructions]}


def scores(reward: InstructionReward, responses: list[str], data: dict[str, Any]) -> list[float]:
    assert reward.unreadable(data) is None
    return reward.judge(None, responses, [data] * len(responses))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "given", "good", "bad"), CASES)
def test_each_check(name: str, given: dict[str, Any], good: str, bad: str) -> None:
    nulls = {key: None for _, others, _, _ in CASES for key in others}  # a table has every column in every row
    assert scores(InstructionReward(), [good, bad, ""], row((name, nulls | given))) == [1.0, 0.0, 0.0]


def test_every_check_of_the_list_is_tried() -> None:
    assert {name for name, _, _, _ in CASES} == set(CHECKS)
    assert len(CHECKS) == 25


def test_a_fraction_or_all() -> None:
    data = row(
        ("punctuation:no_comma", {}),
        ("startend:quotation", None),
        ("length_constraints:number_words", {"num_words": 2, "relation": "at least"}),
    )
    responses = ['"one two"', '"one, two"', "one, two", "one,"]
    assert scores(InstructionReward(), responses, data) == pytest.approx([1, 2 / 3, 1 / 3, 0])
    assert scores(InstructionReward(credit="all"), responses, data) == [1, 0, 0, 0]


def test_strict_and_loose() -> None:
    """Loose: without the first line, the last or both, or without asterisks."""
    data = row(("startend:quotation", {}))
    responses = ['"a"', 'Sure:\n"a"', '"a"\nHope this helps!', 'Sure:\n"a"\nBye.', '**"a"**', 'Sure: "a"']
    assert scores(InstructionReward(), responses, data) == [1, 0, 0, 0, 0, 0]
    assert scores(InstructionReward(scoring="loose"), responses, data) == [1, 1, 1, 1, 1, 0]


def test_thinking_is_not_checked() -> None:
    data = row(("punctuation:no_comma", {}))
    assert scores(InstructionReward(), ["<think>first, then</think> done", "<think>first"], data) == [1, 0]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ({"kwargs": [{}]}, "no column 'instruction_id_list'"),
        ({"instruction_id_list": ["punctuation:no_comma"]}, "no column 'kwargs'"),
        ({"instruction_id_list": [], "kwargs": []}, "instruction_id_list is no list of instructions"),
        ({"instruction_id_list": "no_comma", "kwargs": [{}]}, "instruction_id_list is no list of instructions"),
        (row(("punctuation:no_comma", {})) | {"kwargs": []}, "kwargs has not one entry for each instruction"),
        (row(("punctuation:no_comma", {})) | {"kwargs": ["{}"]}, "kwargs has an entry that is no table"),
        (row(("punctuation:no_dots", {})), "unknown instruction punctuation:no_dots"),
        (
            row(("length_constraints:number_words", {"num_words": None, "relation": "at least"})),
            "length_constraints:number_words without num_words",
        ),
        (
            row(("length_constraints:number_words", {"num_words": -1, "relation": "at least"})),
            "length_constraints:number_words with a number out of range",
        ),
        (
            row(
                (
                    "length_constraints:nth_paragraph_first_word",
                    {"num_paragraphs": 2, "nth_paragraph": 3, "first_word": "a"},
                )
            ),
            "length_constraints:nth_paragraph_first_word with a number out of range",
        ),
        (
            row(("length_constraints:number_words", {"num_words": 5, "relation": "about"})),
            "length_constraints:number_words that cannot be checked (ValueError)",
        ),
        (row(("keywords:existence", {"keywords": ["(open"]})), "keywords:existence that cannot be checked (error)"),
        (row(("punctuation:no_comma", {"a": 1})), "punctuation:no_comma that cannot be checked (TypeError)"),
    ],
)
def test_instructions_that_cannot_be_checked(data: dict[str, Any], reason: str) -> None:
    """The library would draw at random what is missing or out of range."""
    assert InstructionReward().unreadable(data) == reason


def test_every_row_of_ifeval_can_be_read(real_data) -> None:
    lines = (real_data / "ifeval" / "input_data.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 541
    assert InstructionReward().all_unreadable(rows) == [None] * 541


def test_sentences_of_several_scripts() -> None:
    assert len(sentences("Mr. Smith came. He left! Why?")) == 3
    assert len(sentences("你好。今天天气很好！")) == 2
    assert sentences(" \n ") == []


def test_the_language_of_a_text_is_always_the_same() -> None:
    data = row(("language:response_language", {"language": "en"}))
    assert len(set(scores(InstructionReward(), ["the die is in was"] * 30, data))) == 1


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    found = util.find_spec
    monkeypatch.setattr(
        "rlhf_lit.rollout.instruction_reward.find_spec", lambda name: None if name == "if_verifiable" else found(name)
    )
    with pytest.raises(UserError, match=r"needs if_verifiable: pip install 'rlhf_lit\[instructions\]'$"):
        InstructionReward()
