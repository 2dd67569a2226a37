"""Files and folders that are whole or not there, and lines on the terminal."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only

from rlhf_lit.errors import say
from rlhf_lit.files import atomic, replace_file
from rlhf_lit.reference_cache import catalogue


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("shared", [False, True])
def test_a_file_appears_whole_and_alone(tmp_path: Path, shared: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with atomic(path, shared=shared) as partial:
        partial.write_text("new")
        assert path.read_text() == "old", "until the block ends"
        assert partial.suffix == ".partial"
    assert contents(tmp_path) == {"a.txt": "new"}


@pytest.mark.parametrize("shared", [False, True])
def test_an_error_leaves_what_was_there(tmp_path: Path, shared: bool) -> None:
    replace_file(tmp_path / "a.txt", lambda file: file.write("old"))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "c.txt").write_text("old")

    def fail(name: str, inside: str) -> None:
        with atomic(tmp_path / name, shared=shared) as partial:
            (partial / inside).parent.mkdir(exist_ok=True)
            (partial / inside).write_text("half")
            raise OSError("full")

    for name, inside in (("a.txt", ""), ("b", "c.txt")):
        with pytest.raises(OSError, match="full"):
            fail(name, inside)
    assert contents(tmp_path) == {"a.txt": "old", "b/c.txt": "old"}


def test_a_folder_is_replaced_as_a_whole_and_put_back_where_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "b"

    def write(name: str) -> None:
        with atomic(path) as partial:
            partial.mkdir()
            (partial / name).write_text(name)

    write("first")
    write("second")
    assert contents(tmp_path) == {"b/second": "second"}
    replace = os.replace

    def fail(source: Path, target: Path) -> None:
        if source == tmp_path / "b.partial":
            raise OSError("full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write("third")
    assert contents(tmp_path) == {"b/second": "second"}
    assert [entry.name for entry in tmp_path.iterdir()] == ["b"]


def test_what_a_kill_left_goes_with_the_next_write(tmp_path: Path) -> None:
    (tmp_path / "b.partial").mkdir()
    (tmp_path / "b.partial" / "half").write_text("half")
    with atomic(tmp_path / "b") as partial:
        partial.mkdir()
        (partial / "whole").write_text("whole")
    assert contents(tmp_path) == {"b/whole": "whole"}


def test_two_who_write_the_same_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with atomic(path, shared=True) as first, atomic(path, shared=True) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert contents(tmp_path) == {"a.txt": "first"}, "the last to finish"


@pytest.mark.parametrize("name", ["0" * 32 + ".arrow", "reference.json"])
def test_the_cache_knows_what_is_unfinished_in_it(tmp_path: Path, name: str) -> None:
    with atomic(tmp_path / name, shared=True) as partial:
        partial.write_bytes(b"half")
        assert catalogue.unfinished(tmp_path) == [partial]


def test_a_line_is_said_once_for_all_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    say("on the first")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    say("on the second")
    say("on any", every_rank=True)
    assert capsys.readouterr() == ("", "on the first\non any\n")
