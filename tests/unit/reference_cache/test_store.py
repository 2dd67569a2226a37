"""The cache of one reference: computed once, read to the bit, and neither kills, races nor torn files get in."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from rlhf_lit.batches import Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.roles import Roles
from rlhf_lit.reference_cache import catalogue, pending, segments, store
from rlhf_lit.reference_cache.identity import ReferenceIdentity, identify
from rlhf_lit.reference_cache.index import key_of
from rlhf_lit.reference_cache.store import ReferenceCache, Row

BUDGET = 40
PATIENCE = 300.0


def reference(digit: str = "a", **facts: Any) -> ReferenceIdentity:
    known = dict.fromkeys(("quantization", "adapter", "compute"))
    return ReferenceIdentity(digit * 32, {"model": f"model {digit}", "dtype": "float32", **known, **facts})


def rows_of(sequences: Sequences) -> list[Row]:
    return [
        (sequences.tokens[i, :length].tolist(), sequences.mask[i, :length].tolist())
        for i, length in enumerate(sequences.lengths.tolist())
    ]


ROWS = rows_of(tiny.sequences(tiny.RAGGED))


def values_of(sequences: Sequences) -> Tensor:
    """[rows, time] a number that differs from token to token."""
    place = torch.arange(sequences.tokens.shape[1])
    return torch.where(sequences.mask, -(sequences.tokens / 7 + place.sqrt() + 0.1), 0.0)


class Counting:
    """``values_of``, and the rows it was asked for."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def __call__(self, sequences: Sequences) -> Tensor:
        self.rows += rows_of(sequences)
        return values_of(sequences)


@pytest.fixture
def cache(tmp_path: Path) -> ReferenceCache:
    return ReferenceCache(tmp_path / "cache", reference())


def again(cache: ReferenceCache) -> ReferenceCache:
    """As another process finds it."""
    return ReferenceCache(cache.cache, cache.identity)


def assert_whole(cache: ReferenceCache, rows: list[Row] = ROWS) -> None:
    sequences = Sequences.pad(*zip(*rows, strict=True))
    assert torch.equal(again(cache).read(sequences), values_of(sequences))


# --- what is computed, and what is read ------------------------------------------------------------------------------


def test_what_is_read_is_what_was_computed_to_the_bit(llama: str, tmp_path: Path) -> None:
    roles = Roles(Base(llama, lora=LoRA(rank=4)), reference=True)
    computed: dict[bytes, Tensor] = {}

    @torch.no_grad()
    def compute(sequences: Sequences) -> Tensor:
        with roles.acting("reference") as model:
            logprobs = token_logprobs(model, sequences)
        for row, logs, mask in zip(rows_of(sequences), logprobs, sequences.mask, strict=True):
            computed[key_of(*row).digest] = logs[mask]
        return logprobs

    with roles.acting("reference") as model:
        cache = ReferenceCache(tmp_path, identify(model))
    assert cache.build(ROWS, compute, BUDGET) == len(ROWS)
    sequences = tiny.sequences(tiny.RAGGED)
    read = again(cache).read(sequences)
    assert read.dtype == torch.float32
    assert not read[~sequences.mask].any()
    for row, logs, mask in zip(ROWS, read, sequences.mask, strict=True):
        assert torch.equal(logs[mask], computed[key_of(*row).digest])
    torch.testing.assert_close(read, compute(sequences), atol=2e-6, rtol=0)


def test_what_is_there_is_not_computed_again(cache: ReferenceCache, capsys: pytest.CaptureFixture[str]) -> None:
    compute = Counting()
    assert cache.missing(ROWS) == list(range(len(ROWS)))
    assert cache.build(ROWS[:4], compute, BUDGET) == 4
    assert again(cache).missing(ROWS) == [4, 5, 6]
    assert again(cache).build(ROWS, compute, BUDGET) == 3
    capsys.readouterr()
    last = again(cache)
    assert last.build(ROWS, compute, BUDGET) == 0
    said = capsys.readouterr().err
    assert sorted(compute.rows) == sorted(ROWS)
    assert_whole(cache)
    files = list(cache.folder.glob("*.arrow"))
    assert len(last) == len(ROWS)
    assert last.size == sum(file.stat().st_size for file in files)
    assert said.splitlines() == [
        f"reference log-probs: every row found, none computed; 7 rows, {last.size / 1000:.1f} kB in {cache.folder}"
    ]


def test_equal_rows_are_computed_once(cache: ReferenceCache) -> None:
    compute = Counting()
    assert cache.missing([ROWS[0], ROWS[1], ROWS[0]]) == [0, 1]
    assert cache.build([ROWS[0], ROWS[1], ROWS[0]], compute, BUDGET) == 2
    assert_whole(cache, [ROWS[1], ROWS[0], ROWS[0]])


def test_a_group_holds_no_more_padded_tokens_than_its_budget(cache: ReferenceCache) -> None:
    shapes = []

    def compute(sequences: Sequences) -> Tensor:
        shapes.append(tuple(sequences.tokens.shape))
        return values_of(sequences)

    cache.build(ROWS, compute, 30)
    # 13 and 10 in two groups of their own are less than 2 × 13, by more than the 30/16 that a group costs.
    assert shapes == [(1, 20), (2, 14), (1, 13), (1, 10), (2, 8)]


def test_a_row_is_its_tokens_and_its_mask_and_not_its_padding(cache: ReferenceCache) -> None:
    cache.build(ROWS, values_of, BUDGET)
    wide = tiny.widen(tiny.supervised(), 9).sequences
    assert torch.equal(cache.read(wide), values_of(wide))
    tokens, mask = ROWS[0]
    others = [
        ([*tokens, 5], [*mask, False]),
        (tokens, [*mask[:-1], False]),
        (tokens, [*mask[1:], False]),  # as many tokens, but others
        ([*tokens[:-1], 9], mask),
        ROWS[0],
    ]
    assert sum(others[2][1]) == sum(mask)
    assert cache.missing(others) == [0, 1, 2, 3]
    # Eight bytes of a mask are not taken for a token.
    assert key_of([7], [True] * 1) != key_of([7, 0], [True, False])


def test_rows_without_a_counted_token_are_rows(cache: ReferenceCache) -> None:
    rows: list[Row] = [([5, 6], [False, False]), ROWS[0], ([5], [False])]
    cache.build(rows, values_of, BUDGET)
    assert_whole(cache, rows)
    assert again(cache).missing(rows) == []


def test_values_are_mapped_and_not_copied(cache: ReferenceCache) -> None:
    cache.build(ROWS, values_of, BUDGET)
    (file,) = cache.folder.glob("*.arrow")
    values = segments.read(file, cache.identity.digest).values
    assert not values.flags.owndata
    assert not values.flags.writeable
    assert str(file) in Path("/proc/self/maps").read_text()


def test_a_row_that_is_not_there_cannot_be_read(cache: ReferenceCache) -> None:
    cache.build(ROWS[:3], values_of, BUDGET)
    with pytest.raises(UserError, match=r"no reference log-probs for a row of 10 tokens, 6 of them counted"):
        cache.read(Sequences.pad(*zip(ROWS[1], ROWS[5], strict=True)))


def test_rows_of_another_process_are_found_while_running(cache: ReferenceCache) -> None:
    cache.build(ROWS[:3], values_of, BUDGET)
    again(cache).build(ROWS, values_of, BUDGET)
    sequences = Sequences.pad(*zip(*ROWS, strict=True))
    assert torch.equal(cache.read(sequences), values_of(sequences))


def test_a_bar_on_a_terminal_and_two_lines_elsewhere(
    cache: ReferenceCache, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.build(ROWS[:3], values_of, BUDGET)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "reference log-probs: 3 rows to compute under model a, float32"
    assert len(lines) == 2
    monkeypatch.setenv("FORCE_COLOR", "1")
    cache.build(ROWS, values_of, BUDGET)
    assert "4/4" in capsys.readouterr().err


# --- bad values and bad files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_refused_and_the_rest_kept(cache: ReferenceCache, bad: float) -> None:
    poisoned: Row = ([1, 2, 39, 38], [False, False, True, True])

    def one_bad(sequences: Sequences) -> Tensor:
        values = values_of(sequences)
        return torch.where((sequences.tokens == 38) & (sequences.lengths == 4)[:, None], bad, values)

    rows = [*ROWS, poisoned]
    with pytest.raises(UserError, match=rf"row 7 \(4 tokens\) has one that is {bad} under model a, float32") as refusal:
        cache.build(rows, one_bad, BUDGET)
    assert "\n" not in str(refusal.value)
    assert again(cache).missing(rows) == [7]
    assert_whole(cache)


def damage_truncated(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:-9])
    return file


def damage_cut_to_its_head(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:20])
    return file


def damage_empty(file: Path) -> Path:
    file.write_bytes(b"")
    return file


def damage_one_bit(file: Path) -> Path:
    content = bytearray(file.read_bytes())
    at = content.index(np.float32(values_of(Sequences.pad(*zip(*ROWS[:1], strict=True)))[0, -1]).tobytes())
    content[at] ^= 1
    file.write_bytes(content)
    return file


def damage_renamed(file: Path) -> Path:
    return file.rename(file.with_name("f" * 32 + ".arrow"))


DAMAGES = [damage_truncated, damage_cut_to_its_head, damage_empty, damage_one_bit, damage_renamed]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_file_is_not_used_and_its_rows_come_back(
    cache: ReferenceCache, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], Path]
) -> None:
    cache.build(ROWS[:4], values_of, BUDGET)
    (file,) = cache.folder.glob("*.arrow")
    cache.build(ROWS, values_of, BUDGET)
    damaged = damage(file)
    capsys.readouterr()
    found = again(cache)
    assert found.missing(ROWS) == [0, 1, 2, 3]
    assert found.missing(ROWS) == [0, 1, 2, 3]
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"warning: {damaged} is not used, ")
    with pytest.raises(UserError, match="no reference log-probs"):
        found.read(Sequences.pad(*zip(*ROWS, strict=True)))
    assert found.build(ROWS, values_of, BUDGET) == 4
    capsys.readouterr()
    assert_whole(cache)
    assert capsys.readouterr().err == ""


def test_a_file_of_others_is_neither_used_nor_removed(
    cache: ReferenceCache, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.build(ROWS[:4], values_of, BUDGET)
    (file,) = cache.folder.glob("*.arrow")
    (cache.folder / "mine.arrow").write_bytes(file.read_bytes())
    (cache.folder / "notes.txt").write_text("mine")
    capsys.readouterr()
    assert again(cache).build(ROWS, values_of, BUDGET) == 3
    warning = capsys.readouterr().err.splitlines()[0]
    assert warning.startswith(f"warning: {cache.folder / 'mine.arrow'} is not used")
    assert {"mine.arrow", "notes.txt"} <= {file.name for file in cache.folder.iterdir()}


def test_rows_of_another_reference_are_never_taken(cache: ReferenceCache, capsys: pytest.CaptureFixture[str]) -> None:
    cache.build(ROWS, values_of, BUDGET)
    other = ReferenceCache(cache.cache, reference("b"))
    assert len(other.missing(ROWS)) == len(ROWS)
    shutil.copytree(cache.folder, other.folder)
    assert len(other.missing(ROWS)) == len(ROWS)
    assert "of another reference" in capsys.readouterr().err


def test_a_row_with_too_few_values_is_not_read(cache: ReferenceCache, capsys: pytest.CaptureFixture[str]) -> None:
    cache.build(ROWS[1:], values_of, BUDGET)
    wrong = np.zeros(3, np.float32)
    segments.write(cache.folder, cache.identity.digest, [key_of(*ROWS[0]).digest], [wrong])
    found = again(cache)
    assert found.missing(ROWS) == [0]
    assert "it has 3 values for 2 tokens" in capsys.readouterr().err
    assert found.build(ROWS, values_of, BUDGET) == 1
    assert_whole(cache)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "reference").write_text("a file")
    with pytest.raises(UserError, match=r"cannot be written to: .*; set another cache folder"):
        ReferenceCache(tmp_path, reference()).build(ROWS, values_of, BUDGET)


def test_a_disk_that_is_full(cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    cache.build(ROWS[:1], values_of, BUDGET)
    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot be written to: No space left on device"):
        cache.build(ROWS, values_of, BUDGET)
    monkeypatch.undo()
    assert not list(cache.folder.glob("*.partial"))
    assert again(cache).missing(ROWS) == list(range(1, len(ROWS)))


# --- refusals --------------------------------------------------------------------------------------------------------


def test_complete_rows_are_enough(cache: ReferenceCache) -> None:
    cache.build(ROWS, values_of, BUDGET)
    before = os.utime(cache.folder / catalogue.DESCRIPTION, (1, 1))
    assert before is None
    again(cache).require([*ROWS, ROWS[0]])
    assert (cache.folder / catalogue.DESCRIPTION).stat().st_mtime > 1, "when it was last used is known"


def refusal(cache: ReferenceCache, rows: list[Row]) -> str:
    with pytest.raises(UserError) as refused:
        again(cache).require(rows)
    said = str(refused.value)
    assert said.startswith(f"{cache.folder}: the reference log-probs of ")
    assert "\n" not in said
    return said.removeprefix(f"{cache.folder}: the reference log-probs of ")


def test_require_says_how_many_are_missing_and_why(cache: ReferenceCache) -> None:
    assert refusal(cache, ROWS).startswith("7 of 7 rows are missing; nothing is cached in ")
    cache.build(ROWS[:5], values_of, BUDGET)
    assert refusal(cache, [*ROWS, ROWS[6]]) == "2 of 7 rows are missing; let a run compute them first"
    otherwise = refusal(cache, [*ROWS[5:], ROWS[6]])
    assert otherwise.startswith("2 of 2 rows are missing, and the 5 that are there, of the same reference, were token")
    assert "another tokenizer, template or max_length" in otherwise
    other = ReferenceCache(cache.cache, reference("b", adapter="rank 4 on 14 layers"))
    assert refusal(other, ROWS) == (
        f"7 of 7 rows are missing: the reference differs from those in {cache.cache}. This one is model b, float32, "
        "adapter rank 4 on 14 layers; there are model a, float32"
    )


# --- processes -------------------------------------------------------------------------------------------------------


def started(work: Callable[[], None]) -> Any:
    process = multiprocessing.get_context("fork").Process(target=work, daemon=True)
    process.start()
    return process


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_kill_while_writing_loses_what_was_not_written(
    cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(pending, "SEGMENT_TOKENS", 1)
    note, replace = tmp_path / "stalled", os.replace
    done: list[Any] = []

    def stall_at_the_fourth(source: Any, target: Any) -> None:
        if len(done) == 3:  # reference.json and two segments are there
            note.touch()
            time.sleep(PATIENCE)
        done.append(target)
        replace(source, target)

    def work() -> None:
        os.replace = stall_at_the_fourth
        cache.build(ROWS, values_of, 30)

    process = started(work)
    wait_for(note.exists)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(cache.folder.glob("*.partial"))) == 1
    # Groups of 1, 2, 2 and 2 rows, longest first: the third was computed and is lost.
    survivor = again(cache)
    assert survivor.missing(ROWS) == [0, 3, 4, 5]
    compute = Counting()
    assert survivor.build(ROWS, compute, 30) == 4
    assert sorted(compute.rows) == sorted(ROWS[i] for i in (0, 3, 4, 5))
    assert_whole(cache)


def test_what_a_killed_build_left_unfinished_goes_in_time(cache: ReferenceCache) -> None:
    cache.build(ROWS[:1], values_of, BUDGET)
    young, old = (cache.folder / f"{digit * 32}.partial" for digit in "12")
    for file in (young, old):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 7200,) * 2)
    cache.build(ROWS, values_of, BUDGET)
    assert young.exists(), "another process may be writing it"
    assert not old.exists()


def test_of_two_processes_one_computes_and_the_other_waits(
    cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(store, "POLL", 0.02)
    monkeypatch.setattr(pending, "SEGMENT_TOKENS", 1)

    def work(name: str) -> Callable[[], None]:
        def note(line: str) -> None:
            with (tmp_path / name).open("a") as file:
                file.write(line + "\n")

        def compute(sequences: Sequences) -> Tensor:
            wait_for(lambda: any("waiting" in read(name) for name in "ab"))
            note(f"computed {len(sequences)}")
            return values_of(sequences)

        def run() -> None:
            store.say = note
            mine = again(cache)
            note(f"returned {mine.build(ROWS, compute, 30)}")
            sequences = Sequences.pad(*zip(*ROWS, strict=True))
            assert torch.equal(mine.read(sequences), values_of(sequences))

        return run

    def read(name: str) -> str:
        return (tmp_path / name).read_text() if (tmp_path / name).exists() else ""

    processes = [started(work(name)) for name in "ab"]
    for process in processes:
        process.join(PATIENCE)
        assert process.exitcode == 0
    said = [read(name) for name in "ab"]
    assert sorted(text.count("waiting for another process that builds in ") for text in said) == [0, 1]
    assert sorted(text.count("\ncomputed ") for text in said) == [0, 5]
    assert sorted(text.splitlines()[-1] for text in said) == ["returned 0", "returned 7"]


def test_a_dead_process_holds_no_lock(cache: ReferenceCache, tmp_path: Path) -> None:
    note = tmp_path / "computing"

    def compute(sequences: Sequences) -> Tensor:
        note.touch()
        time.sleep(PATIENCE)
        return values_of(sequences)

    process = started(lambda: cache.build(ROWS, compute, BUDGET) and None)
    wait_for(note.exists)
    process.kill()
    process.join()
    assert again(cache).build(ROWS, values_of, BUDGET) == len(ROWS)


def test_without_a_lock_two_compute_the_same_and_nothing_breaks(
    cache: ReferenceCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*_: Any, **__: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(store.FileLock, "acquire", no_locks)
    other = again(cache)

    def compute(sequences: Sequences) -> Tensor:
        other.build(ROWS, values_of, BUDGET)
        return values_of(sequences)

    assert cache.build(ROWS, compute, 1000) == len(ROWS)
    assert_whole(cache)
    assert len(again(cache).missing(ROWS)) == 0


def test_ranks_share_the_rows_and_see_all_of_them(cache: ReferenceCache) -> None:
    rows = rows_of(tiny.sequences([(4 + i % 5, i % 7) for i in range(120)], seed=5))
    cache.build(rows[:10], values_of, BUDGET)
    barrier, computes = threading.Barrier(3), [Counting() for _ in range(3)]
    caches = [again(cache) for _ in range(3)]
    counts = [0, 0, 0]

    def work(rank: int) -> None:
        wait = lambda: barrier.wait(PATIENCE) and None  # noqa: E731
        counts[rank] = caches[rank].build(rows, computes[rank], BUDGET, rank, 3, wait)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
    assert sum(counts) == 110
    assert min(counts) > 20, "a fair share each"
    assert sorted(row for compute in computes for row in compute.rows) == sorted(rows[10:])
    assert all(len(one) == 120 for one in caches)
    assert_whole(cache, rows)
