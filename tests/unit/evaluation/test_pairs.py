"""Pair files and RewardBench's: what is read, who wins, and what a section weighs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

from rlhf_lit.data.records import RowReport, Source
from rlhf_lit.errors import UserError
from rlhf_lit.evaluation.pairs import Contest, pair_report, read_contests, score_contests
from rlhf_lit.evaluation.reward_bench import SECTIONS

SUBSETS = [name for parts in SECTIONS.values() for name in parts]


def write(folder: Path, rows: list[dict[str, Any]]) -> Source:
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(file))


def contest(subset: str | None = None) -> Contest:
    return Contest((), ((),), ((),), subset, 0, None)


def report_of(scores: list[tuple[list[float], list[float]]], subsets: list[str | None] | None = None) -> Any:
    arrays = [(np.array(chosen), np.array(rejected)) for chosen, rejected in scores]
    contests = [contest(subset) for subset in subsets or [None] * len(scores)]
    return pair_report(contests, arrays, arrays)


def test_both_shapes_are_read_side_by_side(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"id": 7, "prompt": "a?", "chosen": "b", "rejected": "c", "subset": "donotanswer"},
        {"id": "x", "prompt": "a?", "chosen": ["b", "bb"], "rejected": ["c", "d", "e"], "subset": "Math"},
        {"id": "ref:1", "prompt": "a?", "chosen": ["b"], "rejected": ["c"], "subset": "Ties"},
        {"id": 9, "prompt": "a?", "chosen": ["b"], "rejected": ["c", ""], "subset": "Math"},
        {"id": 9, "prompt": "a?", "chosen": ["b"], "rejected": ["c", "b"], "subset": "Math"},
        {"id": 9, "prompt": "a?", "chosen": ["b"], "rejected": [], "subset": "Math"},
        {"id": 9, "prompt": None, "chosen": ["b"], "rejected": ["c"], "subset": "Math"},
    ]
    found, report = read_contests(write(tmp_path, rows), "skip")
    assert [(one.id, one.subset, one.row, len(one.chosen), len(one.rejected)) for one in found] == [
        ("7", "donotanswer", 0, 1, 1),
        ("x", "Math", 1, 2, 3),
    ]
    assert [answer[0].content for answer in found[1].rejected] == ["c", "d", "e"]
    assert report.summary() == (
        "pairs.jsonl: 2 of 7 rows used; skipped 2 empty rejected (rows 5, 3), 1 null prompt (row 6), 1 of "
        "RewardBench 2's Ties, which are not scored row by row (row 2), 1 chosen equals rejected (row 4)"
    )
    with pytest.raises(UserError, match="row 2: of RewardBench 2's Ties"):
        read_contests(write(tmp_path, rows[:3]), "error")
    with pytest.raises(UserError, match="no usable row"):
        read_contests(write(tmp_path, rows[2:3]), "skip")


def test_renamed_columns(tmp_path: Path) -> None:
    source = write(tmp_path, [{"q": "a?", "good": ["b"], "bad": ["c", "d"], "subset": 3}])
    source.columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    ((one,), _) = read_contests(source, "error")
    assert (one.subset, len(one.rejected)) == ("3", 2)


def test_right_is_strictly_higher_than_every_other() -> None:
    """Right; tie; wrong; best chosen beats all; one rejected above; one rejected level with the best chosen."""
    found = report_of(
        [
            ([1.0], [0.5]),
            ([1.0], [1.0]),
            ([0.0], [1.0]),
            ([-1.0, 2.0], [1.0, 0.0]),
            ([2.0], [3.0, 0]),
            ([2, 1], [2, 0]),
        ],
        ["a", "a", "b", "b", "b", None],
    )
    assert (found.overall.right, found.overall.ties, found.overall.count) == (2, 2, 6)
    assert found.overall.accuracy.mean == pytest.approx(2 / 6)
    assert {name: (part.right, part.ties, part.count) for name, part in found.subsets.items()} == {
        "a": (1, 1, 2),
        "b": (1, 0, 3),
    }
    assert found.sections == {}
    assert found.score is None


def test_sections_weigh_rows_alike_and_mathematics_as_much_as_code() -> None:
    """Chat: 2 of 3 rows of alpacaeval-easy and all of the other four right: 6/7, not a mean of subsets. Reasoning:
    mathematics all wrong, code all right: ½, though code has six subsets."""
    scores: list[tuple[list[float], list[float]]] = []
    names: list[str | None] = []
    for name in SUBSETS:
        for copy in range(3 if name == "alpacaeval-easy" else 1):
            right = name != "math-prm" and not (name == "alpacaeval-easy" and copy == 0)
            scores.append(([float(right)], [0.5]))
            names.append(name)
    found = report_of(scores, names)
    means = {name: section.mean for name, section in found.sections.items()}
    assert means == pytest.approx({"Chat": 6 / 7, "Chat Hard": 1.0, "Safety": 1.0, "Reasoning": 0.5})
    assert found.score is not None
    assert found.score.mean == pytest.approx((6 / 7 + 2.5) / 4)
    without = [i for i, name in enumerate(names) if name != "hep-go"]
    partial = report_of([scores[i] for i in without], [names[i] for i in without])
    assert set(partial.sections) == {"Chat", "Chat Hard", "Safety"}
    assert partial.score is None


def test_each_answer_is_scored_and_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    rows = [
        {"prompt": "w3 w4", "chosen": ["w5 w6 w7", "w5"], "rejected": ["w8 w9"]},
        {"prompt": "w3 " * 30, "chosen": "w5", "rejected": "w6"},
        {"prompt": "w3", "chosen": "w9", "rejected": "w8 w7"},
    ]
    contests, report = read_contests(write(tmp_path, rows), "skip")
    asked = []

    def score(sequences: Any) -> torch.Tensor:
        asked.append(sequences)
        return sequences.mask.sum(-1).float()

    kept, scores, lengths = score_contests(contests, score, tiny.make_tokenizer(), 25, "none", report)
    assert [one.row for one in kept] == [0, 2]
    assert [(list(a), list(b)) for a, b in scores] == [([4, 2], [3]), ([2], [3])], "the answer and its EOS"
    assert [(list(a), list(b)) for a, b in lengths] == [([4, 2], [3]), ([2], [3])]
    assert "skipped 1 over-long (row 1)" in report.summary()
    assert len(asked) == 1
    found = pair_report(kept, scores, lengths)
    assert (found.longer.right, found.longer.count) == (1, 2)


def test_a_score_that_is_no_number_names_its_row(tmp_path: Path) -> None:
    rows = [{"prompt": "w3", "chosen": "w5", "rejected": "w6"}, {"prompt": "w4", "chosen": "w5", "rejected": "w6"}]
    contests, report = read_contests(write(tmp_path, rows), "skip")

    def score(sequences: Any) -> torch.Tensor:
        return torch.tensor([1.0, 2.0, 3.0, float("nan")])

    with pytest.raises(UserError, match=r"pairs.jsonl, row 1: an answer to 'w4' has a score that is NaN or infinite"):
        score_contests(contests, score, tiny.make_tokenizer(), None, "none", report)
    with pytest.raises(UserError, match="no usable row is left"):
        score_contests(contests, score, tiny.make_tokenizer(), 1, "none", RowReport("pairs.jsonl"))
