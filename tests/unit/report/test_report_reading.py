"""Which runs are meant, and files that are damaged."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml
from report_runs import DPO, changed, write_run

from rlhf_lit.errors import UserError
from rlhf_lit.report import folder
from rlhf_lit.report.metrics import read_metrics
from rlhf_lit.report.reading import read, read_all

ROWS = ({"step": 0, "train/loss": 0.7}, {"step": 1, "train/loss": 0.6, "val/loss": 0.65})


def test_metrics_are_read_by_column(tmp_path: Path) -> None:
    found = read_metrics(write_run(tmp_path / "a", DPO, ROWS) / "metrics.csv")
    assert list(found) == ["train/loss", "val/loss"]
    assert found["train/loss"].values.tolist() == [0.7, 0.6]
    assert (found["val/loss"].steps.tolist(), found["val/loss"].values.tolist()) == ([1], [0.65])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("epoch,step,a\n0,0,1\n0,1", "row 2 does not end"),
        ("epoch,step,a\n0,0,1\n0,1\n0,2,3\n", "row 2 has 2 of 3 cells"),
        ("epoch,step,a\n0,0,x\n", "row 1: could not convert"),
        ("epoch,step,a\n0,,1\n", "row 1: invalid literal"),
        ("epoch,step,a\n", "no rows"),
        ("", "no rows"),
    ],
)
def test_torn_metrics_are_named_by_their_row(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "metrics.csv").write_text(text)
    with pytest.raises(UserError, match=complaint):
        read_metrics(tmp_path / "metrics.csv")


def test_a_name_is_its_newest_finished_version(tmp_path: Path) -> None:
    for i in range(3):
        write_run(tmp_path / "dpo" / f"version_{i}", changed(DPO, seed_everything=i))
    (tmp_path / "dpo" / "version_2" / "hf").rmdir()
    runs, left = read_all([str(tmp_path / "dpo"), str(tmp_path / "dpo" / "version_1")])
    assert [run.seed for run in runs] == [1], "once, though it was named twice"
    assert [one.folder for one in left] == [str(tmp_path / "dpo" / "version_2")]
    assert "no hf/" in left[0].reason


def test_a_sweeps_unfinished_arms_are_left_out_by_name(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"method": "grid", "seed": 0, "count": None, "metric": None}))
    for name, status, error in (
        ("000-a", "finished", None),
        ("001-b", "failed", "out of memory"),
        ("002-c", "waiting", None),
    ):
        arm = {"name": name, "parameters": {}, "arguments": [], "status": status, "run": "version_0", "error": error}
        write_run(tmp_path / name / "version_0", DPO)
        (tmp_path / name / "arm.json").write_text(json.dumps(arm))
    runs, left = read_all([str(tmp_path)])
    assert [run.folder for run in runs] == [tmp_path / "000-a" / "version_0"]
    assert [str(one) for one in left] == [
        f"{tmp_path}/001-b: the sweep has it as failed: out of memory",
        f"{tmp_path}/002-c: the sweep has it as waiting",
    ]


def test_a_run_that_went_on_is_what_it_became(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", DPO)
    for i, steps in ((1, 20), (2, 30), (10, 40)):
        later = changed(DPO, trainer__max_steps=steps, ckpt_path="runs/dpo/version_0/checkpoints/last.ckpt")
        (run / f"config_resumed_{i}.yaml").write_text(yaml.safe_dump(later))
    assert read(run).config == changed(DPO, trainer__max_steps=40), "and its own checkpoint is not where it began"


def test_what_a_model_writes_may_hold_other_ends_of_lines(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", DPO)
    rows = [{"step": 1, "response": "a\u2028b\x85c\x0bd"}, {"step": 2, "response": ""}]
    (run / "samples.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    assert read(run).samples == rows


def test_damaged_files_are_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", DPO)
    (run / "samples.jsonl").write_text('{"step": 1}\n{"step"')
    with pytest.raises(UserError, match=r"samples\.jsonl is torn: line 2"):
        read(run)
    (run / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"config\.yaml is not a run's configuration"):
        read(run)


# --- the report's own folder -----------------------------------------------------------------------------------------


def test_an_earlier_report_is_replaced_as_a_whole(tmp_path: Path) -> None:
    place = tmp_path / "out"
    folder.write(place, {"report.html": b"1", "figures/old.svg": b"1"})
    folder.write(place, {"report.html": b"2", "figures/new.svg": b"2"})
    assert (place / "report.html").read_bytes() == b"2"
    assert [file.name for file in (place / "figures").iterdir()] == ["new.svg"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("name", ["notes.txt", "figures/mine.tex"])
def test_what_is_not_a_reports_is_never_deleted(tmp_path: Path, name: str) -> None:
    folder.write(tmp_path / "out", {"report.html": b"1", "figures/old.svg": b"1"})
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(UserError, match=f"{name} in it is not a report's"):
        folder.write(tmp_path / "out", {"report.html": b"2"})
    assert (tmp_path / "out" / name).read_text() == "mine"
    assert (tmp_path / "out" / "report.html").read_bytes() == b"1"


def test_where_writing_fails_the_earlier_report_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "out"
    folder.write(place, {"report.html": b"1"})
    replace = os.replace

    def fail(path: Path, target: Path) -> None:
        if target == place and not path.name.endswith(".earlier.partial"):
            raise OSError(28, "No space left on device")
        replace(path, target)

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        folder.write(place, {"report.html": b"2"})
    assert (place / "report.html").read_bytes() == b"1"
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
