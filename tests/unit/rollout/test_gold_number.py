"""Which gold answers are plainly a number, and which only end in one."""

from __future__ import annotations

from decimal import Decimal

import pytest

from rlhf_lit.rollout.final_number import gold_number

PLAIN = [
    ("72", "72"),
    ("$72.00", "72"),
    ("1,080", "1080"),
    (r"\$32{,}348", "32348"),
    ("-5", "-5"),
    ("−5", "-5"),
    ("-$5", "-5"),
    ("(-5)", "-5"),
    (".5", "0.5"),
    ("1e3", "1000"),
    ("3/4", "0.75"),
    (r"$\frac{3}{4}$", "0.75"),
    (r"\boxed{-\frac{3}{4}}", "-0.75"),
    ("50%", "50"),
    (r"50\%", "50"),
    ("**72**", "72"),
    (r"\(72\)", "72"),
    ("72 apples", "72"),
    ("10km", "10"),
    ("5 m2", "5"),
    ("7 cm^2", "7"),
    (r"5\text{ cm}^2", "5"),
    (r"45^\circ", "45"),
    ("72 miles/hour", "72"),
    ("the 18th", "18"),
    ("答案是72", "72"),
    ("A: 18", "18"),
    ("x = -5", "-5"),
    (r"\boxed{x = -5}", "-5"),
    ("f(2) = 7", "7"),
    ("a_3=7", "7"),
    ("so it is 72.", "72"),
    ("half of 144 is 72.", "72"),
    ("The total is 5 + 67 = 72.", "72"),
    ("He has 5 apples. Then 67 more. In all 72", "72"),
    ("5 apples or 6?\nA: 72", "72"),
    ("half of 144 is <<144/2=72>>72.\n#### 72", "72"),
    ("x=5 or x=6\n#### 6", "6"),
]
NOT_PLAIN = [
    "",
    "none",
    r"3\sqrt{13}",
    r"\sqrt{13}",
    "√5",
    "sqrt(5)",
    "sqrt 5",
    "(3,4]",
    "(3,4)",
    "[3,4]",
    "[5]",
    "{1,2}",
    "1, 2",
    "x=5 or x=6",
    "x=5, x=6",
    "x=5\nx=6",
    "x is 5 or x is 6",
    "5 or 6",
    "#### 5 or 6",
    "±5",
    r"\pm 5",
    "3x",
    "2x+3",
    "2x = 5",
    "y = 2x+5",
    "x - y = 5",
    "x^2 + y^2 = 25",
    "|x| = 5",
    "x < 5",
    r"x \le 5",
    "5i",
    r"2\pi",
    "2 pi",
    r"\log 5",
    r"\frac{\sqrt{3}}{2}",
    r"\frac12",
    "2/x",
    "10^6",
    r"2 \times 3",
    "5!",
    "3 million",
    "3k",
    "1 1/2",
    r"5\frac{1}{2}",
    "12/25/2020",
    "3:30",
    "10-20",
    "1/0",
    "Tom has 5 and Mary has 72",
]


@pytest.mark.parametrize(("text", "number"), PLAIN)
def test_a_gold_answer_that_is_a_number(text: str, number: str) -> None:
    assert gold_number(text) == Decimal(number)


@pytest.mark.parametrize("text", NOT_PLAIN)
def test_a_gold_answer_that_only_holds_numbers(text: str) -> None:
    assert gold_number(text) is None
