"""Fields of messages, numbers that judge, what stands around nested rows, and numbers that are names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_lit.data.answered import Unusable, answered
from rlhf_lit.data.modules import PreferenceDataModule, SFTDataModule, UnpairedDataModule
from rlhf_lit.data.records import Source
from rlhf_lit.data.rows import Unreadable
from rlhf_lit.data.sources import read_rows
from tests.unit.data.chats import CHATML, small
from tests.unit.data.test_modules import ready

USER = {"role": "user", "content": "1+1?"}
PAIR = {"prompt": "1+1?", "chosen": "2", "rejected": "3"}
THINKING = CHATML.replace("{{m['content']", "{{m.reasoning_content or ''}}{{m['content']")


def written(path: Path, rows: list[Any], **options: Any) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path), **options)


@pytest.mark.parametrize(
    ("template", "field", "said"),
    [
        (CHATML, "reasoning_content", "reasoning_content of messages"),
        (CHATML, "thinking", "thinking of messages"),
        (THINKING, "reasoning_content", None),
        (THINKING, "thinking", None),  # transformers gives it both names
        (CHATML, "annotations", "annotations of messages"),
        (CHATML, "name", None),
    ],
)
def test_fields_of_messages_that_are_not_learned_are_named(
    tmp_path: Path, template: str, field: str, said: str | None
) -> None:
    rows = [{"messages": [USER, {"role": "assistant", "content": "2", field: "one and one"}]}]
    module = ready(SFTDataModule(written(tmp_path / "a.jsonl", rows), cache=None), own=small(template))
    assert module.reports["train"].unused == ({said} if said else set())
    text = small().decode(list(module.examples["train"][0]["tokens"]))
    assert ("one and one" in text) == (template is THINKING)


@pytest.mark.parametrize("column", ["chosen_score", "rejected-rating", "weight", "safer_response_id", "reward"])
def test_numbers_that_judge_or_weigh_are_named(tmp_path: Path, column: str) -> None:
    source = written(tmp_path / "a.jsonl", [{**PAIR, column: 0, "id": 7}, {**PAIR, column: None}])
    module = ready(PreferenceDataModule(source, cache=None), own=small(CHATML))
    assert module.reports["train"].unused == {column}


def test_an_empty_cell_is_a_null_margin(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,chosen,rejected,margin\na,b,c,\nd,e,f,2\n")
    module = ready(PreferenceDataModule(Source(str(tmp_path / "a.csv")), cache=None), own=small(CHATML))
    assert [row["margin"] for row in module.examples["train"]] == [0.0, 2.0]


def test_what_stands_around_nested_rows_is_named_and_can_be_mapped(tmp_path: Path) -> None:
    tasks = [{"instruction": "Add.", "tags": ["x"], "instances": [{"input": "1 1", "output": "2"}]}]
    columns = {"rows": "instances", "instruction": "../instruction"}
    module = ready(SFTDataModule(written(tmp_path / "a.jsonl", tasks, columns=columns), cache=None), own=small(CHATML))
    assert "Add.\n\n1 1" in small().decode(list(module.examples["train"][0]["tokens"]))
    (tmp_path / "b.json").write_text(
        json.dumps({"version": 2, "data": [{"context": "C", "qas": [{"question": "Q", "answer": "A"}]}]})
    )
    source = Source(str(tmp_path / "b.json"), columns={"rows": "data.qas"})
    assert read_rows(source) == [{"../../version": 2, "../context": "C", "question": "Q", "answer": "A"}]
    assert ready(SFTDataModule(source, cache=None), own=small(CHATML)).reports["train"].unused == {"../context"}


LABELLED = [{"prompt": f"{i}?", "completion": "a", "label": name} for i, name in enumerate(["bad", "good", "good"])]


def test_numbers_that_datasets_wrote_for_names(tmp_path: Path) -> None:
    """Zero is good here: read as numbers, every label would be turned round."""
    from datasets import ClassLabel, Dataset

    data = Dataset.from_list(LABELLED).cast_column("label", ClassLabel(names=["good", "bad"]))
    data.save_to_disk(str(tmp_path / "saved"))
    data.to_parquet(str(tmp_path / "rows.parquet"))
    table = parquet.read_table(tmp_path / "rows.parquet")
    for name, opened in (("file", pa.ipc.new_file), ("stream", pa.ipc.new_stream)):
        with opened(str(tmp_path / f"{name}.arrow"), table.schema) as out:
            out.write_table(table)
    for name in ("saved", "rows.parquet", "file.arrow", "stream.arrow"):
        source = Source(str(tmp_path / name))
        assert read_rows(source) == LABELLED, name
        module = ready(UnpairedDataModule(source, cache=None), own=small(CHATML))
        assert [row["desirable"] for row in module.examples["train"]] == [False, True, True], name


def test_a_row_that_could_not_be_parsed_is_scored_as_none_of_its_own_fields() -> None:
    file = answered([PAIR, Unreadable("nested too deep"), "text"], Source("a.jsonl"))
    assert file.rows[1:] == [Unusable("nested too deep", 1, {}), Unusable("malformed", 2, {"text": "text"})]


ASKED = [USER, {"role": "assistant", "content": "2"}]
OTHER = [USER, {"role": "assistant", "content": "3"}]
SYSTEM = {"role": "system", "content": "S"}


def shown(row: dict[str, Any], field: str = "tokens") -> str:
    return small().decode(list(row[field])).replace("<|im_start|>", "").replace("<|im_end|>", "")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system": "S", "messages": [SYSTEM, *ASKED]}, "system\nS\nuser\n1+1?\nassistant\n2"),
        ({"system": "T", "messages": [SYSTEM, *ASKED]}, "system\nT\nsystem\nS\nuser\n1+1?\nassistant\n2"),
        ({"prompt": "1+1?", "completion": ASKED}, "user\n1+1?\nassistant\n2"),
        ({"prompt": [USER], "completion": ASKED}, "user\n1+1?\nassistant\n2"),
        ({"prompt": "Why?", "completion": ASKED}, "prompt differs from that of the dialogue"),
        ({"prompt": "Why?", "completion": [ASKED[1], ASKED[1]]}, "roles do not alternate"),
    ],
)
def test_what_a_row_says_twice_is_learned_once(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    rows = [row, {**row, "completion": "2"}]  # one that serves
    module = ready(SFTDataModule(written(tmp_path / "a.jsonl", rows), cache=None), own=small(CHATML))
    counts = module.reports["train"].counts
    assert counts == {expected: 1} if counts else shown(module.examples["train"][0]) == expected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"system": "T", "chosen": [SYSTEM, *ASKED], "rejected": [SYSTEM, *OTHER]}, "system\nT\nsystem\nS\nuser\n1+1?"),
        ({"system": "S", "chosen": [SYSTEM, *ASKED], "rejected": [SYSTEM, *OTHER]}, "system\nS\nuser\n1+1?"),
        (
            {
                "prompt": "\n\nHuman: 1+1?\n\nAssistant:",
                "chosen": "\n\nHuman: 1+1?\n\nAssistant: 2",
                "rejected": "\n\nHuman: 1+1?\n\nAssistant: 3",
            },
            "user\n1+1?",
        ),
    ],
)
def test_dialogues_beside_their_prompt_or_system_turn(tmp_path: Path, row: dict[str, Any], expected: str) -> None:
    module = ready(PreferenceDataModule(written(tmp_path / "a.jsonl", [row]), cache=None), own=small(CHATML))
    (found,) = module.examples["train"]
    assert shown(found, "chosen") == f"{expected}\nassistant\n2"
    assert shown(found, "rejected") == f"{expected}\nassistant\n3"


@pytest.mark.parametrize("prompt", [[USER], "\n\nHuman: 1+1?\n\nAssistant:"])
@pytest.mark.parametrize("beside", [{"history": [["0+0?", "0"]]}, {"input": "as a word"}])
def test_what_has_no_place_beside_a_dialogue_is_named(tmp_path: Path, prompt: Any, beside: dict[str, Any]) -> None:
    source = written(tmp_path / "a.jsonl", [{"prompt": prompt, "completion": "2", **beside}])
    module = ready(SFTDataModule(source, cache=None), own=small(CHATML))
    assert module.reports["train"].unused == set(beside)
    source = written(tmp_path / "b.jsonl", [{"prompt": "1+1?", "chosen": ASKED, "rejected": OTHER, **beside}])
    module = ready(PreferenceDataModule(source, cache=None), own=small(CHATML))
    assert module.reports["train"].unused == set(beside)
