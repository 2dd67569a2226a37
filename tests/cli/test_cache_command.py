"""``cache`` and ``cache clear`` on folders that runs and builds have filled."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from rlhf_lit.batches import Sequences
from rlhf_lit.reference_cache import catalogue
from rlhf_lit.reference_cache.identity import ReferenceIdentity
from rlhf_lit.reference_cache.store import ReferenceCache

TOKENISED = "0123456789abcdef" * 2
DIGESTS = ("ab" * 16, "ac" * 16, "c0" * 16)


def identity(digest: str) -> ReferenceIdentity:
    facts = {"model": f"models/{digest[:2]}", "dtype": "bfloat16", "quantization": "nf4 double", "adapter": None}
    return ReferenceIdentity(digest, {**facts, "compute": None, "weights": 10})


def fill(folder: Path, rows: int, digest: str) -> ReferenceCache:
    cache = ReferenceCache(folder, identity(digest))
    pairs = [([1, 2, i], [False, True, True]) for i in range(rows)]
    cache.build(pairs, lambda sequences: -torch.ones(sequences.mask.shape), 1000)
    return cache


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Two tokenised files, three references, and what is not ours."""
    folder = tmp_path / "cache"
    for rows, digest in zip((1, 20, 300), DIGESTS, strict=True):
        fill(folder, rows, digest)
    for name in (TOKENISED, TOKENISED[::-1]):
        (folder / f"{name}.arrow").write_bytes(b"x" * 1500)
    for name in ("mine.arrow", "mine.txt", "reference/mine.txt", f"{TOKENISED}.arrow.bak"):
        (folder / name).write_text("mine")
    return folder


MINE = {"mine.arrow", "mine.txt", "reference/mine.txt", f"{TOKENISED}.arrow.bak"}


def files(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def size(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in files(folder) - MINE)


def test_what_is_cached_is_listed(command: Callable, cache: Path) -> None:
    for digest in DIGESTS:
        os.utime(cache / "reference" / digest / "reference.json", (4e9, 4e9))
    answer = command("cache", "--cache", cache)
    assert (answer.status, answer.err) == (0, "")
    tokens, heading, *table, total = answer.out.splitlines()
    assert tokens.startswith("2 tokenised files, 3.0 kB, the last of ")
    assert heading.split()[:4] == ["reference", "model", "dtype", "quantization"]
    assert [line.split()[0] for line in table] == [digest[:12] for digest in DIGESTS]
    assert table[1].split()[1:6] == ["models/ac", "bfloat16", "nf4", "double", "–"]
    assert [line.split()[7] for line in table] == ["1", "20", "300"]
    assert all("2096-10-02" in line for line in table)
    assert total == f"{size(cache) / 1000:.1f} kB in {cache}"


def test_the_folder_is_that_of_the_runs(command: Callable, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_lit.commands.cache import DEFAULT
    from rlhf_lit.data.modules import SFTDataModule

    assert SFTDataModule().cache == DEFAULT
    monkeypatch.setenv("HOME", str(cache.parent))
    assert command("cache").out == f"nothing is cached in {cache.parent}/.cache/rlhf_lit\n"
    (cache.parent / ".cache").mkdir()
    cache.rename(cache.parent / ".cache" / "rlhf_lit")
    assert "2 tokenised files" in command("cache").out
    assert command("cache", "clear").status == 0
    assert files(cache.parent / ".cache" / "rlhf_lit") == MINE


def test_clear_removes_everything_of_ours_and_nothing_else(command: Callable, cache: Path) -> None:
    (cache / f"{TOKENISED}.{TOKENISED}.partial").write_bytes(b"half")
    old = cache / f"{TOKENISED}.{TOKENISED[::-1]}.partial"
    old.write_bytes(b"half")
    os.utime(old, (1, 1))
    young = f"{TOKENISED}.{TOKENISED}.partial"
    # In a reference's folder nobody writes while its lock is ours.
    (cache / "reference" / DIGESTS[0] / f"{TOKENISED}.partial").write_bytes(b"half")
    count, bytes_there = len(files(cache) - MINE - {young}), size(cache) - 4
    locks = sum(name.endswith(catalogue.LOCK) for name in files(cache))
    answer = command("cache", "clear", "--cache", cache)
    assert answer.status == 0
    assert answer.out == f"removed {count - locks} files, {bytes_there / 1000:.1f} kB, from {cache}\n"
    assert files(cache) == MINE | {young}, "another process may be writing the young one"
    assert not any((cache / "reference" / digest).exists() for digest in DIGESTS)
    assert command("cache", "--cache", cache).out == f"nothing is cached in {cache}\n"


def test_what_is_named_alone_is_removed(command: Callable, cache: Path) -> None:
    before = files(cache)
    assert command("cache", "clear", "--reference", "c", "--cache", cache).status == 0
    assert {Path(name).parent.name for name in before - files(cache)} == {DIGESTS[2]}
    before = files(cache)
    assert command("cache", "clear", "--tokens", "--cache", cache).status == 0
    assert before - files(cache) == {f"{TOKENISED}.arrow", f"{TOKENISED[::-1]}.arrow"}
    assert command("cache", "clear", "--references", "--cache", cache).status == 0
    assert files(cache) == MINE


@pytest.mark.parametrize(
    ("prefix", "line"),
    [
        (
            "a",
            f"error: --reference a: 2 references start so ({DIGESTS[0][:12]}, {DIGESTS[1][:12]}); give more digits\n",
        ),
        ("d", "error: --reference d: no such reference in {cache}; there are: " + ", ".join(d[:12] for d in DIGESTS)),
        ("", "error: --reference : no such reference in "),
    ],
)
def test_a_prefix_that_names_none_or_several(command: Callable, cache: Path, prefix: str, line: str) -> None:
    before = files(cache)
    answer = command("cache", "clear", f"--reference={prefix}", "--cache", cache)
    assert answer.status == 2
    assert answer.err.startswith(line.format(cache=cache))
    assert answer.err.count("\n") == 1
    assert files(cache) == before


def test_a_folder_that_is_being_built_in_is_left_alone(command: Callable, cache: Path) -> None:
    """The lock is a file's, so that it holds against this process too."""
    busy = cache / "reference" / DIGESTS[1]
    there = files(busy)
    with FileLock(busy / catalogue.LOCK):
        answer = command("cache", "clear", "--cache", cache)
    assert answer.status == 0
    assert answer.out.splitlines()[0] == f"left alone: {busy}, another process is building in it"
    assert files(busy) == there
    assert files(cache) == MINE | {f"reference/{DIGESTS[1]}/{name}" for name in there}


def test_files_of_others_in_a_reference_stay(command: Callable, cache: Path) -> None:
    folder = cache / "reference" / DIGESTS[0]
    (folder / "notes.txt").write_text("mine")
    answer = command("cache", "clear", "--reference", DIGESTS[0], "--cache", cache)
    assert answer.out.splitlines()[0] == f"left in {folder}, not written by this cache: notes.txt"
    assert files(folder) == {"notes.txt"}


def test_rows_that_are_mapped_outlive_a_clear(command: Callable, cache: Path) -> None:
    reader = fill(cache, 300, DIGESTS[2])
    assert command("cache", "clear", "--cache", cache).status == 0
    row = Sequences.pad([[1, 2, 7]], [[False, True, True]])
    assert reader.read(row).tolist() == [[0.0, -1.0, -1.0]]


@pytest.mark.parametrize("description", ["{", "[1]"])
def test_a_damaged_description_and_a_damaged_segment_are_listed(
    command: Callable, cache: Path, description: str
) -> None:
    folder = cache / "reference" / DIGESTS[0]
    (folder / "reference.json").write_text(description)
    (segment,) = folder.glob("*.arrow")
    segment.write_bytes(b"torn")
    answer = command("cache", "--cache", cache)
    assert answer.status == 0
    line = next(line for line in answer.out.splitlines() if line.startswith(DIGESTS[0][:12]))
    assert line.split()[1:7] == ["–", "–", "–", "–", "–", "0"]


def test_bad_options_get_one_line(command: Callable, cache: Path) -> None:
    for argv in (("clear", "--everything"), ("clean",), ("--cache", cache / "mine.txt")):
        answer = command("cache", *argv)
        assert answer.status == 2
        assert answer.err.startswith("error: ")
        assert answer.err.count("\n") == 1
