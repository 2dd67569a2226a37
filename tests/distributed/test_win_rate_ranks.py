"""The callback of the loop on two ranks: the numbers of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from processes import Run
from run_folders import metrics, save_small_model

HERE = Path(__file__).parent
WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def letters(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A judge that ties now and then."""
    return [float(sum(map(ord, response)) % 5) for response in responses]


@pytest.mark.soak  # three processes of one core
def test_two_ranks_find_what_one_finds(tmp_path: Path) -> None:
    """Seven prompts, so that one rank has four and the other three; the third row's prompt comes again and counts
    once."""
    rows = [{"prompt": " ".join(WORDS[i % 7 :]), "completion": WORDS[i]} for i in range(8)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save_small_model(tmp_path / "small")
    judge = {"class_path": "RewardFromFunction", "init_args": {"function": "test_win_rate_ranks.letters"}}
    pairs = [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "zero"} for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    config = {
        "model": {
            "class_path": "DPO",
            "init_args": {
                "base": {"name": "small"}, "sampling": {"max_new_tokens": 6}, "learning_rate": 1e-3,
                "optimizer": {"eps": 1e-2}, "loss": {"class_path": "DPOLoss", "init_args": {"beta": 0.1}},
            },
        },
        "data": {
            "class_path": "PreferenceDataModule",
            "init_args": {
                "train": {"path": "pairs.jsonl"}, "validation": {"path": "pairs.jsonl"},
                "batch_size": 4, "cache": None,
            },
        },
        "trainer": {
            "max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False,
            "callbacks": [{"class_path": "rlhf_lit.evaluation.WinRate", "init_args": {"judge": judge}}],
        },
    }  # fmt: skip
    (tmp_path / "dpo.yaml").write_text(yaml.safe_dump(config))
    found = []
    for ranks in (1, 2):
        strategy = ["--trainer.strategy=ddp", f"--trainer.devices={ranks}"] if ranks > 1 else []
        argv = ["fit", "--config=dpo.yaml", f"--name=of_{ranks}", *strategy]
        Run(*argv, folder=tmp_path, path=[HERE], ranks=ranks).wait()
        rows_of = [row for row in metrics(tmp_path / "runs" / f"of_{ranks}" / "version_0") if row["val/win_rate"]]
        assert len(rows_of) == 1
        found.append(rows_of[0])
    names = [name for name in found[0] if name.startswith("val/") and ("win" in name or "judge" in name or "_" in name)]
    assert {"val/win_rate", "val/tie_rate", "val/response_length", "val/kl_to_reference"} <= set(names)
    for name in names:
        assert float(found[1][name]) == pytest.approx(float(found[0][name]), abs=1e-5), name
    assert (float(found[0]["val/win_rate"]) * 14).is_integer() or 14 * float(found[0]["val/win_rate"]) == pytest.approx(
        round(14 * float(found[0]["val/win_rate"])), abs=1e-5
    ), "a mean of seven prompts"
