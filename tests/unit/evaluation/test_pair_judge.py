"""Verdicts on pairs: read from a judge's words, in both orders, and in numbers by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from chat_server import MODEL, serving

from rlhf_lit.batches import Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.evaluation.answers import Answers
from rlhf_lit.evaluation.estimates import Estimate
from rlhf_lit.evaluation.pair_judge import TEMPLATE, Comparison, PairJudge, ServerJudge, Verdict, verdict_in
from rlhf_lit.rollout.server import Server


@pytest.mark.parametrize(
    ("words", "winner"),
    [
        ("A is right.\n\n[[A]]", "first"),
        ("[[b]]", "second"),
        ("They say the same. [[tie]]", "tie"),
        ("[[C]]", "tie"),
        ("I would end with [[A]], [[B]] or [[tie]]. Here it is:\n[[ B ]]", "second"),
        ("<think>Surely [[A]].</think>\nNo: [[B]]", "second"),
        ("<think>[[A]] seems better", "first"),
        ("Both are fine.\n**Verdict: A**\n", "first"),
        ("B", "second"),
        ("Answer B.", "second"),
        ("The better answer is A.", "first"),
        ("Final verdict: answer B", "second"),
        ("The verdict is a tie.", "tie"),
        ("A dog barks.", None),
        ("I prefer A because of B", None),
        ("[A]\nno, [[D]]", None),
        ("The first one is better", None),
        ("", None),
        (None, None),
    ],
)
def test_a_verdict_is_read_or_it_is_not(words: str | None, winner: str | None) -> None:
    assert verdict_in(words) == winner


def answers(texts: list[list[str]]) -> Answers:
    return Answers(texts, Sequences.pad([[]], [[]]), None)


class ByTable(PairJudge):
    """Says what a table says of two answers; notes what it was shown."""

    def __init__(self, table: dict[tuple[str, str], Any]) -> None:
        self.table = table
        self.shown: list[tuple[str, str, str, Any]] = []

    def compare(
        self, prompts: list[str], first: list[str], second: list[str], rows: list[dict[str, Any]]
    ) -> list[Verdict]:
        self.shown = list(zip(prompts, first, second, [row["n"] for row in rows], strict=True))
        return [Verdict(self.table[pair], f"{pair}") for pair in zip(first, second, strict=True)]


def test_both_orders_of_every_pair_by_hand() -> None:
    """Two prompts, two samples of the model, one of the baseline: eight verdicts."""
    judge = ByTable(
        {
            ("a1", "x"): "first", ("x", "a1"): "second",  # wins both ways
            ("a2", "x"): "first", ("x", "a2"): "first",  # whoever is first
            ("b1", "y"): "tie", ("y", "b1"): "first",  # a tie, and a loss
            ("b2", "y"): None, ("y", "b2"): None,
        }
    )  # fmt: skip
    ours, theirs = answers([["a1", "a2"], ["b1", "b2"]]), answers([["x"], ["y"]])
    found = Comparison.of(judge, ["p", "q"], ours, theirs, [{"n": 1}, {"n": 2}])
    assert judge.shown == [
        ("p", "a1", "x", 1), ("p", "x", "a1", 1), ("p", "a2", "x", 1), ("p", "x", "a2", 1),
        ("q", "b1", "y", 2), ("q", "y", "b1", 2), ("q", "b2", "y", 2), ("q", "y", "b2", 2),
    ]  # fmt: skip
    won, tied = found.outcomes
    assert won.tolist() == [[[1.0], [0.5]], [[0.0], [0.0]]]
    assert tied.tolist() == [[[0.0], [0.0]], [[0.5], [1.0]]]
    numbers = found.in_numbers()
    assert numbers.count == 8
    assert numbers.unreadable.mean == 2 / 8
    assert numbers.first.mean == pytest.approx(4 / 5), "a1, a2, x, y of five decided"
    assert numbers.consistent.mean == 2 / 4, "a1, and the two that could not be read"
    assert found.told(1, 0) == [
        {
            "baseline_sample": 0,
            "model_first": {"winner": "tie", "words": "('b1', 'y')"},
            "baseline_first": {"winner": "baseline", "words": "('y', 'b1')"},
        }
    ]
    assert [line["winner"] for line in (found.told(0, 0)[0][k] for k in ("model_first", "baseline_first"))] == [
        "model",
        "model",
    ]
    assert found.told(1, 1)[0]["model_first"]["winner"] is None


def test_of_ties_alone_there_is_no_position_bias() -> None:
    found = Comparison.of(ByTable({("a", "a"): "tie"}), ["p"], answers([["a"]]), answers([["a"]]), [{"n": 1}])
    numbers = found.in_numbers()
    assert np.isnan(numbers.first.mean)
    assert numbers.consistent == Estimate(1.0, numbers.consistent.low, numbers.consistent.high)


def test_what_a_server_is_shown() -> None:
    """All three as they stand, though an answer looks like a place of the template; deterministically."""
    with serving(lambda body: "[[B]]") as server:
        judge = ServerJudge(Server(server.base_url, MODEL), "{prompt}|{first}|{second}|{other}", max_tokens=9)
        found = judge.compare(["p {second}"], ["{prompt} [[A]]"], ["\\1 {first}"], [{}])
        [body] = server.asked
    assert found == [Verdict("second", "[[B]]")]
    assert body["messages"] == [{"role": "user", "content": "p {second}|{prompt} [[A]]|\\1 {first}|{other}"}]
    assert {key: body[key] for key in ("temperature", "max_tokens", "seed")} == {
        "temperature": 0, "max_tokens": 9, "seed": 0,
    }  # fmt: skip
    assert [TEMPLATE.count(place) for place in ("{prompt}", "{first}", "{second}")] == [1, 1, 1]


def test_what_is_cut_is_said_and_what_says_nothing_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    def says(body: dict[str, Any]) -> Any:
        cut = "long" in body["messages"][-1]["content"]
        return {"message": {"content": "Well"}, "finish_reason": "length"} if cut else "[[A]]"

    with serving(says) as server:
        judge = ServerJudge(Server(server.base_url, MODEL), max_tokens=2)
        found = judge.compare(["p", "long", "p"], ["a"] * 3, ["b"] * 3, [{}] * 3)
        assert [verdict.winner for verdict in found] == ["first", None, "first"]
        said = f"1 of 3 answers of {MODEL} at {server.base_url} were cut at 2 tokens; raise judge.max_tokens"
        assert capsys.readouterr().err == f"note: judge: {said}\n"
        with pytest.raises(
            UserError,
            match=r"no answer of teacher at .* holds a verdict, of 2; 2 were cut, so raise max_tokens; the first",
        ):
            judge.compare(["long", "long"], ["a"] * 2, ["b"] * 2, [{}] * 2)
        server.says = lambda body: "I like both"
        judge.prepare("gold")
        with pytest.raises(
            UserError, match=r"^gold: no answer of .*, of 1; the first is 'I like both'\. Let the templ"
        ):
            judge.compare(["p"], ["a"], ["b"], [{}])
        assert judge.compare([], [], [], []) == []


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"template": "{prompt} {first}"}, r"template shows no \{second\}"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
    ],
)
def test_a_judge_that_could_not_judge(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ServerJudge(Server("http://a/v1", MODEL), **settings)
