"""Two answers and a verdict: who won, however a file writes it, and what is refused since it can be read both ways."""

from __future__ import annotations

from typing import Any

import pytest

from rlhf_lit.data.answered import Answered, answered
from rlhf_lit.data.records import Source, demonstrations, judged, preferences, prompts, rankings
from rlhf_lit.errors import UserError


def versus(column: str, values: list[Any], one: str, two: str, **others: Any) -> list[dict[str, Any]]:
    return [{"prompt": "q", one: "A", two: "B", column: value, **others} for value in values]


def winners(rows: list[Any], **columns: Any) -> list[str]:
    """The chosen answer of each pair that is left."""
    records, _ = preferences(rows, Source("rows.jsonl", columns=columns), on_bad_row="error")
    assert all({record.chosen[0].content, record.rejected[0].content} == {"A", "B"} for record in records)
    return [record.chosen[0].content for record in records]


@pytest.mark.parametrize(
    ("column", "values", "one", "two"),
    [
        ("preference", [1, 2, 1, "tie"], "output_1", "output_2"),
        ("preference", [1.0, 2.0, 1.0, 1.5], "output_1", "output_2"),
        ("label", ["1", "2", "1"], "response1", "response2"),
        ("winner", ["A", "B", "A", "Tie"], "response_a", "response_b"),
        ("winner", ["a", "b", "a"], "answer_a", "answer_b"),
        ("winner", ["model_a", "model_b", "model_a", "tie (bothbad)", "tie"], "response_a", "response_b"),
        ("winner", ["response_a", "response_b", "response_a", "neither"], "response_a", "response_b"),
        ("preferred", ["first", "second", "first", "both"], "completion_1", "completion_2"),
        ("better_response_id", [0, 1, 0], "response_0", "response_1"),
        ("better_response_id", [0, 0, 0], "response_0", "response_1"),
        ("better", [0, 1, 0, "equal"], "answer_0", "answer_1"),
    ],
)
def test_known_columns_and_codings(column: str, values: list[Any], one: str, two: str) -> None:
    found = winners(versus(column, values, one, two))
    assert found == (["A"] * 3 if values == [0, 0, 0] else ["A", "B", "A"])


def test_the_winners_name() -> None:
    rows = versus("winner", ["gpt", "llama", "GPT", "tie"], "response_a", "response_b", model_a="gpt", model_b="llama")
    rows += versus("winner", ["gpt"], "response_a", "response_b", model_a="llama", model_b="gpt")
    assert winners(rows) == ["A", "B", "A", "B"]
    report = preferences(rows, Source("rows.jsonl"), on_bad_row="skip")[1]
    assert report.remarks() == ["rows.jsonl: verdicts of 'winner': the name in model_a or model_b wins"]


def test_whole_conversations() -> None:
    """LMSYS's arena."""

    def conversation(answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]

    row = {"conversation_a": conversation("A"), "conversation_b": conversation("B"), "model_a": "x", "model_b": "y"}
    rows = [{**row, "winner": winner} for winner in ("model_b", "model_a", "tie (bothbad)")]
    assert winners(rows) == ["B", "A"]
    (prompt, *_) = prompts(rows, Source("r"), on_bad_row="error")[0]
    assert [turn.content for turn in prompt.prompt] == ["q"]


@pytest.mark.parametrize(
    ("columns", "found"),
    [
        ({"verdict": "label"}, ["A", "B"]),
        ({"verdict": "label", "chosen": "output_1", "rejected": "output_2"}, ["A", "B"]),
        ({"verdict": "label", "chosen": "output_2", "rejected": "output_1"}, ["B", "A"]),
        ({"verdict": "label", "first": "output_2", "second": "output_1"}, ["B", "A"]),
        ({"verdict": {"column": "label", "first": 2, "second": 1}}, ["B", "A"]),
        ({"verdict": {"column": "label", "first": [1, "one"], "second": [2, "two"], "tie": 0}}, ["A", "B"]),
        ({"verdict": None, "chosen": "output_2", "rejected": "output_1"}, ["B", "B"]),
    ],
)
def test_as_the_user_says(columns: dict[str, Any], found: list[str]) -> None:
    assert winners(versus("label", [1, 2], "output_1", "output_2"), **columns) == found


def test_zero_and_one_by_the_users_word() -> None:
    rows = versus("labels", [0, 1], "human_ref_A", "human_ref_B")
    columns = {"first": "human_ref_A", "second": "human_ref_B", "verdict": "labels"}
    assert winners(rows, **columns) == ["A", "B"]
    report = preferences(rows, Source("rows.jsonl", columns=columns), on_bad_row="skip")[1]
    assert report.remarks() == ["rows.jsonl: verdicts of 'labels': 0 is the first answer, 1 the second"]
    first_is_one = {**columns, "verdict": {"column": "labels", "first": 1, "second": 0}}  # SHP's
    assert winners(rows, **first_is_one) == ["B", "A"]


def test_a_sign_says_it_with_a_list_of_values() -> None:
    rows = versus("overall_preference", [-3, 2, 0, 1], "response1", "response2")
    codes = {"column": "overall_preference", "first": [-3, -2, -1], "second": [1, 2, 3], "tie": 0}
    assert winners(rows, verdict=codes) == ["A", "B", "B"]
    with pytest.raises(UserError, match=r"the values of 'overall_preference' \(-3, 2, 0, 1\) do not say which of"):
        winners(rows, verdict="overall_preference")


@pytest.mark.parametrize(
    ("column", "values", "one", "two"),
    [
        ("label", [0, 1, 2], "output_1", "output_2"),  # zero of three: a place, or a tie
        ("label", [0, 1], "output_1", "output_2"),  # a place, or whether the first is better
        ("label", [1, 1], "output_1", "output_2"),
        ("winner", [1], "response_a", "response_b"),
        ("winner", [True, False], "response_a", "response_b"),
        ("winner", ["x", "y"], "response_a", "response_b"),
        ("winner", ["tie"], "response_a", "response_b"),
        ("preference", [-2, -1, 1, 2], "output_1", "output_2"),
    ],
)
def test_what_can_be_read_both_ways_is_refused(column: str, values: list[Any], one: str, two: str) -> None:
    with pytest.raises(UserError, match=rf"values of '{column}' \(.*\) do not say .* columns\.verdict: \{{column") as e:
        winners(versus(column, values, one, two))
    assert "\n" not in str(e.value)


def test_codes_must_be_whole_and_plain() -> None:
    rows = versus("label", [1, 2], "output_1", "output_2")
    with pytest.raises(UserError, match=r"columns.verdict must be a column's name or \{column: NAME, first"):
        winners(rows, verdict={"column": "label", "first": 1})
    with pytest.raises(UserError, match=r"columns.verdict: 1 has two meanings"):
        winners(rows, verdict={"column": "label", "first": 1, "second": 1})
    with pytest.raises(UserError, match="columns asks for 'winner', but the file has"):
        winners(rows, verdict={"column": "winner", "first": 1, "second": 2})


def test_bad_verdicts_are_bad_rows_and_ties_are_none() -> None:
    rows = versus("winner", ["A", "B", "tie", None, "tie"], "response_a", "response_b")
    _, report = preferences(rows, Source("rows.jsonl"), on_bad_row="skip")
    assert report.summary() == "rows.jsonl: 2 of 5 rows used; skipped 2 tie (rows 2, 4), 1 null winner (row 3)"
    assert len(preferences(rows[:3], Source("r"), on_bad_row="error")[0]) == 2
    many = versus("winner", ["A", "B"] * 100 + ["?"], "response_a", "response_b")
    assert preferences(many, Source("r"), on_bad_row="skip")[1].counts == {"unknown winner": 1}


@pytest.mark.parametrize("column", ["label", "winner", "preference", "verdict", "better_response_id"])
def test_a_verdict_beside_chosen_and_rejected_is_not_passed_over(column: str) -> None:
    row = {"prompt": "q", "chosen": "A", "rejected": "B", column: 2}
    readers: list[Any] = [preferences, rankings, demonstrations, judged]
    for reader in readers:
        with pytest.raises(UserError, match=rf"'{column}' beside 'chosen' and 'rejected' may say which of them"):
            reader([row], Source("rows.jsonl"), on_bad_row="skip")
    with pytest.raises(UserError, match=f"'{column}' beside 'chosen' and 'rejected'"):
        answered([row], Source("rows.jsonl"))
    mapped = {"prompt": "q", "output_1": "A", "output_2": "B", column: 2}
    with pytest.raises(UserError, match=f"'{column}' beside 'output_1' and 'output_2'"):
        winners([mapped], prompt="prompt", chosen="output_1", rejected="output_2")
    assert winners([row], verdict=None) == ["A"]
    assert winners([row, {**row, column: 1}], verdict=column) == ["B", "A"]
    assert len(prompts([row], Source("r"), on_bad_row="error")[0]) == 1


def test_each_kind_takes_two_answers_with_a_verdict() -> None:
    rows = versus("winner", ["A", "B", "tie"], "response_a", "response_b")
    source = Source("rows.jsonl")
    learned, _ = demonstrations(rows, source, on_bad_row="error")
    assert [record.messages[-1].content for record in learned] == ["A", "B"]
    single, report = judged(rows, source, on_bad_row="error")
    assert [(record.response[0].content, record.desirable) for record in single] == [
        ("A", True), ("B", False), ("B", True), ("A", False),
    ]  # fmt: skip
    assert (report.used, report.total, report.counts) == (4, 6, {"tie": 1})
    lists, _ = rankings(rows, source, on_bad_row="error")
    assert [[answer[0].content for answer in found.answers] for found in lists] == [["A", "B"], ["B", "A"]]
    assert len(prompts(rows, source, on_bad_row="error")[0]) == 3


def test_scores_keep_the_files_order_and_ties() -> None:
    file = answered(versus("winner", ["A", "B", "tie"], "response_a", "response_b"), Source("rows.jsonl"))
    assert file.kind == "list"
    assert all(isinstance(row, Answered) for row in file.rows)
    assert [row.ranks for row in file.rows if isinstance(row, Answered)] == [(0, 1), (1, 0), (0, 0)]
    assert {row.answers[0][0].content for row in file.rows if isinstance(row, Answered)} == {"A"}
