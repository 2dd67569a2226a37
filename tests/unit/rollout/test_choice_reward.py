"""Multiple choice: which option a row's gold names, and which a response."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lit.errors import UserError
from rlhf_lit.rollout.choice_reward import ChoiceReward, Options, chosen

CITIES = ["London", "Paris", "New York", "York"]
OPTIONS = Options(("A", "B", "C", "D"), ("london", "paris", "new york", "york"), 1)


@pytest.mark.parametrize(
    ("answer", "options", "right"),
    [
        ("B", CITIES, 1),
        ("b", CITIES, 1),
        ("(B)", CITIES, 1),
        ("B.", CITIES, 1),
        (1, CITIES, 1),
        (0, CITIES, 0),
        ("1", CITIES, 1),
        ("Paris", CITIES, 1),
        (" paris. ", CITIES, 1),
        ("B", {"A": "London", "B": "Paris"}, 1),
        ("Paris", {"A": "London", "B": "Paris", "E": None}, 1),
        ("2", {"text": ["London", "Paris"], "label": ["1", "2"]}, 1),
        ("A", ["B", "A"], 0),  # a letter before a text
        ("3", ["3", "1", "2"], 0),  # a text before a number
    ],
)
def test_the_gold_option(answer: Any, options: Any, right: int) -> None:
    row = {"answer": answer, "options": options}
    assert ChoiceReward().unreadable(row) is None
    assert ChoiceReward().gold(row).right == right


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"options": CITIES}, "no column 'answer'"),
        ({"answer": "B"}, "no options"),
        ({"answer": "B", "options": None}, "no options"),
        ({"answer": "B", "options": "A) London B) Paris"}, "options is no list of options"),
        ({"answer": "B", "options": ["London"]}, "options is no list of options"),
        ({"answer": "B", "options": ["London", ["Paris"]]}, "options is no list of options"),
        ({"answer": None, "options": CITIES}, "null answer"),
        ({"answer": "E", "options": CITIES}, "answer names no option"),
        ({"answer": 4, "options": CITIES}, "answer names no option"),
        ({"answer": -1, "options": CITIES}, "answer names no option"),
        ({"answer": True, "options": CITIES}, "answer names no option"),
        ({"answer": "Rome", "options": CITIES}, "answer names no option"),
        ({"answer": ["B"], "options": CITIES}, "answer names no option"),
        ({"answer": "Paris", "options": ["Paris", "paris"]}, "answer may mean several options"),
        ({"answer": 1, "options": ["1", "2", "3"]}, "answer may mean several options"),
    ],
)
def test_a_gold_option_that_cannot_be_read(row: dict[str, Any], reason: str) -> None:
    assert ChoiceReward().unreadable(row) == reason


RIGHT = [
    "B",
    "b",
    "(B)",
    "(b)",
    "B.",
    "B)",
    "B) Paris",
    "B. Paris",
    "B: because it is",
    "**B**",
    "Option B",
    "Paris",
    "paris.",
    "The answer is B",
    "The answer is (B).",
    "The correct answer is: **B. Paris**",
    "Answer: B",
    "The answer is Paris",
    "The answer is a lovely city called Paris.",
    "The answer is option B.",
    "The answer is B because A is wrong",
    "(A) is tempting. The answer is (B)",
    "The answer is A. No, the answer is B",
    r"\boxed{B}",
    r"\boxed{\text{B}}",
    r"so \boxed{(B) Paris}",
    "#### B",
    "London is large.\nB",
    "B\nIt is the capital.",
]
NONE = [
    "",
    "none",
    "E",
    "A or B",
    "A, B",
    "A/B",
    "A B C D",
    "The answer is A or B",
    "The answer is (A) or (B)",
    "The answer is Paris or London",
    r"\boxed{A, B}",
    "B) London",
    "A dog barks",
    "It could be Paris or London.",
]


@pytest.mark.parametrize("response", RIGHT)
def test_a_response_that_names_the_option(response: str) -> None:
    assert chosen(response, OPTIONS) == 1


@pytest.mark.parametrize("response", NONE)
def test_a_response_that_names_none_or_several(response: str) -> None:
    assert chosen(response, OPTIONS) is None


def test_of_texts_within_one_another_the_longest_is_meant() -> None:
    assert chosen("The answer is the city of New York.", OPTIONS) == 2
    assert chosen("The answer is the city of York.", OPTIONS) == 3


def test_scores() -> None:
    rows = [{"answer": 1, "options": CITIES}] * 3
    reward = ChoiceReward(correct=2.0, wrong=-1.0)
    assert reward.judge(None, ["(B)", "A", "Rome"], rows) == [2.0, -1.0, -1.0]  # type: ignore[arg-type]
    letters = ChoiceReward("key", options=None)
    assert letters.judge(None, ["B", "The answer is C"], [{"key": "B"}, {"key": "D"}]) == [1.0, 0.0]  # type: ignore[arg-type]


def test_letters_are_different() -> None:
    with pytest.raises(UserError, match=r"^reward\.letters: needs two or more different ones, not 'AA'$"):
        ChoiceReward(letters="AA")
