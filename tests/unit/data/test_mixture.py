"""Weighted mixtures: exact shares, no row twice before its set is through, and a place that resumes exactly."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lit.data.loader import BatchLoader
from rlhf_lit.data.mixture import in_shares, mixed_order, shares, shuffled
from rlhf_lit.data.modules import RolloutDataModule, SFTDataModule
from rlhf_lit.data.sources import Source
from rlhf_lit.errors import UserError
from rlhf_lit.playground import World
from tests.unit.data.test_modules import ready

ROWS = {
    "small": [{"prompt": f"small {i}?", "completion": f"s {i}."} for i in range(4)],
    "large": [{"prompt": f"large {i}?", "completion": f"l {i}."} for i in range(16)],
}


@pytest.fixture(autouse=True)
def seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


@pytest.mark.parametrize(
    ("sizes", "weights", "expected"),
    [
        ([4, 16], [1, 1], [10, 10]),
        ([4, 16], [3, 1], [15, 5]),
        ([1, 1, 1], [1, 1, 1], [1, 1, 1]),
        ([3, 4], [1, 2], [2, 5]),  # 2⅓ and 4⅔
        ([5, 5], [1e-9, 1], [0, 10]),
    ],
)
def test_shares_add_up_to_an_epoch(sizes: list[int], weights: list[float], expected: list[int]) -> None:
    assert shares(sizes, weights) == expected


def test_every_epoch_has_the_exact_shares_and_each_set_is_a_stream_of_passes() -> None:
    order = mixed_order([4, 16], [1, 1])
    epochs = [order(epoch).tolist() for epoch in range(8)]
    for epoch in epochs:
        assert sum(place < 4 for place in epoch) == 10
        assert sum(place >= 4 for place in epoch) == 10
    # 8 epochs are 20 passes over 4 rows, and 5 over 16.
    counts = Counter(place for epoch in epochs for place in epoch)
    assert all(counts[place] == 20 for place in range(4))
    assert all(counts[place] == 5 for place in range(4, 20))
    assert epochs[0] != epochs[1]
    assert order(3).tolist() == epochs[3], "whatever was asked before"


def test_a_pass_goes_on_from_epoch_to_epoch() -> None:
    """Within any epochs no row comes up twice more than another of its set."""
    order = mixed_order([7, 13], [1, 2])
    seen: Counter[int] = Counter()
    for epoch in range(5):
        seen.update(order(epoch).tolist())
        assert max(seen[i] for i in range(7)) - min(seen[i] for i in range(7)) <= 1
        assert max(seen[i] for i in range(7, 20)) - min(seen[i] for i in range(7, 20)) <= 1


def test_one_set_alone_is_shuffled_as_before() -> None:
    assert torch.equal(shuffled(9)(2), shuffled(9)(2))
    assert sorted(shuffled(9)(2).tolist()) == list(range(9))


@pytest.mark.parametrize("step", [1, 4, 5, 7])
def test_a_mixture_resumes_in_the_middle(step: int) -> None:
    def loader() -> BatchLoader:
        return BatchLoader(list(range(20)), 4, lambda rows: rows, mixed_order([4, 16], [3, 1]))  # type: ignore[arg-type, return-value]

    def take(of: BatchLoader, count: int) -> list[Any]:
        found: list[Any] = []
        while len(found) < count:
            for batch in of:
                found.append(batch)
                if len(found) == count or of.position == 0:
                    break
        return found

    whole, broken, resumed = take(loader(), 12), loader(), loader()
    before = take(broken, step)
    resumed.load_state_dict(broken.state_dict())
    assert before + take(resumed, 12 - step) == whole


@pytest.fixture
def mixed(tmp_path: Path) -> list[Source]:
    for name, rows in ROWS.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [Source(str(tmp_path / "small.jsonl"), weight=3), Source(str(tmp_path / "large.jsonl"))]


def test_a_data_module_mixes_its_sources(mixed: list[Source], capsys: pytest.CaptureFixture[str]) -> None:
    module = ready(SFTDataModule(mixed, batch_size=4, cache=None))
    lines = capsys.readouterr().err
    assert "train (small.jsonl): small.jsonl: 4 of 4 rows used" in lines
    assert (
        "train: an epoch is 20 rows: small.jsonl 75.0% (15 of 4 rows, 3.75 passes), "
        "large.jsonl 25.0% (5 of 16 rows, 0.31 passes)" in lines
    )
    own = module.chat.tokenizer
    texts = [
        own.decode(row[:length])
        for batch in module.train_dataloader()
        for row, length in zip(batch.sequences.tokens, batch.sequences.lengths, strict=True)
    ]
    assert sum("small" in text for text in texts) == 15
    assert sum("large" in text for text in texts) == 5
    assert set(module.identities) == {"train (small.jsonl)", "train (large.jsonl)"}


def test_each_set_gives_its_fraction_to_validation(mixed: list[Source]) -> None:
    module = ready(SFTDataModule(mixed, validation_fraction=0.25, cache=None))
    prompts = [row["source"]["prompt"].split()[0] for row in module.examples["validation"]]
    assert Counter(prompts) == {"small": 1, "large": 4}
    assert len(module.order()(0)) == 15


def test_a_set_of_which_nothing_is_left_is_refused(mixed: list[Source], tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(json.dumps(ROWS["small"][0]) + "\n")
    line = r"data\.validation_fraction: one\.jsonl has 1 row, of which none is left to train on"
    for train in ([*mixed, Source(str(tmp_path / "one.jsonl"))], Source(str(tmp_path / "one.jsonl"))):
        with pytest.raises(UserError, match=line):
            ready(SFTDataModule(train, validation_fraction=0.25, cache=None))


def test_files_of_one_name_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = []
    for name, rows in ROWS.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources.append(Source(str(tmp_path / name / "rows.jsonl")))
    module = ready(SFTDataModule(sources, cache=None))
    assert {place: report.used for place, report in module.reports.items()} == {
        "train (1: rows.jsonl)": 4,
        "train (2: rows.jsonl)": 16,
    }
    assert len(module.identities) == 2


def test_prompts_of_a_rollout_are_mixed_too(mixed: list[Source]) -> None:
    module = ready(RolloutDataModule(mixed, rollout_size=20, batch_size=20, cache=None))
    batch = module.train_dataloader()._prompts_of(0)
    assert Counter(text.split()[0] for text in batch.texts) == {"small": 15, "large": 5}


def test_words() -> None:
    assert in_shares(["a", "b"], [1, 3], [1, 1]) == (
        "an epoch is 4 rows: a 50.0% (2 of 1 rows, 2.00 passes), b 50.0% (2 of 3 rows, 0.67 passes)"
    )


def test_a_mixture_has_one_built_in_world() -> None:
    train = [Source("playground", world=World(seed=1)), Source("playground")]
    with pytest.raises(
        UserError, match=r"data\.train\.world\.seed: 0 splits the built-in world otherwise than data\.train"
    ):
        SFTDataModule(train, validation=Source("playground", split="held_out"))


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf")])
def test_a_weight_is_a_number_above_zero(weight: float) -> None:
    with pytest.raises(UserError, match="weight"):
        Source("rows.jsonl", weight=weight)
