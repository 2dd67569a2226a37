"""Run folders written by hand, where a test must know every number in them."""

from __future__ import annotations

import copy
import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlhf_lit.report.comparing import arms_of
from rlhf_lit.report.reading import Run, read
from rlhf_lit.report.study import Study

DPO: dict[str, Any] = {
    "seed_everything": 0,
    "trainer": {"max_steps": 10, "accelerator": "cpu", "devices": "auto", "precision": None},
    "model": {
        "class_path": "rlhf_lit.algorithms.DPO",
        "init_args": {
            "base": {"name": "tiny", "attention": None},
            "loss": {"class_path": "rlhf_lit.losses.preference.DPOLoss", "init_args": {"beta": 0.1}},
            "sampling": {"max_new_tokens": 4, "rows_at_once": 64},
        },
    },
    "data": {
        "class_path": "rlhf_lit.data.modules.PreferenceDataModule",
        "init_args": {"train": {"path": "pairs.jsonl"}, "micro_batch_tokens": 8192},
    },
    "name": "dpo",
    "runs": "runs",
    "ckpt_path": None,
}
PPO: dict[str, Any] = {
    **DPO,
    "model": {
        "class_path": "rlhf_lit.algorithms.PPO",
        "init_args": {
            "base": {"name": "tiny"},
            "reward": {
                "class_path": "rlhf_lit.rollout.rewards.RewardSum",
                "init_args": {"sources": {}, "weights": {"proxy": 1.0, "truth": 0.0}},
            },
        },
    },
}


def changed(config: Mapping[str, Any], **values: Any) -> dict[str, Any]:
    """A configuration with other values, by keys whose dots are double underscores."""
    result = copy.deepcopy(dict(config))
    for key, value in values.items():
        *parents, last = key.split("__")
        place = result
        for parent in parents:
            place = place[parent]
        place[last] = value
    return result


def write_run(folder: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, float]] = ({"step": 0},)) -> Path:
    """A finished run's folder."""
    (folder / "hf").mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config)))
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", *columns], restval="")
        writer.writeheader()
        writer.writerows({"epoch": 0, **row} for row in rows)
    return folder


def made(folder: Path, config: Mapping[str, Any], rows: Sequence[Mapping[str, float]] = ({"step": 0},)) -> Run:
    """The same, read."""
    return read(write_run(folder, config, rows))


def write_evaluation(folder: Path, run: Run, lines: Sequence[Mapping[str, Any]], **numbers: Any) -> None:
    """What ``evaluate`` leaves, as far as a report reads it: lines of prompt, sample, model and its scores."""
    folder.mkdir(parents=True)
    judges = {key.removeprefix("model/") for line in lines for key in line if key.startswith("model/")} - {"tokens"}
    found = {
        "model": str(run.folder / "hf"),
        "baseline": None,
        "reference": None,
        "judges": {name: f"some.{name}" for name in sorted(judges)},
        "settings": {"seed": 0, "samples": 1, "sampling": {"temperature": 1.0, "rows_at_once": 8}, "template": "auto"},
        "files": {"prompts": {"file": "prompts.jsonl", "total": len(lines)}},
        "responses": {"model": {"length": {"mean": 1.0, "low": 1.0, "high": 1.0}}},
        "win_rates": {},
        "best_of_n": [],
        "kl": None,
        **numbers,
    }
    (folder / "evaluation.json").write_text(json.dumps(found))
    (folder / "samples.jsonl").write_text("".join(json.dumps({"sample": 0, **line}) + "\n" for line in lines))


def study_of(runs: Sequence[Run], evaluations: Mapping[Path, Any] | None = None) -> Study:
    """The runs, compared."""
    arms, left = arms_of(runs)
    return Study(("runs",), tuple(arms), dict(evaluations or {}), tuple(left))
