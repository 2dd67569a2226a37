"""Streamed rows: what a block is, that every row comes up once in a pass, and that a run resumes exactly."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lit.data import modules, tokens
from rlhf_lit.data.loader import BatchLoader
from rlhf_lit.data.modules import RolloutDataModule, SFTDataModule, UnpairedDataModule
from rlhf_lit.data.sources import Source
from rlhf_lit.errors import UserError
from tests.unit.data.test_modules import ready

COUNT = 57


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setattr(tokens, "CHUNK", 7)
    monkeypatch.setattr(tokens, "FIRST_ROWS", 14)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows: list[dict[str, Any]] = [{"prompt": f"what is {i}?", "completion": f"{i}."} for i in range(COUNT)]
    rows[3]["completion"] = None  # a bad one in the first chunk
    rows[30]["completion"] = ""  # and one in a later chunk
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def streamed(file: Path, steps: int = 40, batch_size: int = 4, **options: Any) -> Any:
    source = Source(str(file), streaming=True)
    module = SFTDataModule(source, batch_size=batch_size, stream_buffer=17, **options)
    ready(module)
    module.trainer.max_steps = steps
    return module


def numbers(module: Any, batch: Any) -> list[int]:
    decode = module.chat.tokenizer.decode
    return [int(decode(row).split("what is ")[1].split("?")[0]) for row in batch.sequences.tokens]


def test_every_usable_row_comes_up_once_in_a_pass(file: Path) -> None:
    module = streamed(file, steps=2 * 14)  # 55 rows: 13 whole batches and one of 3
    batches = [numbers(module, batch) for batch in module.train_dataloader()]
    passes = batches[:14], batches[14:]
    usable = sorted(set(range(COUNT)) - {3, 30})
    for one in passes:
        assert sorted(row for batch in one for row in batch) == usable
    assert passes[0] != passes[1]
    # A buffer of 17 is 16 rows, four batches of 4: the rows of a block are the file's next ones.
    assert sorted(row for batch in batches[:4] for row in batch) == usable[:16]
    assert [row for batch in batches[:4] for row in batch] != usable[:16], "shuffled"


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("step", [1, 4, 5, 13, 14, 15, 22])
def test_a_stream_resumes_exactly(file: Path, step: int, workers: int) -> None:
    whole = streamed(file, workers=workers)
    expected = [numbers(whole, batch) for batch in whole.train_dataloader()]
    broken = streamed(file, workers=workers)
    loader = broken.train_dataloader()
    batches = iter(loader)
    before = [numbers(broken, next(batches)) for _ in range(step)]
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = streamed(file, workers=workers)
    again = resumed.train_dataloader()
    again.load_state_dict(state)
    rest = iter(again)
    assert before + [numbers(resumed, next(rest)) for _ in range(40 - step)] == expected


def test_ranks_share_every_batch(file: Path) -> None:
    whole = [numbers(module, batch) for module in [streamed(file, 10)] for batch in module.train_dataloader()]
    shares = []
    for rank in range(2):
        module = streamed(file, 10)
        module.trainer.global_rank, module.trainer.world_size = rank, 2
        shares.append([numbers(module, batch) for batch in module.train_dataloader()])
    assert [sorted(a + b) for a, b in zip(*shares, strict=True)] == [sorted(batch) for batch in whole]


def test_nothing_is_written_and_what_is_given_up_is_said(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    module = streamed(file, cache=str(cache))
    next(iter(module.train_dataloader()))
    assert not cache.exists()
    lines = capsys.readouterr().err
    assert "rows.jsonl is streamed: it has no length, its rows are shuffled among 16 at a time" in lines
    assert "skipped 1 null completion (row 3)" in lines


def test_the_first_rows_of_a_stream_are_a_file(file: Path) -> None:
    """With a limit there is a length: they are read once, and kept."""
    module = ready(SFTDataModule(Source(str(file), streaming=True, limit=20), batch_size=4, cache=None))
    assert module.stream is None
    assert len(module.examples["train"]) == 20
    assert isinstance(module.train_dataloader(), BatchLoader)


def test_a_stream_needs_the_runs_length(file: Path) -> None:
    with pytest.raises(UserError, match=r"data\.train\.streaming: a stream has no length; set trainer\.max_steps"):
        streamed(file, steps=-1).train_dataloader()


@pytest.mark.parametrize(
    ("build", "line"),
    [
        (lambda s: RolloutDataModule(s), "a rollout needs its prompts at hand"),
        (lambda s: SFTDataModule([s, s]), "a mixture cannot be streamed"),
        (lambda s: SFTDataModule(s, validation_fraction=0.1), "rows that are streamed cannot be split"),
    ],
)
def test_what_a_stream_cannot_be(file: Path, build: Any, line: str) -> None:
    with pytest.raises(UserError, match=line):
        build(Source(str(file), streaming=True))


def test_with_a_limit_it_is_a_file_everywhere(file: Path) -> None:
    """No whole set is fetched for some rows of it: of a mixture, a rollout, or what is split or validated."""
    some = Source(str(file), streaming=True, limit=20)
    mixed = ready(SFTDataModule([some, some], cache=None))
    assert len(mixed.examples["train"]) == 40
    split = ready(SFTDataModule(some, validation_fraction=0.25, cache=None))
    assert len(split.examples["validation"]) == 5
    assert len(ready(RolloutDataModule(some, cache=None)).examples["train"]) == 20
    assert len(ready(SFTDataModule(some, validation=some, cache=None)).examples["validation"]) == 20


@pytest.mark.parametrize("split", ["validation", "test", "predict"])
def test_only_training_rows_are_streamed_or_weighted(file: Path, split: str) -> None:
    with pytest.raises(UserError, match=rf"data\.{split}\.streaming: training rows alone are read as training goes on"):
        SFTDataModule(**{split: Source(str(file), streaming=True)})
    with pytest.raises(UserError, match=rf"data\.{split}\.weight: training rows alone are mixed"):
        SFTDataModule(**{split: Source(str(file), weight=2)})


def test_a_reference_cannot_know_a_stream_beforehand(file: Path) -> None:
    module = streamed(file)
    with pytest.raises(UserError, match=r"reference\.precompute: .* streamed"):
        module.rows_seen("train")


def test_a_place_beyond_the_block_is_the_next_block(file: Path) -> None:
    """As after a change of the batch size: no block is passed over for it."""
    module = streamed(file, steps=3)
    loader = module.train_dataloader()
    loader.load_state_dict({"epoch": 0, "block": 0, "chunk": 0, "used": 0, "position": 9, "buffer": 16})
    first = next(iter(loader))
    usable = sorted(set(range(COUNT)) - {3, 30})
    assert set(numbers(module, first)) <= set(usable[16:32])


def test_a_run_does_not_change_between_a_stream_and_a_file(file: Path) -> None:
    module = streamed(file)
    stream = module.train_dataloader()
    stored = ready(SFTDataModule(Source(str(file)), cache=None)).train_dataloader()
    with pytest.raises(UserError, match="did not stream its rows; leave it out"):
        stream.load_state_dict(stored.state_dict())
    with pytest.raises(UserError, match="streamed its rows; set it to true"):
        stored.load_state_dict(stream.state_dict())


def test_other_blocks_are_said(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = streamed(file).train_dataloader().state_dict()
    streamed(file).train_dataloader().load_state_dict(state)
    assert "blocks of" not in capsys.readouterr().err
    streamed(file, batch_size=6).train_dataloader().load_state_dict(state)
    assert "the stream goes on in blocks of 12 rows, before of 16" in capsys.readouterr().err


def test_mismatched_answers_come_from_the_block(tmp_path: Path) -> None:
    path = tmp_path / "judged.jsonl"
    rows = [{"prompt": f"what is {i}?", "completion": f"{i}.", "label": i % 2 == 0} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = UnpairedDataModule(Source(str(path), streaming=True), batch_size=4, stream_buffer=8)
    ready(module)
    module.trainer.max_steps = 5
    for batch in module.train_dataloader():
        assert batch.mismatched.mask.any(-1).all()


@pytest.mark.parametrize("step", [2, 9])
def test_what_the_hub_streams_resumes_too(file: Path, tmp_path: Path, step: int) -> None:
    """A copy of a hub data set on disk, which `datasets` streams as it does one of the hub."""
    copy = tmp_path / "copy"
    copy.mkdir()
    file.rename(copy / "rows.jsonl")
    (copy / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: rows.jsonl\n---\n"
    )
    whole, broken, resumed = (streamed(copy, steps=20) for _ in range(3))
    expected = [numbers(whole, batch) for batch in whole.train_dataloader()]
    assert sorted(row for batch in expected[:14] for row in batch) == sorted(set(range(COUNT)) - {3, 30})
    loader = broken.train_dataloader()
    batches = iter(loader)
    before = [numbers(broken, next(batches)) for _ in range(step)]
    again = resumed.train_dataloader()
    again.load_state_dict(loader.state_dict())
    rest = iter(again)
    assert before + [numbers(resumed, next(rest)) for _ in range(20 - step)] == expected


def test_a_rest_too_short_for_mismatched_answers_is_part_of_the_last_block(tmp_path: Path) -> None:
    """17 rows in blocks of 8: the last one alone has no other prompt beside it."""
    path = tmp_path / "judged.jsonl"
    rows = [{"prompt": f"what is {i}?", "completion": f"{i}.", "label": i % 2 == 0} for i in range(17)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    module = UnpairedDataModule(Source(str(path), streaming=True), batch_size=4, stream_buffer=8)
    ready(module)
    module.trainer.max_steps = 10
    batches = [numbers(module, batch) for batch in module.train_dataloader()]
    assert sorted(row for batch in batches[:5] for row in batch) == list(range(17))
    assert sorted(row for batch in batches[:2] for row in batch) == list(range(8))


def test_mismatched_answers_are_found_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "judged.jsonl"
    rows = [{"prompt": f"what is {i}?", "completion": f"{i}.", "label": True} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = []
    monkeypatch.setattr(modules, "MismatchedRows", lambda rows, _: made.append(len(rows)) or rows)
    ready(UnpairedDataModule(Source(str(path), streaming=True), batch_size=4))
    assert made == [8]
