"""The page about Python, run as it stands, and what it promises about going on from a checkpoint."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule, Trainer, seed_everything
from lightning.pytorch import Callback

from rlhf_lit.algorithms import SFT
from rlhf_lit.data.modules import SFTDataModule
from rlhf_lit.data.records import Source
from rlhf_lit.models.base import PLAYGROUND, Base
from rlhf_lit.models.loading import load_causal_lm
from rlhf_lit.trainer.callbacks import Checkpoint

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
SETTINGS: dict[str, Any] = {
    "use_distributed_sampler": False, "inference_mode": False, "num_sanity_val_steps": 0, "log_every_n_steps": 1,
    "accelerator": "cpu", "logger": False, "enable_progress_bar": False,
}  # fmt: skip


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a model and pairs, as the page's reader has them."""
    from transformers import AutoTokenizer

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))  # the tokenisation cache
    load_causal_lm(Base(name="playground", fresh=True)).save_pretrained(tmp_path / "policy")  # type: ignore[operator]
    AutoTokenizer.from_pretrained(PLAYGROUND).save_pretrained(tmp_path / "policy")
    rows = [
        {"prompt": f"what is {i} plus {i}?", "chosen": f"{2 * i}.", "rejected": "i do not know that."}
        for i in range(40)
    ]  # fmt: skip
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def test_the_page_runs_from_top_to_bottom(place: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    assert len(blocks) == 4
    seen: dict[str, Any] = {"__name__": "page"}
    steps = []
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), seen)
        steps.append(seen["trainer"].global_step)
        if len(steps) == 1:
            assert seen["trainer"].callback_metrics["val/accuracy"] > 0.9, "the pairs are easy to tell apart"
    assert steps == [8, 8, 12, 8], "2 × 4; none; on to 3 × 4; 2 rollouts × 2 × 2"
    exported, trained = (
        seen["policy"].state_dict(),
        torch.load(place / "runs/from_python/checkpoints/last.ckpt", weights_only=True)["state_dict"],
    )
    assert torch.equal(
        exported["model.embed_tokens.weight"], trained["roles.models.policy.model.embed_tokens.weight"]
    )  # fmt: skip
    assert len(Path("runs/from_python/samples.jsonl").read_text().splitlines()) == 2 * 8


class Stop(Callback):
    """Ends training once a step is done, as a crash would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("the power went out")


def test_a_run_from_python_resumes_in_the_middle_of_an_epoch(place: Path) -> None:
    def fit(folder: str, *callbacks: Callback, ckpt_path: str | None = None) -> dict[str, torch.Tensor]:
        seed_everything(0)
        model = SFT(Base(name="policy"), learning_rate=1e-2)
        data = SFTDataModule(Source("pairs.jsonl"), batch_size=6)
        saving = Checkpoint(every_n_train_steps=3)
        trainer = Trainer(max_epochs=2, default_root_dir=folder, callbacks=[saving, *callbacks], **SETTINGS)
        trainer.fit(model, data, ckpt_path=ckpt_path)
        return model.state_dict()

    whole = fit("whole")
    with pytest.raises(RuntimeError, match="the power went out"):
        fit("broken", Stop(5))
    resumed = fit("broken", ckpt_path="broken/checkpoints/last.ckpt")
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
