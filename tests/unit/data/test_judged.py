"""Answers judged one by one: rows of every shape, and the mismatched answers that KTO's z is estimated from."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_lit.batches import UnpairedBatch
from rlhf_lit.data.mismatch import MismatchedRows
from rlhf_lit.data.modules import PreferenceDataModule, UnpairedDataModule
from rlhf_lit.data.records import Message, Source, judged, preferences, read_rows
from rlhf_lit.data.store import ArrowRows, record_batch, schema_of
from rlhf_lit.errors import UserError
from rlhf_lit.models.base import PLAYGROUND

REAL = Path(os.environ.get("RLHF_LIT_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
GOOD = {"prompt": "1+1?", "completion": "2", "label": True}


def read(*rows: Any, **options: Any) -> tuple[list[Any], Any]:
    return judged(rows, Source("rows.jsonl", **options), on_bad_row="skip")


@pytest.mark.parametrize(
    ("label", "desirable"),
    [
        (True, True),
        (False, False),
        (1, True),
        (0, False),
        ("true", True),
        ("False", False),
        (" 1 ", True),
        ("0", False),
        (1.0, True),
        (-1, False),
        ("1.0", True),
        ("0.0", False),
        ("yes", True),
        ("No", False),
        ("desirable", True),
        ("undesirable", False),
        ("good", True),
        ("bad", False),
    ],
)
def test_labels_as_files_have_them(label: Any, desirable: bool) -> None:
    (record,), _ = read({**GOOD, "label": label})
    assert record.desirable is desirable
    assert record.prompt == (Message("user", "1+1?"),)
    assert record.response == (Message("assistant", "2"),)


@pytest.mark.parametrize(
    ("label", "reason"),
    [(None, "null label"), ("maybe", "non-boolean label"), (2, "non-boolean label"), ([], "non-boolean label")],
)
def test_other_labels_are_counted(label: Any, reason: str) -> None:
    found, report = read(GOOD, {**GOOD, "label": label})
    assert len(found) == 1
    assert report.counts == {reason: 1}
    assert report.first_rows == {reason: [1]}


def test_the_shapes() -> None:
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    chat = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
    for row in (
        {"messages": turns, "label": True},
        {"conversations": chat, "label": True},
        {"instruction": "1+1?", "input": "", "output": "2", "label": True},
        {"question": "1+1?", "answer": "2", "label": True},
        {"prompt": turns[:1], "completion": turns[1:], "label": True},
    ):
        (record,), _ = read(row)
        assert (record.prompt, record.response) == ((Message("user", "1+1?"),), (Message("assistant", "2"),))
    (record,), _ = read({"prompt": "1+1?", "completion": "2", "kto_tag": "false"}, columns={"label": "kto_tag"})
    assert record.desirable is False


def test_a_pair_is_two_answers() -> None:
    found, report = read(
        {"prompt": "1+1?", "chosen": "2", "rejected": "3"}, {"prompt": "", "chosen": "2", "rejected": "3"}
    )
    assert [(record.response[0].content, record.desirable, record.row) for record in found] == [
        ("2", True, 0),
        ("3", False, 0),
    ]
    assert (report.used, report.total) == (2, 4)


def test_rows_without_a_label_have_no_known_shape() -> None:
    with pytest.raises(UserError, match="no known shape of judged answers"):
        read({"prompt": "1+1?", "completion": "2"})


def test_single_answers_are_no_pairs() -> None:
    """One line that says who reads them."""
    with pytest.raises(UserError, match=r"rows\.jsonl: rows of single answers with a label are no pairs: KTO"):
        preferences([GOOD], Source("rows.jsonl"), on_bad_row="skip")


@pytest.mark.skipif(not REAL.is_dir(), reason=f"no real data at {REAL} (set RLHF_LIT_DATA)")
def test_a_peers_own_file() -> None:
    source = Source(str(REAL / "llamafactory_demo" / "kto_en_demo.json"))
    found, report = judged(read_rows(source), source, on_bad_row="skip")
    assert (len(found), report.total) == (300, 300)
    assert {record.desirable for record in found} == {True, False}


# --- mismatched answers ----------------------------------------------------------------------------------------------


def row(prompt: list[int], answer: list[int]) -> dict[str, Any]:
    mask = [False] * len(prompt) + [True] * len(answer)
    return {"tokens": prompt + answer, "mask": mask, "row": 0, "source": {}}


def mismatched(rows: list[dict[str, Any]], max_length: int) -> MismatchedRows:
    schema = schema_of({"tokens": "tokens", "mask": "mask"})
    return MismatchedRows(ArrowRows([record_batch(rows, schema)]), max_length)


def test_the_next_row_with_another_prompt_that_fits() -> None:
    rows = [row([1, 2], [3]), row([1, 2], [4]), row([5], [6, 7, 8]), row([9, 9, 9], [2, 2])]
    found = mismatched(rows, max_length=5)
    assert [changed["mismatched"] for changed in found] == [
        [1, 2, 6, 7, 8],  # past the row with its own prompt
        [1, 2, 6, 7, 8],
        [5, 2, 2],
        [9, 9, 9, 3],  # around the end
    ]
    assert [sum(changed["mismatched_mask"]) for changed in found] == [3, 3, 2, 1]
    assert all(changed["tokens"] == before["tokens"] for changed, before in zip(found, rows, strict=True))
    # With less room the next answer that fits, and where none does the shortest, cut.
    assert mismatched(rows, max_length=4)[0]["mismatched"] == [1, 2, 2, 2]
    assert mismatched([row([1, 2], [3]), row([5], [6, 7, 8])], max_length=4)[0]["mismatched"] == [1, 2, 6, 7]


def test_one_prompt_alone_has_nothing_to_compare() -> None:
    with pytest.raises(UserError, match="all rows have the same prompt"):
        mismatched([row([1], [2]), row([1], [3])], max_length=9)


def ready(module: Any) -> Any:
    algorithm = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(PLAYGROUND))
    module.trainer = SimpleNamespace(lightning_module=algorithm, global_rank=0, world_size=1)
    module.setup("fit")
    return module


@pytest.fixture
def file(tmp_path: Path) -> Source:
    rows = [{"prompt": f"what is {i} plus 1?", "completion": f"{i + 1}.", "label": i % 3 == 0} for i in range(20)]
    path = tmp_path / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


def test_batches_hold_prompts_answers_and_labels(file: Source) -> None:
    module = ready(UnpairedDataModule(file, validation_fraction=0.2, batch_size=8, cache=None))
    tokenizer = module.trainer.lightning_module.tokenizer
    texts = {split: {row["text"] for row in module.examples[split]} for split in ("train", "validation")}
    assert (len(texts["train"]), len(texts["validation"])) == (16, 4)
    for split, loader in (("train", module.train_dataloader()), ("validation", module.val_dataloader())):
        for batch in loader:
            assert isinstance(batch, UnpairedBatch)
            for i in range(len(batch)):
                whole, other = (
                    tokenizer.decode(part.tokens[i][: part.lengths[i]]) for part in (batch.sequences, batch.mismatched)
                )
                number = int(whole.split("what is ")[1].split(" plus")[0])
                assert bool(batch.desirable[i]) == (number % 3 == 0)
                assert f"{number + 1}." in whole
                assert f"what is {number} plus" in other
                answer = tokenizer.decode(
                    batch.mismatched.tokens[i][batch.mismatched.mask[i]], skip_special_tokens=True
                )
                stranger = int(answer.strip().removesuffix(".")) - 1
                assert stranger != number
                assert f"what is {stranger} plus 1?" in texts[split], "another answer of the same split"
                assert batch.mismatched.tokens[i][batch.mismatched.lengths[i] - 1] == tokenizer.eos_token_id


def test_single_answers_to_a_data_module_of_pairs(file: Source) -> None:
    with pytest.raises(UserError, match=r"no pairs: KTO with UnpairedDataModule"):
        ready(PreferenceDataModule(file, cache=None))
