"""What the callback of the loop leaves behind: nothing."""

from __future__ import annotations

import random

import numpy as np
import pytest
import tiny
import torch
from lightning import Trainer

from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.evaluation import WinRate
from rlhf_lit.models.base import Base
from rlhf_lit.rollout.rewards import RewardFromFunction


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_random_states_are_as_before(tmp_path: object, fails: bool) -> None:
    """Where a judge draws random numbers; modes also where it fails, of parts in training and of others."""
    module = tiny.build(SFT(Base(name=tiny.save_model(tmp_path, "gpt2"))))  # type: ignore[arg-type]
    module.roles.policy.transformer.h[0].eval()
    before = {name: part.training for name, part in module.named_modules()}
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    callback = WinRate(RewardFromFunction(tiny.word_count))
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    expected = draws()
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    try:
        with callback._aside(trainer, module):
            assert not any(part.training for part in module.modules())
            assert not torch.is_grad_enabled()
            draws()
            if fails:
                raise RuntimeError("a judge")
    except RuntimeError:
        assert fails
    assert fails or draws() == expected, "a run whose judge fails ends"
    assert {name: part.training for name, part in module.named_modules()} == before
    assert len(set(before.values())) == 2
