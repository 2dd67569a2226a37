"""Rows of every known shape become records; every bad row is counted under its reason."""

from __future__ import annotations

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from rlhf_lit.data.records import (
    Demonstration,
    Message,
    Preference,
    RowReport,
    Source,
    demonstrations,
    preferences,
    prompts,
    read_rows,
)
from rlhf_lit.errors import UserError

REAL = Path(os.environ.get("RLHF_LIT_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
real_data = pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL} (set RLHF_LIT_DATA)")

SOURCE = Source("rows.jsonl")
INSTRUCTION = {
    "instruction": "Explain quantum computing in simple terms.",
    "response": "Qubits can be 0 and 1 at the same time.",
}
PAIR = {"prompt": "What is 2+2?", "chosen": "2+2 equals 4.", "rejected": "2+2 equals 5."}


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str) -> Message:
    return Message("assistant", text)


def demos(*rows: Any, **options: Any) -> list[Demonstration]:
    return demonstrations(rows, Source("rows.jsonl", **options), on_bad_row="skip")[0]


def pairs(*rows: Any, **options: Any) -> list[Preference]:
    return preferences(rows, Source("rows.jsonl", **options), on_bad_row="skip")[0]


def write(path: Path, text: str) -> Source:
    content = text.encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return Source(str(path))


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl", "rows.json.gz", "rows.jsonl.gz"])
@pytest.mark.parametrize("lines", [True, False])
def test_json_list_or_lines_whatever_the_extension(tmp_path: Path, name: str, lines: bool) -> None:
    rows: list[Any] = [{"a": 1}, {"a": "x\u2028y"}, {"a": [True, None]}, 7]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) if lines else json.dumps(rows, indent=1)
    read = read_rows(write(tmp_path / name, "\ufeff" + text))
    assert read == rows
    assert type(read[0]["a"]) is int
    assert read[2]["a"][0] is True


def test_csv_cells_stay_text(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer"], ["7 × 1?", "007"], ["a\nb", "NA"], ["c"], ["d", "e", "f"]])
    rows = read_rows(Source(str(path)))
    assert rows == [
        {"question": "7 × 1?", "answer": "007"},
        {"question": "a\nb", "answer": "NA"},
        {"question": "c", "answer": None},
        ["d", "e", "f"],
    ]
    records, report = demonstrations(rows, Source(str(path)), on_bad_row="skip")
    assert [r.messages[-1].content for r in records] == ["007", "NA"]
    assert report.counts == {"null answer": 1, "malformed": 1}


def test_parquet_and_text(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "margin": 0.5}]
    Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    assert read_rows(Source(str(tmp_path / "rows.parquet"))) == rows
    text = write(tmp_path / "prompts.txt.gz", "Once upon\r\n\n  \nThe end\n")
    assert read_rows(text) == [{"text": "Once upon"}, {"text": "The end"}]


def test_a_folder_has_the_splits_of_its_files(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", '{"text": "a"}\n{"text": "b"}\n{"text": "c"}\n')
    assert read_rows(Source(str(tmp_path / "folder"), split="train[:2]")) == [{"text": "a"}, {"text": "b"}]
    with pytest.raises(UserError, match=r"has no split 'validation'; its files are train"):
        read_rows(Source(str(tmp_path / "folder"), split="validation"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "no such file: .*gone.jsonl"),
        ("rows.xlsx", "x", "cannot read '.xlsx' files"),
        ("rows.jsonl", '{"a": 1}\n{"a": \n', "rows.jsonl, line 2: not valid JSON"),
        ("rows.json", '[{"a": 1},\n {"a": }]', "rows.json, line 2: not valid JSON"),
        ("rows.json", " \n", "has no rows"),
        ("rows.json", "[]", "has no rows"),
        ("rows.csv", "", "has no rows"),
        ("rows.csv", "question,answer\n", "has no rows"),
        ("rows.parquet", "no parquet", "not a readable Parquet file"),
    ],
)
def test_unreadable_files_end_in_one_line(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    source = Source(str(tmp_path / name)) if content is None else write(tmp_path / name, content)
    with pytest.raises(UserError, match=message) as error:
        read_rows(source)
    assert "\n" not in str(error.value)


def test_broken_gzip_and_bad_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 100)[:-12])
    with pytest.raises(UserError, match=r"a\.jsonl\.gz is not a whole gzip file"):
        read_rows(Source(str(tmp_path / "a.jsonl.gz")))
    (tmp_path / "b.jsonl").write_bytes(b'{"a": "\xff"}')
    with pytest.raises(UserError, match=r"b\.jsonl, line 1: not UTF-8 text \(its byte 7"):
        read_rows(Source(str(tmp_path / "b.jsonl")))


def test_a_local_file_has_no_split_and_no_configuration(tmp_path: Path) -> None:
    source = write(tmp_path / "rows.jsonl", '{"a": 1}')
    with pytest.raises(UserError, match="no split 'test'"):
        read_rows(Source(source.path, split="test"))
    with pytest.raises(UserError, match="configuration 'main'"):
        read_rows(Source(source.path, name="main"))


# --- shapes ------------------------------------------------------------------------------------------------------

CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": " Ho "}]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        (INSTRUCTION, (user(INSTRUCTION["instruction"]), assistant(INSTRUCTION["response"]))),
        ({"instruction": "Spell:", "input": "teh", "output": "the"}, (user("Spell:\n\nteh"), assistant("the"))),
        ({"instruction": "Go", "input": "", "output": "ok"}, (user("Go"), assistant("ok"))),
        ({"instruction": "Go", "input": None, "output": "ok"}, (user("Go"), assistant("ok"))),
        ({"system": "S", "instruction": "Go", "output": "ok"}, (Message("system", "S"), user("Go"), assistant("ok"))),
        ({"prompt": "Once ", "completion": "upon"}, (user("Once "), assistant("upon"))),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, (user("Hi"), assistant(" Ho "))),
        ({"question": "1+1?", "answer": "2"}, (user("1+1?"), assistant("2"))),
        ({"messages": CHAT}, (user("Hi"), assistant(" Ho "))),
        (
            {"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "Hi"},
                               {"from": "gpt", "value": "Ho"}]},
            (Message("system", "S"), user("Hi"), assistant("Ho")),
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "f()"},
                               {"from": "observation", "value": "3"}, {"from": "gpt", "value": "three"}]},
            (user("Hi"), assistant("f()"), Message("tool", "3"), assistant("three")),
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, CHAT[1]]},
         (user("Hi"), assistant(" Ho "))),
        (PAIR, (user("What is 2+2?"), assistant("2+2 equals 4."))),
        ({"text": "Once upon a time"}, (Message("text", "Once upon a time"),)),
    ],
)  # fmt: skip
def test_demonstration_shapes(row: dict[str, Any], turns: tuple[Message, ...]) -> None:
    assert demos(row) == [Demonstration(turns, 0, row)]


ULTRA = {
    "chosen": [*CHAT[:1], {"role": "assistant", "content": "A"}],
    "rejected": [*CHAT[:1], {"role": "assistant", "content": "B"}],
}


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected", "margin"),
    [
        (PAIR, (user("What is 2+2?"),), "2+2 equals 4.", "2+2 equals 5.", 0.0),
        ({**PAIR, "margin": 2}, (user("What is 2+2?"),), "2+2 equals 4.", "2+2 equals 5.", 2.0),
        ({"prompt": CHAT[:1], "chosen": [{"role": "assistant", "content": "A"}], "rejected": "B"},
         (user("Hi"),), "A", "B", 0.0),
        ({"conversations": [{"from": "human", "value": "Hi"}], "chosen": {"from": "gpt", "value": "A"},
          "rejected": {"from": "gpt", "value": "B"}}, (user("Hi"),), "A", "B", 0.0),
        ({"instruction": "Do", "input": "x", "output": "o", "chosen": "A", "rejected": "B"},
         (user("Do\n\nx"),), "A", "B", 0.0),
        ({**ULTRA, "score_chosen": 8.5, "score_rejected": 3}, (user("Hi"),), "A", "B", 5.5),
        ({**ULTRA, "prompt": "Hi", "messages": ULTRA["chosen"]}, (user("Hi"),), "A", "B", 0.0),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " A", "rejected": " B"}, (user("Hi"),), " A", " B", 0.0),
        ({"chosen": "\n\nHuman: a Human: b\nAssistant: c\n\nAssistant: d\n\nAssistant: A",
          "rejected": "\n\nHuman: a Human: b\nAssistant: c\n\nAssistant: d\n\nAssistant: B "},
         (user("a Human: b\nAssistant: c"), assistant("d")), "A", "B", 0.0),
    ],
)  # fmt: skip
def test_preference_shapes(
    row: dict[str, Any], prompt: tuple[Message, ...], chosen: str, rejected: str, margin: float
) -> None:
    assert pairs(row) == [Preference(prompt, (assistant(chosen),), (assistant(rejected),), margin, 0, row)]


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"prompt": "Go"}, (user("Go"),)),
        ({"prompt": CHAT[:1]}, (user("Hi"),)),
        ({"instruction": "Do", "input": "x"}, (user("Do\n\nx"),)),
        ({"question": "1+1?", "answer": "2"}, (user("1+1?"),)),
        ({"question": "1+1?", "answer": None}, (user("1+1?"),)),
        ({"messages": CHAT}, (user("Hi"),)),
        ({"messages": CHAT[:1]}, (user("Hi"),)),
        (ULTRA, (user("Hi"),)),
        ({"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: ", "rejected": ""},
         (user("a"), assistant("b"), user("c"))),
        ({"text": "Once upon"}, (user("Once upon"),)),
    ],
)  # fmt: skip
def test_prompt_shapes(row: dict[str, Any], turns: tuple[Message, ...]) -> None:
    (record,) = prompts([row], SOURCE, on_bad_row="skip")[0]
    assert record.prompt == turns
    assert record.source is row


def test_other_names_through_columns() -> None:
    row = {"question": "Q", "response_j": "A", "response_k": "B", "answer": "not this"}
    mapping = {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}
    (record,) = pairs(row, columns=mapping)
    assert (record.prompt, record.chosen, record.rejected) == ((user("Q"),), (assistant("A"),), (assistant("B"),))
    assert record.source == {**row, **{ours: row[theirs] for ours, theirs in mapping.items()}}
    with pytest.raises(UserError, match=r"columns names 'promt', which is none of .*prompt"):
        pairs(row, columns={"promt": "question"})
    with pytest.raises(UserError, match="columns asks for 'q', but the file has answer, question"):
        pairs(row, columns={"prompt": "q"})


@pytest.mark.parametrize("read", [demonstrations, preferences, prompts])
def test_no_known_shape(read: Any) -> None:
    with pytest.raises(UserError, match=r"columns body, title have no known shape of .*`columns`"):
        read([{"title": "t", "body": "b"}], SOURCE, on_bad_row="skip")


# --- bad rows ----------------------------------------------------------------------------------------------------

BAD = [(None, "null"), ("", "empty"), (" \n\t", "empty"), (5, "non-text"), (True, "non-text"), (1.5, "non-text")]


@pytest.mark.parametrize(("value", "reason"), BAD)
@pytest.mark.parametrize("column", ["instruction", "response"])
def test_bad_instruction_rows(column: str, value: Any, reason: str) -> None:
    rows = [INSTRUCTION, {**INSTRUCTION, column: value}, INSTRUCTION]
    records, report = demonstrations(rows, SOURCE, on_bad_row="skip")
    assert [r.row for r in records] == [0, 2]
    assert report.counts == {f"{reason} {column}": 1}
    with pytest.raises(UserError, match=rf"^rows\.jsonl, row 1: {reason} {column}; mend the row"):
        demonstrations(rows, SOURCE, on_bad_row="error")


@pytest.mark.parametrize(("value", "reason"), BAD)
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_bad_preference_rows(column: str, value: Any, reason: str) -> None:
    rows = [PAIR, {**PAIR, column: value}]
    records, report = preferences(rows, SOURCE, on_bad_row="skip")
    assert [r.row for r in records] == [0]
    assert report.counts == {f"{reason} {column}": 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "malformed"),
        ({}, "null messages"),
        ({"messages": []}, "empty messages"),
        ({"messages": "Hi"}, "non-message messages"),
        ({"messages": ["Hi"]}, "non-message messages"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": None}]}, "null message in messages"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": 4}]}, "non-text message in messages"),
        ({"messages": [CHAT[0], {"role": "assistant", "content": " "}]}, "empty response"),
        ({"messages": [CHAT[0], {"role": "narrator", "content": "x"}]}, "unknown role"),
        ({"messages": [CHAT[0], {"content": "x"}]}, "unknown role"),
        ({"messages": [CHAT[0]]}, "no final assistant turn"),
        ({"messages": [*CHAT, CHAT[0]]}, "no final assistant turn"),
        ({"messages": [CHAT[0], *CHAT]}, "roles do not alternate"),
        ({"messages": [*CHAT, CHAT[1]]}, "roles do not alternate"),
        ({"messages": [*CHAT, {"role": "system", "content": "x"}, *CHAT]}, "roles do not alternate"),
    ],
)
def test_bad_conversations(row: Any, reason: str) -> None:
    records, report = demonstrations([{"messages": CHAT}, row], SOURCE, on_bad_row="skip")
    assert len(records) == 1
    assert report.counts == {reason: 1}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({**PAIR, "rejected": PAIR["chosen"]}, "chosen equals rejected"),
        ({**PAIR, "margin": "much"}, "non-number margin"),
        ({**PAIR, "margin": 10**400}, "non-number margin"),
        ({**PAIR, "margin": 1e39}, "non-number margin"),
        ({**PAIR, "margin": -0.5}, "margin below 0"),
        ({**PAIR, "score_chosen": 1, "score_rejected": 5}, "chosen and scores disagree"),
        ({**PAIR, "margin": float("nan")}, "non-number margin"),
        ({**PAIR, "chosen": [CHAT[0]], "rejected": [CHAT[0]]}, "no final assistant turn"),
        ({**ULTRA, "rejected": [{"role": "user", "content": "Other"}, CHAT[1]]}, "prompts differ"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: A", "rejected": "plain text"}, "no 'Human:' turn in rejected"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: A", "rejected": "\n\nHuman: a\n\nAssistant: \n"}, "empty rejected"),
        ({"chosen": "\n\nHuman: a\n\nAssistant: A", "rejected": "\n\nHuman: a"}, "no final assistant turn"),
        ({"chosen": "\n\nAssistant: A", "rejected": "\n\nAssistant: B"}, "empty prompt"),
    ],
)
def test_bad_pairs(row: dict[str, Any], reason: str) -> None:
    with pytest.raises(
        UserError, match=rf"no usable row in rows\.jsonl: rows\.jsonl: 0 of 1 rows used; skipped 1 {reason}"
    ):
        pairs(row)


def test_limit_counts_usable_rows() -> None:
    rows = [{**PAIR, "prompt": None}, PAIR, {**PAIR, "prompt": None}, PAIR, PAIR]
    records, report = preferences(rows, Source("rows.jsonl", limit=2), on_bad_row="skip")
    assert [r.row for r in records] == [1, 3]
    assert report.summary() == "rows.jsonl: 2 of 4 rows used; skipped 2 null prompt (rows 0, 2)"
    with pytest.raises(UserError, match="limit must be at least 1"):
        pairs(PAIR, limit=0)


def test_report_names_the_first_rows() -> None:
    report = RowReport("f.jsonl", total=20, used=13)
    for row in range(6):
        report.skip("empty chosen", row)
    report.skip("prompts differ", 9)
    report.drop("too long", 11)
    assert report.summary() == (
        "f.jsonl: 12 of 20 rows used; skipped 6 empty chosen (rows 0, 1, 2, 3, 4, …), 1 prompts differ (row 9), "
        "1 too long (row 11)"
    )


# --- real files --------------------------------------------------------------------------------------------------


@real_data
def test_hh_rows_are_all_accounted_for() -> None:
    source = Source(str(REAL / "hh_harmless_test" / "test.jsonl.gz"))
    rows = read_rows(source)
    records, report = preferences(rows, source, on_bad_row="skip")
    assert report.summary() == (
        "test.jsonl.gz: 2303 of 2312 rows used; skipped 4 empty chosen (rows 86, 516, 925, 1103), "
        "5 prompts differ (rows 1254, 1688, 1950, 1952, 2036)"
    )
    assert max(len(r.prompt) + 1 for r in records) == 36
    for record in records:  # nothing of the text is lost but white space and the turn markers
        turns = "".join(m.content for m in (*record.prompt, *record.chosen))
        marked = rows[record.row]["chosen"].replace("\n\nHuman:", "").replace("\n\nAssistant:", "")
        assert "".join(turns.split()) == "".join(marked.split())
    assert len(prompts(rows, source, on_bad_row="error")[0]) == 2312


@real_data
def test_identical_answers_are_found() -> None:
    source = Source(str(REAL / "rasbt_llm_book" / "instruction-data-with-preference.json"))
    rows = read_rows(source)
    records, report = preferences(rows, source, on_bad_row="skip")
    assert report.counts == {"chosen equals rejected": 6}
    assert sorted(set(range(1100)) - {r.row for r in records}) == [122, 226, 400, 566, 628, 676]


@real_data
@pytest.mark.parametrize(
    ("path", "read", "count", "columns"),
    [
        ("rasbt_llm_book/instruction-data.json", demonstrations, 1100, {}),
        ("llamafactory_demo/alpaca_zh_demo.json", demonstrations, 1000, {}),
        ("llamafactory_demo/glaive_toolcall_en_demo.json", demonstrations, 300, {}),
        ("llamafactory_demo/dpo_en_demo.json", preferences, 300, {}),
        ("llamafactory_demo/v1_dpo_demo.jsonl", preferences, 10,
         {"chosen": "chosen_messages", "rejected": "rejected_messages"}),
        ("torchtune_fixtures/stack_exchange_paired_tiny.json", preferences, 25,
         {"prompt": "question", "chosen": "response_j", "rejected": "response_k"}),
        ("fastchat/dummy_conversation.json", demonstrations, 500, {}),
        ("gsm8k/test.jsonl", prompts, 1319, {}),
        ("ifeval/input_data.jsonl", prompts, 541, {}),
    ],
)  # fmt: skip
def test_real_files_load_whole(path: str, read: Any, count: int, columns: dict[str, str]) -> None:
    source = Source(str(REAL / path), columns=columns)
    assert len(read(read_rows(source), source, on_bad_row="error")[0]) == count
