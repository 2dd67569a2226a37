"""What the user says in `columns` comes before every guess, and nothing that a file says is passed over in silence."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_lit.data.answered import answered
from rlhf_lit.data.modules import PreferenceDataModule, SFTDataModule
from rlhf_lit.data.readers import preference_reader
from rlhf_lit.data.records import (
    Message,
    Source,
    demonstration_reader,
    demonstrations,
    judged,
    preferences,
    prompt_reader,
    prompts,
    rankings,
)
from rlhf_lit.data.rows import Unreadable
from rlhf_lit.errors import UserError
from rlhf_lit.models.base import PLAYGROUND

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def mapped(**columns: Any) -> Source:
    return Source("rows.jsonl", columns=columns)


def said(reader: Any, *rows: Any, **columns: Any) -> list[list[str]]:
    """The texts of each record, prompt and answers."""
    records, _ = reader(rows, mapped(**columns), on_bad_row="error")
    fields = ("messages", "prompt", "response", "chosen", "rejected")
    return [
        [turn.content for name in fields for turn in getattr(record, name, ())]
        + [turn.content for turns in getattr(record, "answers", ()) for turn in turns]
        for record in records
    ]


# --- the user's word -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reader", "row", "columns", "texts"),
    [
        (demonstrations, {"question": "Q", "output": "OLD", "fixed": "NEW"}, {"answer": "fixed"}, ["Q", "NEW"]),
        (demonstrations, {"question": "Q", "answer": "OLD", "fixed": "NEW"}, {"answer": "fixed"}, ["Q", "NEW"]),
        (demonstrations, {"instruction": "META", "problem": "1+1?", "output": "2"}, {"question": "problem"},
         ["1+1?", "2"]),
        (demonstrations, {"messages": CHAT, "p": "P", "c": "C"}, {"prompt": "p", "completion": "c"}, ["P", "C"]),
        (demonstrations, {"messages": CHAT, "old": [*CHAT[:1], {"role": "assistant", "content": "OLD"}]},
         {"conversations": "old"}, ["hi", "OLD"]),
        (demonstrations, {"prompt": "p", "completion": "c", "body": "T"}, {"text": "body"}, ["T"]),
        (prompts, {"instruction": "META", "problem": "1+1?"}, {"question": "problem"}, ["1+1?"]),
        (prompts, {"messages": CHAT, "problem": "1+1?"}, {"prompt": "problem"}, ["1+1?"]),
        (preferences, {"instruction": "META", "q": "Q", "chosen": "A", "rejected": "B", "best": "C"},
         {"prompt": "q", "chosen": "best"}, ["Q", "C", "B"]),
        (judged, {"instruction": "META", "q": "Q", "output": "OLD", "fixed": "NEW", "label": 1},
         {"prompt": "q", "answer": "fixed"}, ["Q", "NEW"]),
        (rankings, {"prompt": "META", "q": "Q", "answers": ["x", "y"], "options": ["a", "b"], "ranks": [1, 2]},
         {"question": "q", "responses": "options"}, ["Q", "a", "b"]),
    ],
)  # fmt: skip
def test_a_mapped_column_comes_before_every_guess(
    reader: Any, row: dict[str, Any], columns: dict[str, str], texts: list[str]
) -> None:
    assert said(reader, row, **columns) == [texts]


def test_a_mapped_column_comes_first_for_scores_too() -> None:
    row = {"question": "Q", "output": "OLD", "fixed": "NEW"}
    file = answered([row], mapped(answer="fixed"))
    assert file.rows[0].answers == ((Message("assistant", "NEW"),),)  # type: ignore[union-attr]
    assert file.rows[0].source is row, "a line of the scores is the file's own row"
    assert file.unused == {"output"}


def test_rewards_know_a_row_by_our_names_too() -> None:
    row = {"question": "Q", "answer": "OLD", "gold": "NEW"}
    (record,) = prompts([row], mapped(answer="gold"), on_bad_row="error")[0]
    assert record.source == {"question": "Q", "answer": "NEW", "gold": "NEW"}


def test_a_mapping_that_cannot_be_kept_is_refused() -> None:
    pair = {"a": "q", "b": "q", "output": "x"}
    with pytest.raises(UserError, match="columns names both 'prompt' and 'question', which are one part of a row"):
        said(demonstrations, pair, question="a", prompt="b")
    with pytest.raises(UserError, match=r"columns names 'input', which has no part in rows of messages"):
        said(demonstrations, {"messages": CHAT, "extra": "x"}, input="extra")
    with pytest.raises(UserError, match=r"columns\.answer must be the name of a column, not 3"):
        said(demonstrations, pair, answer=3)
    said(demonstrations, {**pair, "examples": "x"}, question="a", rows="examples")  # where the file's rows are


@pytest.mark.parametrize(
    ("asked", "row", "prompt"),
    [
        ("Q", {"prompt": "Q"}, "Q"),
        ("a question of one's own", {"q": "a question of one's own"}, None),
    ],
)
def test_a_mapped_prompt_beside_whole_dialogues_must_be_theirs(asked: str, row: dict[str, Any], prompt: Any) -> None:
    sides = {
        side: [{"role": "user", "content": "Q"}, {"role": "assistant", "content": side}]
        for side in ("chosen", "rejected")
    }
    (name,) = row
    good = {**row, name: "Q", **sides}
    records, report = preferences([good, {**row, **sides}], mapped(prompt=name), on_bad_row="skip")
    assert records[0].prompt == (Message("user", "Q"),)
    assert report.counts == ({} if prompt else {"prompt differs from that of the dialogues": 1})


# --- numbers and templates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("value", "text"), [(8.0, "8.0"), (7, "7"), (True, "true"), (-0.5, "-0.5"), ("8.50", "8.50")])
def test_numbers_are_text_where_the_user_says_so(value: Any, text: str) -> None:
    assert said(demonstrations, {"prompt": "q", "value": value}, answer="value") == [["q", text]]
    if not isinstance(value, str):
        rows = [{"prompt": "q", "answer": value}, {"prompt": "q", "answer": "x"}]
        _, report = demonstrations(rows, mapped(), on_bad_row="skip")
        assert report.counts == {"non-text answer": 1}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), [1], None])
def test_other_values_are_not(value: Any) -> None:
    rows = [{"prompt": "q", "value": value}, {"prompt": "q", "value": 1}]
    _, report = demonstrations(rows, mapped(answer="value"), on_bad_row="skip")
    assert sum(report.counts.values()) == 1
    assert next(iter(report.counts)).endswith(" answer")


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{question}\n{options}", "Which?\nfour\nfive"),
        ("{question}\n{options:letters}", "Which?\nA. four\nB. five"),
        ("{context}{question} {{n}} = {n}", "Which? {n} = 4.0"),
        ("{by_name}", "A. four\nB. 5"),
        ("{arc}", "1. four\n2. five"),
    ],
)
def test_a_template_over_several_columns(template: str, text: str) -> None:
    row = {
        "question": "Which?", "options": ["four", "five"], "context": "", "n": 4.0, "by_name": {"A": "four", "B": 5},
        "arc": {"text": ["four", "five"], "label": ["1", "2"]},
    }  # fmt: skip
    assert said(prompts, row, prompt=template) == [[text]]


def test_templates_that_cannot_be_filled() -> None:
    row = {"question": "q", "options": ["a"]}
    with pytest.raises(UserError, match=r"columns.prompt has \{qestion\}, but the file has options, question"):
        said(prompts, row, prompt="{qestion}\n{options}")
    with pytest.raises(UserError, match=r"columns\.prompt is no template: .* \(a brace of the text itself"):
        said(prompts, row, prompt="{question}\n{options")
    with pytest.raises(UserError, match="may only be followed by :letters"):
        said(prompts, row, prompt="{question:>10}")
    with pytest.raises(UserError, match=r"columns.messages cannot be a template over columns"):
        said(prompts, row, messages="{question}\n{options}")
    rows = [row, {**row, "options": None}, {**row, "options": [["a"]]}]
    _, report = prompts(rows, mapped(prompt="{question}\n{options}"), on_bad_row="skip")
    assert report.counts == {"null options": 1, "non-text options": 1}


# --- one shape to a file ---------------------------------------------------------------------------------------------

GOOD = {"prompt": "q", "completion": "a"}


@pytest.mark.parametrize(
    ("stray", "reason"),
    [
        ({"messages": CHAT}, "null prompt"),
        ({"chosen": "a", "rejected": "b"}, "null prompt"),
        ({"text": "t"}, "null prompt"),
        ({"instruction": "i", "output": "o"}, "null prompt"),
        (Unreadable("not valid JSON"), "not valid JSON"),
        ([1, 2], "malformed"),
    ],
)
def test_a_stray_row_is_one_bad_row(stray: Any, reason: str) -> None:
    for rows in ([stray, *[GOOD] * 4], [*[GOOD] * 4, stray]):
        records, report = demonstrations(rows, Source("rows.jsonl"), on_bad_row="skip")
        assert len(records) == 4
        assert report.counts == {reason: 1}
        assert report.first_rows == {reason: [rows.index(stray)]}


def test_columns_without_anything_in_them_do_not_vote() -> None:
    """A table has all columns in every row."""
    rows = [{"messages": None, "text": "", **GOOD}] * 3
    assert said(demonstrations, *rows) == [["q", "a"]] * 3


def test_a_mapped_column_wins_where_most_rows_have_nothing_in_it() -> None:
    rows = [{"prompt": "q", "output": "OLD", "fixed": "NEW"}, *[{"prompt": "q", "output": "OLD", "fixed": None}] * 4]
    records, report = demonstrations(rows, mapped(answer="fixed"), on_bad_row="skip")
    assert [record.messages[-1].content for record in records] == ["NEW"]
    assert report.counts == {"null answer": 4}
    rows = [{"context": "", "question": "q", "instruction": "META"}] * 4 + [{"context": "c", "question": "q"}]
    assert said(prompts, *rows, prompt="{context} {question}") == [[" q"]] * 4 + [["c q"]]


def test_readers_can_be_sent_to_a_process() -> None:
    row = {"q": "Q", "a": "A", "b": "B", "who": "b"}
    columns = {"prompt": "q", "first": "a", "second": "b", "verdict": "who"}
    reader = pickle.loads(pickle.dumps(preference_reader([row, {**row, "who": "a"}], mapped(**columns))))
    (pair,) = reader.read(row, 3)
    assert (pair.chosen[0].content, pair.row) == ("B", 3)


def test_bad_values_are_bad_rows() -> None:
    rows = [GOOD, {**GOOD, "prompt": "a\ud800"}, {**GOOD, "completion": "\udc00b"}, Unreadable("nested too deeply")]
    records, report = demonstrations(rows, Source("rows.jsonl"), on_bad_row="skip")
    assert len(records) == 1
    assert report.counts == {
        "lone surrogate in prompt": 1, "lone surrogate in completion": 1, "nested too deeply": 1,
    }  # fmt: skip
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    rows = [{**pair, "margin": 1}, {**pair, "margin": 10**400}, {**pair, "margin": "9" * 400}]
    assert preferences(rows, Source("r"), on_bad_row="skip")[1].counts == {"non-number margin": 2}
    ranked = {"prompt": "q", "answers": ["a", "b"], "scores": [1, 2]}
    rows = [ranked, {**ranked, "scores": [10**400, 1]}]
    assert rankings(rows, Source("r"), on_bad_row="skip")[1].counts == {"non-number scores": 1}


# --- margins ---------------------------------------------------------------------------------------------------------


def test_a_null_margin_counts_where_margins_are_read() -> None:
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for rows in (
        [{**pair, "margin": 2}, {**pair, "margin": None}],
        [{**pair, "score_chosen": 3, "score_rejected": 1}, {**pair, "score_chosen": 3, "score_rejected": None}],
    ):
        records, report = preferences(rows, Source("r"), on_bad_row="error")
        assert [record.margin for record in records] == [2.0, 0.0]
        lists, _ = rankings(rows, Source("r"), on_bad_row="error")
        assert [record.ratings for record in lists] == [(2.0, 0.0), (0.0, 0.0)]
        for reader in (preferences, rankings):
            records, report = reader(rows, Source("r"), on_bad_row="skip", margins=True)  # type: ignore[operator]
            assert [record.row for record in records] == [0]
            assert sum(report.counts.values()) == 1


# --- what was not used -----------------------------------------------------------------------------------------------


def test_columns_that_were_not_used_are_named_once() -> None:
    rows = [
        {**GOOD, "context": "c", "notes": "", "count": 3, "tags": [], "system_prompt": None},
        {**GOOD, "context": "d", "notes": "n", "count": 4, "tags": ["x"], "label": False},
    ]
    _, report = demonstrations(rows, Source("rows.jsonl"), on_bad_row="skip")
    assert report.summary() == "rows.jsonl: 2 of 2 rows used"
    assert report.remarks() == ["rows.jsonl: columns that were not used: context, label, notes, tags"]
    _, report = demonstrations(rows, mapped(system="notes", input="context"), on_bad_row="skip")
    assert report.unused == {"label", "tags"}


def test_what_is_used_is_not_named() -> None:
    row = {"instruction": "i", "input": "x", "history": [["a", "b"]], "system": "s", "output": "o", "tools": "[]"}
    reader = demonstration_reader([row], Source("r"))
    assert reader.unused(row) == set()
    assert reader.unused({**row, "extra": {"a": ["b"]}}) == {"extra"}
    chat = demonstration_reader([{"messages": CHAT}], Source("r"))
    assert chat.unused({"messages": CHAT, "history": [["a", "b"]], "input": "x"}) == {"history", "input"}


def test_of_prompts_only_what_may_belong_to_them_is_named() -> None:
    row = {"question": "q", "answer": "a", "chosen": "c", "context": "x", "gold": "g"}
    assert prompt_reader([row], mapped(label="gold")).unused(row) == {"context"}
    _, report = prompts([row], mapped(label="gold"), on_bad_row="error")
    assert report.remarks() == ["rows.jsonl: columns that are no part of a prompt, for rewards alone: context"]


# --- through the data modules ----------------------------------------------------------------------------------------


def set_up(module: Any, tmp_path: Path, rows: list[Any], **columns: Any) -> Any:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = module(train=Source(str(tmp_path / "rows.jsonl"), columns=columns), cache=None, template="plain")
    algorithm = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(PLAYGROUND))
    data.trainer = SimpleNamespace(lightning_module=algorithm, global_rank=0, world_size=1)
    data.setup("fit")
    return data


def test_a_data_module_learns_what_the_mapping_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"question": "what is 1 plus 1?", "output": "three", "fixed": "two", "notes": "n"}
    data = set_up(SFTDataModule, tmp_path, [row], answer="fixed")
    (batch,) = data.batches_in_order(1)
    tokens = batch.sequences.tokens[0]
    assert data.chat.tokenizer.decode(tokens[batch.sequences.mask[0]], skip_special_tokens=True).strip() == "two"
    assert "train: rows.jsonl: columns that were not used: notes, output\n" in capsys.readouterr().err


def test_a_data_module_turns_pairs_by_their_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"input": "what is 1 plus 1?", "output_1": "three", "output_2": "two"}
    rows = [{**row, "label": 2}, {**row, "label": 1}, {**row, "label": "tie"}]
    data = set_up(PreferenceDataModule, tmp_path, rows, prompt="input", verdict="label")
    (batch,) = data.batches_in_order(2)
    chosen = [
        data.chat.tokenizer.decode(tokens[mask], skip_special_tokens=True).strip()
        for tokens, mask in zip(batch.chosen.tokens, batch.chosen.mask, strict=True)
    ]
    assert chosen == ["two", "three"]
    said = capsys.readouterr().err
    assert "train: rows.jsonl: 2 of 3 rows used; skipped 1 tie (row 2)\n" in said
    assert "train: rows.jsonl: verdicts of 'label': 1 is the first answer, 2 the second\n" in said
