"""Rows in an Arrow file: what comes back is what was written, one row at a time."""

from __future__ import annotations

import pickle
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from rlhf_lit.data.store import (
    ArrowRows,
    ColumnTypes,
    JoinedRows,
    StoredRows,
    held_out,
    opened,
    record_batch,
    schema_of,
    write,
)

ROOT = Path(__file__).parents[3]
COLUMNS: ColumnTypes = {
    "tokens": "tokens",
    "mask": "mask",
    "answers": "token lists",
    "masks": "masks",
    "ranks": "ranks",
    "ratings": "numbers",
    "margin": "number",
    "desirable": "flag",
    "text": "text",
}


def row(i: int) -> dict[str, Any]:
    return {
        "tokens": list(range(i)),
        "mask": [token % 2 == 1 for token in range(i)],
        "answers": [[i, 1], [2**31 - 1]],
        "masks": [[False, True], [True]],
        "ranks": [0, 1],
        "ratings": [0.5, -i / 3],
        "margin": i / 7,
        "desirable": i % 2 == 0,
        "text": f"ملف {i} 😀",
        "row": 10 * i,
        "source": {"n": i, "nested": [{"a": None}], "😀": 2**70},
    }


@pytest.fixture
def path(tmp_path: Path) -> Path:
    schema = schema_of(COLUMNS)
    file = tmp_path / "rows.arrow"
    batches = [record_batch([row(i) for i in some], schema) for some in (range(4), range(4, 5), [], range(5, 12))]
    write(file, schema, iter(batches), lambda: {"used": 12})
    return file


def test_rows_come_back_as_they_were(path: Path) -> None:
    rows = StoredRows(path)
    assert rows.summary == {"used": 12}
    assert len(rows) == 12
    assert [dict(one) for one in rows] == [row(i) for i in range(12)]
    assert dict(rows[-1]) == row(11)
    with pytest.raises(IndexError):
        rows[12]
    with pytest.raises(KeyError):
        rows[0]["missing"]
    assert type(rows[3]["tokens"][0]) is int
    assert type(rows[3]["mask"][0]) is bool


def test_some_of_them(path: Path) -> None:
    rows = StoredRows(path)
    some = rows.select(np.array([7, 0, 7]))
    assert [one["row"] for one in some] == [70, 0, 70]
    assert [one["row"] for one in some.select(np.array([1]))] == [0]
    assert [one["row"] for one in rows[2:8:2]] == [20, 40, 60]
    both = JoinedRows([rows[:2], some])
    assert [one["row"] for one in both] == [0, 10, 70, 0, 70]
    assert both[-1]["row"] == 70


def test_tokens_take_four_bytes_and_masks_a_bit(path: Path) -> None:
    schema = schema_of({"tokens": "tokens", "mask": "mask"})
    rows = [{"tokens": [1] * 8000, "mask": [True] * 8000, "row": 0, "source": {}}]
    assert 33_000 <= record_batch(rows, schema).nbytes <= 33_100  # 32 000 + 1 000


def test_a_copy_maps_the_file_again(path: Path) -> None:
    rows = StoredRows(path)
    content = pickle.dumps(rows)
    assert len(content) < 500, "a path, no rows"
    assert dict(pickle.loads(content)[11]) == row(11)
    (path.parent / "rows.pickle").write_bytes(pickle.dumps(rows[2:]))
    script = f"import pickle; print(pickle.load(open({str(path.parent / 'rows.pickle')!r}, 'rb'))[5]['row'])"
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, capture_output=True, text=True)
    assert run.stdout == "70\n"


def test_a_slice_of_a_batch_is_its_rows() -> None:
    """Masks are packed into bytes, which a slice begins in the middle of."""
    batch = record_batch([row(i) for i in range(40)], schema_of(COLUMNS))
    rows = ArrowRows([batch.slice(3, 5), batch.slice(13, 9), batch.slice(22).slice(1)])
    assert [dict(one) for one in rows] == [row(i) for i in (*range(3, 8), *range(13, 22), *range(23, 40))]


def test_rows_need_no_pandas(path: Path) -> None:
    """Its import takes as long as thousands of rows."""
    script = (
        "import sys\n"
        "from tests.unit.data.test_stored_rows import *\n"
        f"rows = StoredRows(Path({str(path)!r}))\n"
        "assert dict(rows[3]) == row(3)\n"
        "record_batch([row(3)], schema_of(COLUMNS))\n"
        "assert 'pandas' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


@pytest.mark.parametrize("kept", [0, 100, -1, -20])
def test_half_a_file_is_none(path: Path, kept: int) -> None:
    assert opened(path) is not None
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    assert opened(path) is None
    path.unlink()
    assert opened(path) is None


def test_a_file_of_another_writer_is_none(tmp_path: Path) -> None:
    """Such as the tokenised files of earlier versions."""
    with pa.ipc.new_file(tmp_path / "x.arrow", pa.schema([("tokens", pa.string())])) as writer:
        writer.write_batch(pa.record_batch({"tokens": ["{}"]}))
    assert opened(tmp_path / "x.arrow") is None


def test_what_json_does_not_have_is_text() -> None:
    (one,) = ArrowRows(
        [record_batch([{"row": 0, "source": {"day": date(2026, 1, 2), "x": float("inf")}}], schema_of({}))]
    )
    assert one["source"] == {"day": "2026-01-02", "x": float("inf")}


def test_a_fraction_is_held_out_by_place_alone(path: Path) -> None:
    kept, held = held_out(StoredRows(path), 0.25, "rows.jsonl")
    assert (len(kept), len(held)) == (9, 3)
    assert sorted(one["row"] for part in (kept, held) for one in part) == [10 * i for i in range(12)]
    assert [one["row"] for one in held] == sorted(one["row"] for one in held)
