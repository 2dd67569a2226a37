"""Files of every kind become rows, lazily; what is wrong with a file ends in one line that names the place."""

from __future__ import annotations

import csv
import gzip
import json
import pickle
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from rlhf_lit.data.json_rows import LONE_SURROGATE, TOO_DEEP, TOO_LONG, Line
from rlhf_lit.data.sources import Source, open_rows, read_rows, rows_of
from rlhf_lit.errors import UserError

ROWS: list[dict[str, Any]] = [{"prompt": f"{i} × 2?", "completion": f"a\n{2 * i} \u2028 😀"} for i in range(25)]


def zstd(content: bytes) -> bytes:
    return bytes(pa.Codec("zstd").compress(content, asbytes=True))


def put(path: Path, content: str | bytes, **options: Any) -> Source:
    """A file of the given content, compressed where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    squeeze = {".gz": gzip.compress, ".zst": zstd}.get(path.suffix.lower())
    path.write_bytes(squeeze(content) if squeeze else content)
    return Source(str(path), **options)


def lines(rows: list[Any]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows: list[dict[str, Any]], delimiter: str = ",") -> str:
    import io

    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter)
    writer.writerows([list(rows[0]), *(list(row.values()) for row in rows)])
    return text.getvalue()


def columnar(write: Callable[[Any, Any], None]) -> bytes:
    sink = pa.BufferOutputStream()
    write(pa.Table.from_pylist(ROWS), sink)
    return bytes(sink.getvalue())


def arrow(of: Callable[[Any, Any], Any]) -> bytes:
    def write(rows: Any, sink: Any) -> None:
        with of(sink, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=7)

    return columnar(write)


KINDS: dict[str, str | bytes] = {
    "rows.jsonl": lines(ROWS),
    "rows.ndjson": lines(ROWS),
    "rows.JSONL": "\ufeff" + lines(ROWS).replace("\n", "\r\n\r\n"),
    "rows.json": json.dumps(ROWS, indent=1),
    "lines.json": lines(ROWS),
    "rows.csv": "\ufeff" + table(ROWS),
    "rows.TSV": table(ROWS, "\t"),
    "rows.parquet": columnar(parquet.write_table),
    "stream.arrow": arrow(pa.ipc.new_stream),
    "file.arrow": arrow(pa.ipc.new_file),
}


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst", ".GZ"])
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_gives_the_same_rows(tmp_path: Path, name: str, suffix: str) -> None:
    source = put(tmp_path / f"{name}{suffix}", KINDS[name])
    assert rows_of(source, "demonstrations") == ROWS
    chunks = list(open_rows(source, "demonstrations").chunks(10))
    assert [(chunk.first, len(chunk)) for chunk in chunks] == [(0, 10), (10, 10), (20, 5)]
    assert [row for chunk in chunks for row in pickle.loads(pickle.dumps(chunk)).rows()] == ROWS
    done = [chunk.done for chunk in chunks]
    assert done == sorted(done)
    assert 0 < done[0] <= done[-1] == 1


def test_two_compressed_files_in_one(tmp_path: Path) -> None:
    half = [gzip.compress(lines(part).encode()) for part in (ROWS[:9], ROWS[9:])]
    (tmp_path / "a.jsonl.gz").write_bytes(b"".join(half))
    (tmp_path / "b.jsonl.zst").write_bytes(b"".join(zstd(lines(part).encode()) for part in (ROWS[:9], ROWS[9:])))
    assert read_rows(Source(str(tmp_path / "a.jsonl.gz"))) == ROWS
    assert read_rows(Source(str(tmp_path / "b.jsonl.zst"))) == ROWS


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv.gz", "rows.json", "rows.parquet", "rows.txt.zst"])
def test_a_torn_compressed_file_is_named(tmp_path: Path, name: str) -> None:
    for suffix, kind in ((".gz", "gzip"), (".zst", "zstd")):
        path = tmp_path / f"{name.split('.gz')[0].split('.zst')[0]}{suffix}"
        content = KINDS.get(name.removesuffix(".gz"), "some text\n" * 300)
        put(path, content)
        path.write_bytes(path.read_bytes()[:-12])
        with pytest.raises(UserError, match=f"{path.name} is not a (whole {kind}|readable Parquet) file") as error:
            read_rows(Source(str(path)))
        assert "\n" not in str(error.value)


def test_json_lines_are_parsed_where_they_are_wanted(tmp_path: Path) -> None:
    """A chunk holds lines, so that another process parses them, and its complaint names the file's line."""
    text = lines(ROWS[:3]) + "\n\n" + lines(ROWS[3:12]) + '{"prompt": \n' + lines(ROWS[12:])
    source = put(tmp_path / "rows.jsonl", text)
    first, second, *_ = open_rows(source, "demonstrations").chunks(10)
    assert all(type(item) is Line for item in first.content)
    assert first.rows() == ROWS[:10]
    with pytest.raises(UserError, match=r"rows\.jsonl, line 15: not valid JSON"):
        pickle.loads(pickle.dumps(second)).rows()


def test_a_large_file_is_never_held(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("w") as file:
        for i in range(40_000):
            file.write(json.dumps({"text": f"{i} " + "x" * 1000}) + "\n")
    tracemalloc.start()
    count = sum(len(chunk.rows()) for chunk in open_rows(Source(str(path)), "demonstrations").chunks(500))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40_000
    assert peak < 5_000_000 < path.stat().st_size / 8


# --- lines and text ----------------------------------------------------------------------------------------------

ODD = "a\u2028b\u0085c\x0cd\x1ce\u2029f\x0bg\x1dh"


def test_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    text = put(tmp_path / "rows.txt", f"{ODD}\r\n{ODD}x\n\n \t\nlast")
    assert read_rows(text) == [{"text": ODD}, {"text": f"{ODD}x"}, {"text": "last"}]
    rows = [{"text": ODD.replace("\x0c", "").replace("\x1c", "").replace("\x0b", "").replace("\x1d", "")}] * 2
    assert read_rows(put(tmp_path / "rows.jsonl", lines(rows))) == rows


DEEP = "[" * 100_000 + "]" * 100_000
FAULTY = {
    '{"text": "a \\ud83d b"}': LONE_SURROGATE,
    '{"a \\uDE00": 1}': LONE_SURROGATE,
    '{"text": [{"x": "\\udfff"}]}': LONE_SURROGATE,
    f'{{"text": {DEEP}}}': TOO_DEEP,
    '{"a":' * 150 + "1" + "}" * 150: TOO_DEEP,
    f'{{"n": {"7" * 5000}}}': TOO_LONG,
    f'{{"n": [-{"7" * 5000}, "]}}"]}}': TOO_LONG,
}
GOOD = ['{"text": "\\ud83d\\ude00"}', '{"text": "[[[[[[ \\" {"}', f'{{"n": {"7" * 400}}}', f'{{"n": {[[1]] * 200}}}']


@pytest.mark.parametrize("as_lines", [True, False])
def test_rows_that_nobody_can_use_are_bad_rows(tmp_path: Path, as_lines: bool) -> None:
    texts = [text for pair in zip(FAULTY, [*GOOD, *GOOD], strict=False) for text in pair]
    joined = "\n".join(texts) if as_lines else f"[{', '.join(texts)}]"
    found = read_rows(put(tmp_path / ("rows.jsonl" if as_lines else "rows.json"), joined))
    assert found[::2] == list(FAULTY.values())
    assert found[1::2] == [json.loads(text) for text in texts[1::2]]


def test_scalars_of_an_array(tmp_path: Path) -> None:
    text = f'[1, {"1" * 5000} , "a]", {DEEP}, null, [], {{}}]'
    assert read_rows(put(tmp_path / "rows.json", text)) == [1, TOO_LONG, "a]", TOO_DEEP, None, [], {}]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ('[{"a": 1},\n {"a": }]', 2, "Expecting value"),
        ('\n\n[{"a": 1},\n {"a": 2}\n', 5, "the list is never closed"),
        ('[{"a": 1}\n {"a": 2}]', 2, "Expecting ',' delimiter"),
        ('[{"a": 1},\n]', 2, "Expecting value|trailing comma"),
        ('[{"a": 1}]\n[{"a": 2}]', 2, "Extra data"),
        (f"[{'[' * 100_000}", 1, "the list is never closed"),
    ],
)
def test_an_array_that_is_no_json_names_its_line(tmp_path: Path, text: str, line: int, what: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.json, line {line}: not valid JSON \(.*({what})"):
        read_rows(put(tmp_path / "rows.json", text))


def test_bytes_that_are_no_utf8_name_their_line(tmp_path: Path) -> None:
    for name, content, where in (
        ("a.txt", b"one\ntw\xff\n", "line 2: not UTF-8 text \\(its byte 2"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', "line 2: not UTF-8 text \\(its byte 7"),
        ("a.json", b'[1,\n"\xff"]', "line 2: not UTF-8 text \\(byte 5 of the file"),
        ("a.csv", b"a,b\n1,2\n\xff,3\n", "not UTF-8 text"),
    ):
        with pytest.raises(UserError, match=where):
            read_rows(put(tmp_path / name, content))


# --- nested rows -------------------------------------------------------------------------------------------------


def test_rows_inside_of_an_object(tmp_path: Path) -> None:
    for at, value in (
        ("examples", {"version": 1, "examples": ROWS}),
        ("data.rows", {"data": {"rows": ROWS}}),
        ("pages.rows", {"pages": [{"rows": ROWS[:3]}, {"rows": ROWS[3:]}]}),
    ):
        for indent in (None, 1):
            source = put(tmp_path / "rows.json", json.dumps(value, indent=indent), columns={"rows": at})
            around = {f"../{name}": text for name, text in value.items() if name == "version"}
            assert read_rows(source) == [{**around, **row} for row in ROWS]
    per_line = put(tmp_path / "r.jsonl", lines([{"x": ROWS[:4]}, {"y": 1}, {"x": ROWS[4:]}]), columns={"rows": "x"})
    found = read_rows(per_line)
    assert found[:4] + found[5:] == ROWS
    assert found[4].reason == "no list at x"
    assert [chunk.first for chunk in open_rows(per_line, "prompts").chunks(20)] == [0, 20]


def test_a_bad_row_inside_of_an_object_leaves_the_others(tmp_path: Path) -> None:
    text = '{"rows": [{"a": 1}, {"a": "\\ud800"}, {"a": ' + "[" * 150 + "]" * 150 + "}]}"
    assert read_rows(put(tmp_path / "r.json", text, columns={"rows": "rows"})) == [{"a": 1}, LONE_SURROGATE, TOO_DEEP]


def test_where_rows_are_is_said_or_asked_for(tmp_path: Path) -> None:
    text = json.dumps({"version": 1, "examples": ROWS}, indent=1)
    with pytest.raises(UserError, match=r"holds one object of several lines.*columns: \{rows: examples\}"):
        read_rows(put(tmp_path / "r.json", text))
    with pytest.raises(UserError, match=r"no list of rows at 'rows': the keys are version, examples"):
        read_rows(put(tmp_path / "r.json", text, columns={"rows": "rows"}))
    with pytest.raises(UserError, match="no list of rows at 'version'"):
        read_rows(put(tmp_path / "r.json", text, columns={"rows": "version"}))


# --- tables ------------------------------------------------------------------------------------------------------

PLAIN = "".join(f"q{i},a{i}\n" for i in range(1000))


@pytest.mark.parametrize(
    ("rows", "line", "what"),
    [
        ('q,a\n"open,1\n' + PLAIN, 2, "never closed"),
        ("q,a\n" + PLAIN + 'q,"open\nx,1\n', 1002, "never closed"),
        ('q,a\n1,"open\n' + PLAIN + '2,"a"\n', 2, "follows a closing quote, in line 1003"),
        ('q,a\n"1","open\n"2","a"\n', 2, "follows a closing quote, in line 3"),
        ('q,a\n1,"two\nlines"\n"5" pipe",x\n', 4, "follows a closing quote, in line 4"),
        ('q,"a\n' + PLAIN, 1, "never closed"),
    ],
)
def test_a_quote_left_open_names_its_line(tmp_path: Path, rows: str, line: int, what: str) -> None:
    with pytest.raises(UserError, match=rf"rows\.csv, line {line}: not valid CSV \(.*{what}"):
        read_rows(put(tmp_path / "rows.csv", rows))


def test_names_of_a_header(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="line 1: two columns are named 'a'"):
        read_rows(put(tmp_path / "rows.csv", "q,a,a\n1,2,3\n"))
    with pytest.raises(UserError, match="line 1: column 3 has no name"):
        read_rows(put(tmp_path / "rows.csv", "q,a,\n1,2,3\n"))
    assert read_rows(put(tmp_path / "rows.csv", ",q\n0,1\n")) == [{"": "0", "q": "1"}]  # as pandas writes an index


def test_a_chosen_delimiter(tmp_path: Path) -> None:
    for name, delimiter in (("rows.csv", ";"), ("rows.tsv", "|"), ("rows.csv.gz", "\t")):
        assert read_rows(put(tmp_path / name, table(ROWS, delimiter), delimiter=delimiter)) == ROWS
    with pytest.raises(UserError, match="one character"):
        Source("rows.csv", delimiter="; ")
    with pytest.raises(UserError, match=r"it is for \.csv and \.tsv files"):
        read_rows(put(tmp_path / "rows.jsonl", lines(ROWS), delimiter=";"))


# --- folders -----------------------------------------------------------------------------------------------------


def test_a_folder_of_all_kinds_in_the_order_of_names(tmp_path: Path) -> None:
    for number, (name, content) in enumerate(KINDS.items()):
        put(tmp_path / "all" / f"{number}_{name}", content)
    for name in ("README.md", "LICENSE", ".hidden/x.xlsx", "_SUCCESS"):
        put(tmp_path / "all" / name, "x")
    file = open_rows(Source(str(tmp_path / "all")), "demonstrations")
    chunks = list(file.chunks(60))
    assert [row for chunk in chunks for row in chunk.rows()] == ROWS * len(KINDS)
    assert [chunk.done for chunk in chunks] == sorted(chunk.done for chunk in chunks)
    # Cells are text, as in a file by itself; `datasets` would make numbers of them.
    put(tmp_path / "csv" / "a.csv", "q,a\n007,1\n")
    assert read_rows(Source(str(tmp_path / "csv"))) == [{"q": "007", "a": "1"}]


def test_the_odd_file_of_a_folder_is_named(tmp_path: Path) -> None:
    put(tmp_path / "f" / "a.jsonl", lines(ROWS))
    put(tmp_path / "f" / "deep" / "odd.xlsx", "x")
    with pytest.raises(UserError, match=r"deep/odd\.xlsx is of no kind that can be read"):
        read_rows(Source(str(tmp_path / "f")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no files with rows"):
        read_rows(Source(str(tmp_path / "empty")))


def test_splits_of_a_folder(tmp_path: Path) -> None:
    for name, rows in (("data/train-00000-of-00002.jsonl", ROWS[:5]), ("data/train-00001-of-00002.jsonl", ROWS[5:10]),
                       ("my_test.json", ROWS[10:12]), ("dev/x.jsonl", ROWS[12:13])):  # fmt: skip
        put(tmp_path / "f" / name, lines(rows))
    folder = str(tmp_path / "f")
    assert read_rows(Source(folder)) == ROWS[:10]
    assert read_rows(Source(folder, split="train[4:7]")) == ROWS[4:7]
    assert read_rows(Source(folder, split="test")) == ROWS[10:12]
    assert read_rows(Source(folder, split="validation[:9]")) == ROWS[12:13]
    assert read_rows(Source(folder, split=None)) == ROWS[:10] + ROWS[12:13] + ROWS[10:12]
    with pytest.raises(UserError, match=r"no split 'held_out'; its files are test, train, validation"):
        read_rows(Source(folder, split="held_out"))
    with pytest.raises(UserError, match=r"split 'train\[:10%\]'"):
        read_rows(Source(folder, split="train[:10%]"))
    put(tmp_path / "f" / "more.jsonl", lines(ROWS))
    with pytest.raises(UserError, match=r"more\.jsonl says no split by its name"):
        read_rows(Source(folder))


def test_no_split_beside_a_local_file(tmp_path: Path) -> None:
    source = put(tmp_path / "rows.jsonl", lines(ROWS), split=None)
    assert read_rows(source) == ROWS
    assert rows_of(Source("playground", split=None), "prompts") == rows_of(Source("playground"), "prompts")


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    data = Dataset.from_list(ROWS)
    data.save_to_disk(str(tmp_path / "one"))
    DatasetDict({"train": data, "test": data.select(range(3))}).save_to_disk(str(tmp_path / "two"))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    for split in ("train", None):
        assert read_rows(Source(one, split=split)) == ROWS
    assert read_rows(Source(one, split="train[5:7]")) == ROWS[5:7]
    assert read_rows(Source(two)) == ROWS
    assert read_rows(Source(two, split="test")) == ROWS[:3]
    with pytest.raises(UserError, match="no split 'test'"):
        read_rows(Source(one, split="test"))
    for missing in ("dev", None):
        with pytest.raises(UserError, match=f"two has no split '{missing}'; it has train, test"):
            read_rows(Source(two, split=missing))
    file = open_rows(Source(two), "demonstrations")
    assert [chunk.done for chunk in pickle.loads(pickle.dumps(file)).chunks(10)] == [0.4, 0.8, 1.0]


# --- the hub -----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `load_dataset` was asked for last; it gives ROWS."""
    asked: dict[str, Any] = {}

    def load_dataset(path: str, name: str | None, split: str | None, streaming: bool = False) -> Any:
        from datasets import Dataset, DatasetDict

        asked.update(path=path, name=name, split=split, streaming=streaming)
        data = Dataset.from_list(ROWS)
        data = data.to_iterable_dataset() if streaming else data
        return data if split is not None else DatasetDict({"train": data})

    def load_dataset_builder(path: str, name: str | None) -> Any:
        def as_streaming_dataset(split: str | None) -> Any:
            return load_dataset(path, name, split, streaming=True)

        return SimpleNamespace(
            hash="commit", config=SimpleNamespace(data_files=None), as_streaming_dataset=as_streaming_dataset
        )

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    monkeypatch.setattr("datasets.load_dataset_builder", load_dataset_builder)
    return asked


def test_a_hub_data_set(hub: dict[str, Any]) -> None:
    file = open_rows(Source("some/thing", name="main", split="test"), "demonstrations")
    assert hub == {"path": "some/thing", "name": "main", "split": "test", "streaming": False}
    assert [chunk.rows() for chunk in file.chunks(20)] == [ROWS[:20], ROWS[20:]]
    assert rows_of(Source("some/thing", split=None), "demonstrations") == ROWS


def test_streaming_reads_no_further_than_asked(hub: dict[str, Any]) -> None:
    file = open_rows(Source("some/thing", streaming=True), "demonstrations")
    assert hub["streaming"] is True
    chunk = next(iter(file.chunks(4)))
    assert (chunk.first, chunk.rows(), chunk.done) == (0, ROWS[:4], 0.0)
    assert rows_of(Source("some/thing", streaming=True), "demonstrations") == ROWS


# --- settings and fingerprints -----------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0, -1, float("nan"), float("inf")])
def test_a_weight_is_a_share(weight: float) -> None:
    with pytest.raises(UserError, match="weight must be above 0"):
        Source("rows.jsonl", weight=weight)


def test_a_fingerprint_is_of_what_is_read(tmp_path: Path, hub: dict[str, Any]) -> None:
    def of(source: Source) -> str:
        return open_rows(source, "prompts").fingerprint

    text = table(ROWS)
    same = [put(tmp_path / name, text) for name in ("a.csv", "b.csv")]
    assert of(same[0]) == of(same[1]) == of(Source(same[0].path, limit=3, weight=2, columns={"prompt": "x"}))
    put(tmp_path / "f" / "train.csv", text)
    different = [
        same[0],
        put(tmp_path / "c.csv", text + "x,y\n"),
        put(tmp_path / "d.txt", text),
        Source(same[0].path, delimiter=";"),
        Source(same[0].path, columns={"rows": "x"}),
        Source(str(tmp_path / "f"), split="train[:3]"),
        Source(str(tmp_path / "f"), split="train[:4]"),
        Source("playground"),
        Source("playground", split="held_out"),
        Source("some/thing", streaming=True),
        Source("some/thing", split="test", streaming=True),
        Source("some/thing", name="main", streaming=True),
    ]
    found = [of(source) for source in different]
    assert len(set(found)) == len(found)
    assert all(len(one) == 32 for one in found)


def test_a_fingerprint_of_what_is_streamed_is_of_its_files(tmp_path: Path) -> None:
    """Rows of an earlier commit, or of files that were written anew, are not taken from the cache."""
    (tmp_path / "README.md").write_text("---\nconfigs:\n- config_name: default\n  data_files: '*.jsonl'\n---\n")
    found = []
    for number in range(2):
        (tmp_path / "train.jsonl").write_text(json.dumps({"text": "word " * (number + 1)}) + "\n")
        found.append(open_rows(Source(str(tmp_path), streaming=True, limit=1), "demonstrations").fingerprint)
    again = open_rows(Source(str(tmp_path), streaming=True, limit=1), "demonstrations").fingerprint
    assert found[0] != found[1] == again


def test_a_fingerprint_parses_nothing(tmp_path: Path) -> None:
    assert open_rows(put(tmp_path / "rows.jsonl", "no JSON"), "prompts").fingerprint


def test_no_more_rows_are_read_than_are_wanted(tmp_path: Path) -> None:
    """The file is broken further on."""
    source = put(tmp_path / "rows.jsonl", lines([{"x": i} for i in range(50)]) + "{broken\n")
    assert read_rows(source, 7) == [{"x": i} for i in range(7)]
    with pytest.raises(UserError, match=r"line 51: not valid JSON"):
        read_rows(source)
