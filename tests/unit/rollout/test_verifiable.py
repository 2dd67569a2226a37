"""Rewards that a rule decides: the number a text ends in, a pattern, a length."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
import tiny
import torch
from jsonargparse import ArgumentParser

from rlhf_lit.errors import UserError
from rlhf_lit.rollout import verifiable
from rlhf_lit.rollout.final_number import final_number
from rlhf_lit.rollout.rewards import RewardSource
from rlhf_lit.rollout.verifiable import ContainsAll, ExactMatch, LengthReward, NumberReward, RegexReward

# --- the final number ------------------------------------------------------------------------------------------------

PLAIN = [
    ("72", "72"),
    ("so it is 72.", "72"),
    ("first 5, then 72", "72"),
    ("1,080", "1080"),
    ("$1,234,567.50!", "1234567.50"),
    ("$18", "18"),
    ("€ 18", "18"),
    ("-5", "-5"),
    ("−5", "-5"),
    ("x=-5", "-5"),
    ("-$5", "-5"),
    ("$-5", "-5"),
    ("(-5)", "-5"),
    ("16-3", "3"),
    ("between 10-20", "20"),
    ("16 - 3", "3"),
    (".5", "0.5"),
    ("it costs Rs.500", "500"),
    ("-.5", "-0.5"),
    ("3.0", "3"),
    ("50%", "50"),
    ("72 apples", "72"),
    ("10km", "10"),
    ("the 18th", "18"),
    ("**72**", "72"),
    ("5 m2", "5"),
    ("7 cm^2", "7"),
    ("1,2,3", "3"),
    ("1,2345", "2345"),
    ("1e3", "1000"),
    ("2.5E-2", "0.025"),
    ("5e", "5"),
    ("答案是72", "72"),
    ("2 * 9 = $<<2*9=18>>18", "18"),
    ("0.1", "0.1"),
    ("123456789012345678901234567890.1", "123456789012345678901234567890.1"),
    ("A: 18", "18"),
]
MARKED = [
    ("#### 72", "72"),
    ("####72", "72"),
    ("####\n72", "72"),
    ("5 + 67 = 72\n#### 72\n\nQuestion: what is 3 + 4?", "72"),
    ("#### 1\nno, wait: 9\n#### 2", "2"),
    ("#### $1,080.00 a year", "1080"),
    ("#### 3 (that is 3.0)", "3"),
    (r"\boxed{\frac{10}{2}}", "5"),
    (r"so \boxed{72}. Check: 9", "72"),
    (r"\boxed{1} or rather \boxed{2}", "2"),
    (r"\boxed{1{,}080}", "1080"),
    (r"\boxed{1,\!080}", "1080"),
    (r"\boxed{1\,080}", "1080"),
    (r"\boxed{-\$18}", "-18"),
    (r"\boxed{50\%}", "50"),
    (r"\boxed{x = -5}", "-5"),
    (r"\boxed{5\text{ cm}^2}, 9", "5"),
    (r"\boxed{\text{18 apples}}, of 20", "18"),
    (r"\boxed{\text{age} = 18}, 9", "18"),
    (r"\boxed{72", "72"),
    (r"#### \boxed{72}", "72"),
    ("\\boxed{1}\n#### 2", "2"),
    ("#### 1\n\\boxed{2}", "2"),
]
NONE = [
    "",
    "no number",
    "x2",
    "####",
    "72 ####",
    "72\n#### none",
    "#### 12 or 13",
    "#### 1 1/2",
    r"\boxed{1, 2}",
    r"\boxed{5\frac{1}{2}}",
    r"72 \boxed{}",
    r"\boxed{a}, so 5",
    "1/0",
]


@pytest.mark.parametrize(("text", "number"), PLAIN + MARKED)
def test_the_number_of_a_text(text: str, number: str) -> None:
    assert final_number(text) == Decimal(number)


@pytest.mark.parametrize("text", NONE)
def test_a_text_without_an_answer(text: str) -> None:
    assert final_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1/2", Fraction(1, 2)),
        ("-3/4", Fraction(-3, 4)),
        ("#### 7/14", Fraction(1, 2)),
        (r"\boxed{\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{-\dfrac{3}{4}}", Fraction(-3, 4)),
        ("2.5/0.5", Fraction(5)),
        ("$3/lb", Fraction(3)),
        ("10/2=5", Fraction(5)),
    ],
)
def test_a_fraction_is_its_quotient(text: str, value: Fraction) -> None:
    number = final_number(text)
    assert number is not None
    assert Fraction(number) == value


def test_fractions_are_equal_where_their_values_are() -> None:
    assert final_number("2/6") == final_number("1/3")
    assert final_number("1/3") != final_number("0.3333333333333333")
    assert final_number("1/3") != final_number("33333333333333333333/100000000000000000000")


def test_a_date_is_no_fraction() -> None:
    assert final_number("on 12/25/2020") == 12


def test_numbers_are_exact() -> None:
    assert final_number("0.1") == Decimal(1) / Decimal(10)
    assert final_number("9007199254740993") != final_number("9007199254740992")  # one float


# --- the number of the row -------------------------------------------------------------------------------------------


def score(source: RewardSource, responses: list[str], rows: list[dict[str, Any]] | None = None) -> list[float]:
    """Of responses of 2, 3, 4, … tokens, their EOS included."""
    sequences = tiny.sequences([(3 + i % 2, i + 1) for i in range(len(responses))])
    rows = rows if rows is not None else [{} for _ in responses]
    scores = source(sequences, ["p"] * len(responses), responses, rows, 100)
    assert scores.dtype == torch.float32
    return scores.tolist()


@pytest.mark.parametrize(
    "answer", [72, 72.0, "72", "$72.00", "half of 144 is <<144/2=72>>72.\n#### 72", r"\boxed{72}", Decimal(72)]
)
def test_the_rows_answer_in_any_form(answer: Any) -> None:
    rows = [{"answer": answer}] * 4
    assert score(NumberReward(), ["so 72", "#### 72.0", "73", "none"], rows) == [1.0, 1.0, 0.0, 0.0]


def test_each_response_is_held_against_its_own_row() -> None:
    rows = [{"gold": 1, "answer": 2}, {"gold": 2, "answer": 1}, {"gold": 0.1, "answer": 2}]
    source = NumberReward("gold", correct=2.0, wrong=-0.5)
    assert score(source, ["1", "1", "0.1"], rows) == [2.0, -0.5, 2.0]


@pytest.mark.parametrize(
    ("row", "reason", "line"),
    [
        ({"question": "q", "solution": "5"}, "no column 'answer'", "; a row has columns question, solution"),
        ({}, "no column 'answer'", "; a row has columns none"),
        ({"answer": None}, "null answer", "; a row has None"),
        ({"answer": "none"}, "answer is not plainly a number", "; a row has 'none'"),
        ({"answer": True}, "answer is not plainly a number", "; a row has True"),
        ({"answer": float("nan")}, "answer is not plainly a number", "; a row has nan"),
        ({"answer": Decimal("inf")}, "answer is not plainly a number", r"; a row has Decimal\('Infinity'\)"),
        ({"answer": [5]}, "answer is not plainly a number", r"; a row has \[5\]"),
        ({"answer": "#### 5 or 6"}, "answer is not plainly a number", "; a row has '#### 5 or 6'"),
    ],
)
def test_a_row_without_a_number(row: dict[str, Any], reason: str, line: str) -> None:
    """The reason rows are counted under before the first step, and the line that ends a run which did not ask."""
    assert NumberReward().unreadable(row) == reason
    assert NumberReward().all_unreadable([{"answer": 5}, row]) == [None, reason]
    with pytest.raises(UserError, match=rf"^reward\.column: {re.escape(reason)}{line}$"):
        score(NumberReward(), ["5", "5"], [{"answer": 5}, row])


# --- a pattern -------------------------------------------------------------------------------------------------------


def test_a_pattern_is_found_anywhere_or_describes_the_whole() -> None:
    responses = ["yes", "oh yes", "yes!", "no", "Yes"]
    assert score(RegexReward("yes"), responses) == [1.0, 1.0, 1.0, 0.0, 0.0]
    assert score(RegexReward("yes", whole=True), responses) == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert score(RegexReward("(?i)yes", matched=0.5, unmatched=-2.0), responses) == [0.5, 0.5, 0.5, -2.0, 0.5]


def test_a_pattern_over_several_lines() -> None:
    responses = ["<think>\na\n</think> 5", "<think>a</think> 5"]
    assert score(RegexReward("<think>.*</think> [0-9]", whole=True), responses) == [0.0, 1.0]
    assert score(RegexReward("(?s)<think>.*</think> [0-9]", whole=True), responses) == [1.0, 1.0]


# --- exact texts -----------------------------------------------------------------------------------------------------


def test_an_exact_match_knows_what_counts() -> None:
    responses = ["New York", " New York\n", "New  York", "new york", "New York.", "in New York", "New\nYork"]
    rows = [{"answer": "New York"}] * len(responses)
    assert score(ExactMatch(), responses, rows) == [1, 1, 1, 0, 0, 0, 1]
    assert score(ExactMatch(white_space=True), responses, rows) == [1, 1, 0, 0, 0, 0, 0]
    assert score(ExactMatch(case=False), responses, rows) == [1, 1, 1, 1, 0, 0, 1]
    assert score(ExactMatch(punctuation=False, wrong=-1.0), responses, rows) == [1, 1, 1, -1, 1, -1, 1]


def test_any_of_a_rows_answers_matches_exactly_and_composed_letters_are_alike() -> None:
    rows = [{"answer": ["caf\u00e9", 5]}, {"answer": ["caf\u00e9", 5]}, {"answer": 5.5}]
    assert score(ExactMatch(), ["cafe\u0301", "5", "5.5"], rows) == [1, 1, 1]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (None, "null answer"),
        ([], "answer is no text"),
        (["a", None], "answer is no text"),
        ({"a": 1}, "answer is no text"),
        (True, "answer is no text"),
        ("  ", "nothing to match in answer"),
    ],
)
def test_an_answer_that_nothing_matches(answer: Any, reason: str) -> None:
    assert ExactMatch().unreadable({"answer": answer}) == reason


def test_all_strings_have_to_be_there() -> None:
    responses = ["red and blue", "blue", "Red, blue", ""]
    assert score(ContainsAll(["red", "blue"]), responses) == [1, 0, 0, 0]
    assert score(ContainsAll(["red", "blue"], case=False, correct=0.5, wrong=-0.5), responses) == [0.5, -0.5, 0.5, -0.5]
    rows = [{"words": ["red", "blue"]}, {"words": "blue"}, {"words": ["Red"]}, {"words": ["x"]}]
    assert score(ContainsAll(column="words"), responses, rows) == [1, 1, 1, 0]


def test_strings_of_a_row_that_cannot_be_looked_for() -> None:
    source = ContainsAll(column="words")
    rows = [{"words": []}, {"words": [""]}, {"words": ["a", None]}, {"words": None}, {}, {"words": ["a", 5]}]
    assert source.all_unreadable(rows) == [
        *["words is no list of strings"] * 3,
        "null words",
        "no column 'words'",
        None,
    ]
    assert ContainsAll(["a"]).unreadable({}) is None


# --- a length --------------------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_mask() -> None:
    """Responses of 2, 3, 4 and 5 tokens, EOS included; their texts do not matter."""
    texts = ["", "a" * 99, "b", "c"]
    assert score(LengthReward(4), texts) == [-2.0, -1.0, 0.0, -1.0]
    assert score(LengthReward(3, per_unit=0.5, penalise="excess"), texts) == [0.0, 0.0, -0.5, -1.0]
    assert score(LengthReward(0, penalise="excess"), texts) == [-2.0, -3.0, -4.0, -5.0]


def test_characters_are_those_of_the_text() -> None:
    texts = ["", "five!", "−½€", "twelve chars"]
    assert score(LengthReward(5, unit="characters", per_unit=0.5), texts) == [-2.5, 0.0, -1.0, -3.5]
    assert score(LengthReward(5, unit="characters", penalise="excess"), texts) == [0.0, 0.0, 0.0, -7.0]


# --- settings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("NumberReward", {"correct": float("nan")}, r"reward\.correct must be a finite number, not nan"),
        ("NumberReward", {"wrong": float("-inf")}, r"reward\.wrong must be a finite number, not -inf"),
        ("RegexReward", {"pattern": "("}, r"reward\.pattern: '\(' is no regular expression: missing \)"),
        ("RegexReward", {"pattern": "a", "matched": float("inf")}, r"reward\.matched must be a finite"),
        ("RegexReward", {"pattern": "a", "unmatched": float("inf")}, r"reward\.unmatched must be a finite"),
        ("ExactMatch", {"correct": float("nan")}, r"reward\.correct must be a finite number, not nan"),
        ("ContainsAll", {"strings": []}, r"reward\.strings: name at least one string"),
        ("ContainsAll", {"strings": ["a", ""]}, r"reward\.strings: name at least one string, none of them empty"),
        ("LengthReward", {"target": -1}, r"reward\.target must be at least 0, not -1"),
        ("LengthReward", {"target": 1, "per_unit": 0.0}, r"reward\.per_unit must be greater than 0, not 0"),
        ("LengthReward", {"target": 1, "per_unit": float("nan")}, r"reward\.per_unit must be greater than 0, not nan"),
        ("LengthReward", {"target": 1, "per_unit": float("inf")}, r"reward\.per_unit must be a finite"),
    ],
)
def test_settings_that_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    source = getattr(verifiable, name)
    with pytest.raises(UserError, match=message) as caught:
        source(**settings)
    # The command line shows a constructor's complaint as one line only where no other exception stands behind it.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("NumberReward", {"column": "gold", "correct": 2.0, "wrong": -1.0}),
        ("ExactMatch", {"column": "gold", "case": False, "white_space": True, "punctuation": False, "wrong": -1.0}),
        ("ContainsAll", {"strings": ["a", "b"], "case": False, "correct": 2.0}),
        ("ChoiceReward", {"column": "answerKey", "options": "choices", "letters": "ABCD", "correct": 2.0}),
        ("MathReward", {"column": "gold", "correct": 2.0, "wrong": -1.0}),
        ("InstructionReward", {"column": "ids", "arguments": "args", "scoring": "loose", "credit": "all"}),
        ("RegexReward", {"pattern": "a|b", "matched": 2.0, "unmatched": -1.0, "whole": True}),
        ("LengthReward", {"target": 5, "unit": "characters", "per_unit": 0.5, "penalise": "excess"}),
    ],
)
def test_a_config_names_them_by_their_class_alone(name: str, settings: dict[str, Any]) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=RewardSource)
    reward = parser.instantiate(parser.parse_object({"reward": {"class_path": name, "init_args": settings}})).reward
    assert type(reward).__name__ == name
    found = {field: getattr(reward, field) for field in settings}
    if name == "RegexReward":
        found["pattern"] = found["pattern"].pattern
    assert found == settings
