"""From a file to its store: in one process or several, into the cache, beside it, or into a cache that is no use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf_lit.data import progress, store, tokens
from rlhf_lit.data.modules import SFTDataModule
from rlhf_lit.data.sources import Source
from rlhf_lit.errors import UserError
from tests.unit.data.test_modules import ready

COUNT = 60


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Rows of which every tenth is bad, and every seventh too long for 40 tokens."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"what is {i}?", "completion": f"{i}." * (30 if i % 7 == 0 else 1), "note": f"n{i}"}
        for i in range(COUNT)
    ]
    for i in range(0, COUNT, 10):
        rows[i]["prompt"] = None
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokens, "CHUNK", 7)
    monkeypatch.setattr(tokens, "FIRST_ROWS", 14)


def module(file: Path, limit: int | None = None, **options: Any) -> Any:
    return ready(SFTDataModule(Source(str(file), limit=limit), max_length=40, truncation="drop", **options))


LONG = [i for i in range(0, COUNT, 7) if i % 10]
BAD = list(range(0, COUNT, 10))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2, 3])
@pytest.mark.parametrize("limit", [None, 1, 5, 6, 7, 20, 54, 100])
def test_processes_and_chunks_change_nothing(
    file: Path, workers: int, limit: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = module(file, limit, workers=workers, cache=None)
    monkeypatch.setattr(tokens, "CHUNK", 1000)
    one = module(file, limit, workers=1, cache=None)
    assert list(many.examples["train"]) == list(one.examples["train"])
    assert many.reports == one.reports


def test_the_report_of_a_limit_ends_where_reading_does(file: Path) -> None:
    report = module(file, 6, cache=None).reports["train"]
    # Rows 0 … 6 are looked at for six records (1 … 6), none of which is too long; with 7 of them row 7 is.
    assert (report.total, report.used, report.counts) == (7, 6, {"null prompt": 1})
    report = module(file, 7, cache=None).reports["train"]
    assert (report.total, report.used, report.counts) == (8, 6, {"null prompt": 1, "over-long": 1})
    report = module(file, cache=None).reports["train"]
    assert (report.total, report.used) == (COUNT, COUNT - len(BAD) - len(LONG))
    assert report.counts == {"null prompt": len(BAD), "over-long": len(LONG)}


def test_a_limit_that_the_chunk_just_has_looks_no_further(tmp_path: Path) -> None:
    """Five good rows and a bad one: the fifth is the last that is looked at."""
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"what is {i}?", "completion": f"{i}." if i < 5 else None} for i in range(6)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = module(path, 5, on_bad_row="error", cache=None).reports["train"]
    assert (report.total, report.used, report.counts) == (5, 5, {})


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_is_a_number_of_rows(limit: int) -> None:
    with pytest.raises(UserError, match=f"rows.jsonl: limit must be at least 1, not {limit}"):
        Source("rows.jsonl", limit=limit)


@pytest.mark.usefixtures("small_chunks")
def test_processes_say_of_a_template_what_one_would(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlhf_lit.data.templates.ChatTemplate._takes_system", False)
    path = tmp_path / "rows.jsonl"
    rows = [{"system": "Be brief.", "prompt": f"what is {i}?", "completion": f"{i}."} for i in range(COUNT)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module(path, workers=3, cache=None)
    assert capfd.readouterr().err.count("takes no system turn") == 1


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_stops_at_the_first_bad_row(file: Path, workers: int) -> None:
    with pytest.raises(UserError, match=r"rows\.jsonl, row 0: null prompt; mend the row, or set on_bad_row to skip"):
        module(file, on_bad_row="error", workers=workers, cache=None)


def test_what_a_store_says_of_bad_rows_stops_a_run_that_allows_none(file: Path, tmp_path: Path) -> None:
    cache = str(tmp_path / "cache")
    module(file, cache=cache)
    with pytest.raises(UserError, match=r"rows\.jsonl, row 0: null prompt"):
        module(file, on_bad_row="error", cache=cache)


def test_a_second_start_reads_no_row(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    cache = tmp_path / "cache"
    first = module(file, cache=str(cache))
    said = capsys.readouterr().err
    assert "columns that were not used: note" in said
    assert [path.suffix for path in cache.iterdir()] == [".arrow"], "no lock and no half of a file is left"
    monkeypatch.setattr(tokens.Loading, "write", lambda *_: pytest.fail("read again"))
    second = module(file, cache=str(cache))
    assert list(second.examples["train"]) == list(first.examples["train"])
    assert second.reports == first.reports
    assert capsys.readouterr().err == said, "the report is kept with the rows"
    assert second.identities == first.identities


def test_without_a_cache_the_file_goes_with_the_rows(file: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    made = module(file, cache=None)
    (folder,) = tmp_path.glob("rlhf_lit-*")
    assert len(list(folder.iterdir())) == 1
    del made
    assert not folder.exists()


def lines_with(cache: str, file: Path, capsys: Any) -> str:
    made = module(file, cache=cache)
    assert len(made.examples["train"]) == COUNT - len(BAD) - len(LONG)
    said: str = capsys.readouterr().err
    return said


def test_a_cache_that_cannot_be_written_is_gone_without(file: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "taken").write_text("a file, no folder")
    line = f"note: data.cache: {tmp_path}/taken/x cannot be used (Not a directory); going on without it"
    assert line in lines_with(str(tmp_path / "taken" / "x"), file, capsys)


def test_a_full_disk_is_gone_without(file: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    whole = store.write

    def write(path: Path, *rest: Any) -> None:
        whole(path, *rest)
        if path.is_relative_to(tmp_path / "cache"):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", write)
    assert "cannot be used (No space left on device)" in lines_with(str(tmp_path / "cache"), file, capsys)
    assert list((tmp_path / "cache").glob("*.arrow*")) == []


def test_no_room_anywhere_is_one_line(file: Path, monkeypatch: Any) -> None:
    def write(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, "write", write)
    with pytest.raises(UserError, match=r"data\.train: no room for its tokens .* set TMPDIR or data\.cache"):
        module(file, cache=None)


def test_a_torn_file_is_made_anew(file: Path, tmp_path: Path, capsys: Any) -> None:
    cache = tmp_path / "cache"
    module(file, cache=str(cache))
    (stored,) = cache.glob("*.arrow")
    content = stored.read_bytes()
    stored.write_bytes(content[: len(content) // 2])
    capsys.readouterr()
    assert f"note: data.cache: {stored} is damaged; it is made anew" in lines_with(str(cache), file, capsys)
    assert stored.read_bytes() == content


def test_code_under_change_has_a_store_of_its_own(file: Path, tmp_path: Path) -> None:
    """A data module of the user's own, edited and run again under the same name."""

    def edited(word: str) -> type[SFTDataModule]:
        folder = tmp_path / word
        folder.mkdir()
        (folder / f"own_{word}.py").write_text(
            f"from rlhf_lit.data.modules import SFTDataModule\n\nWORD = '{word}'\n\n\nclass Own(SFTDataModule):\n"
            "    def row(self, record, encoded):\n        return WORD if record.row == 1 else "
            "super().row(record, encoded)\n"
        )
        sys.path.insert(0, str(folder))
        try:
            kind: type[SFTDataModule] = __import__(f"own_{word}").Own
        finally:
            sys.path.pop(0)
        return kind

    for word in ("wrong", "odd"):
        made = ready(edited(word)(Source(str(file)), cache=str(tmp_path / "cache")))
        assert made.reports["train"].counts[word] == 1
    assert tokens.code_of(SFTDataModule) == ["SFTDataModule"]


def test_one_process_makes_it_and_others_wait(file: Path, tmp_path: Path) -> None:
    """Two processes at once: one store, written once, and both have its rows."""
    script = (
        "import sys, time\n"
        "from rlhf_lit.data import tokens\n"
        "from tests.unit.data.test_tokens import module\n"
        "from pathlib import Path\n"
        "whole = tokens.Loading.write\n"
        "def write(self, path):\n"
        "    time.sleep(1.0)\n"
        "    print('made', flush=True)\n"
        "    whole(self, path)\n"
        "tokens.Loading.write = write\n"
        "print(len(module(Path(sys.argv[1]), cache=sys.argv[2]).examples['train']))\n"
    )
    run = [sys.executable, "-c", script, str(file), str(tmp_path / "cache")]
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    both = [subprocess.Popen(run, stdout=subprocess.PIPE, text=True, cwd=root, env=environment) for _ in range(2)]
    said = [process.communicate(timeout=300)[0].split() for process in both]
    rows = str(COUNT - len(BAD) - len(LONG))
    assert sorted(map(len, said)) == [1, 2], "one of them made it"
    assert all(words[-1] == rows for words in said)


# --- progress --------------------------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def passes(seconds: float) -> None:
        now[0] += seconds

    return passes


def test_a_pipe_has_a_line_now_and_then(clock: Callable[[float], None], capsys: Any) -> None:
    with progress.loading("train") as advance:
        clock(1)
        advance(1000, 0.01)
        assert capsys.readouterr().err == ""
        clock(19)
        advance(40_000, 0.2)
        advance(40_001, 0.2)
    assert capsys.readouterr().err == "train: 40,000 rows read (20%), 2,000 rows/s\n"


@pytest.mark.parametrize(("ci", "lines"), [("", ""), ("true", "train: 5 rows read (50%), 0 rows/s\n")])
def test_a_terminal_has_a_bar_and_ci_has_lines(
    ci: str, lines: str, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    monkeypatch.setenv("CI", ci)
    with progress.loading("train") as advance:
        clock(20)
        advance(5, 0.5)
    said = capsys.readouterr().err
    assert said == lines if lines else "reading" in said
