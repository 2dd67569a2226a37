"""Never train on noise: an engine's own log-probs are held against the training forward before a rollout is learnt."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import vllm_double
from torch import Tensor

from rlhf_lit.algorithms import RLOO
from rlhf_lit.batches import Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.models.base import Base
from rlhf_lit.rollout.engine import Samples, sample
from rlhf_lit.rollout.gap import median_gap, require_own_samples
from rlhf_lit.rollout.vllm_engine import VLLM

OPTIONS = (
    "--model=RLOO", "--data=RolloutDataModule", "--model.base.name=model", "--model.kl=FixedKL", "--model.kl.beta=0.1",
    "--model.reward=RewardFromFunction", "--model.reward.function=tiny.word_count", "--model.learning_rate=1e-3",
    "--model.sampling.max_new_tokens=8", "--data.train.path=prompts.txt", "--data.template=none",
    "--data.samples_per_prompt=2", "--data.rollout_size=4", "--data.batch_size=8", "--data.ppo_epochs=1",
    "--trainer.max_steps=4", "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu",
    "--model.vllm.dtype=float32", "--name=noise", "--preflight=false",
)  # fmt: skip


@pytest.mark.parametrize("draw", [1, 3])
def test_a_run_ends_before_it_learns_from_noise(
    command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, draw: int
) -> None:
    """Through the command line, whatever preflight says: from the first draw, or once an update does not arrive."""
    vllm_double.install(monkeypatch)
    monkeypatch.setattr(vllm_double.LLM, "noise_from", draw)
    tiny.save_model(Path("model"))
    Path("prompts.txt").write_text("".join(f"w{3 + i} w{4 + i}\n" for i in range(16)))
    answer = command("fit", *OPTIONS)
    assert answer.status == 2, answer.err
    lines = [line for line in answer.err.splitlines() if "error" in line]
    assert len(lines) == 1, answer.err
    assert f"error: rollout {draw - 1}: the sampler's log-probs and those of the training forward are" in lines[0]
    assert "nats apart in the median token, and 0.0001 are allowed, so nothing is learnt from it" in lines[0]
    assert "set model.vllm to null" in lines[0]
    assert "Traceback" not in answer.err
    steps = []
    for file in Path("runs/noise").glob("*/metrics.csv"):
        with file.open(newline="") as rows:
            steps = [row for row in csv.DictReader(rows) if row["policy/loss"]]
    assert len(steps) == draw - 1
    assert all(float(row["rollout/sampler_gap"]) < 1e-4 for row in steps)


@pytest.mark.parametrize(("shift", "ends"), [(5e-5, False), (2e-4, True)])
def test_any_engine_is_held_to_it(llama: str, shift: float, ends: bool) -> None:
    """A little under the bound of float32 a rollout is learnt from; a little over it is not."""

    def off(*asked: Any) -> Samples:
        drawn = sample(*asked)
        sampled = drawn.sampled_logprobs + torch.where(drawn.sequences.mask, shift, 0.0)
        return Samples(drawn.sequences, sampled, drawn.ended)

    module = tiny.make_on_policy(RLOO, Base(llama))
    module.engine = off
    prompts = tiny.repeated(tiny.prompts(4), 2)
    if ends:
        with pytest.raises(UserError, match=r"^rollout 7: .* are 0\.0002 nats apart .* its generation is broken"):
            module.rollout(prompts, 7)
    else:
        module.rollout(prompts, 7)


def test_the_median_of_all_tokens_is_judged() -> None:
    """Single tokens may go elsewhere by rounding (a mixture's routers), and in narrow dtypes single rows are off."""
    sequences = Sequences.pad([[5] * 9, [5] * 9, [5] * 3], [[False] + [True] * 8, [False] + [True] * 8, [False] * 3])
    scored = torch.zeros(sequences.tokens.shape)

    def gap(distance: Tensor) -> float:
        return median_gap(Samples(sequences, distance, torch.ones(3, dtype=torch.bool)), scored)

    off = torch.full((3, 9), 0.01)
    off[0, 1:8] = 3.0
    assert gap(off) == pytest.approx(0.01)
    off[1, 1:4] = 3.0
    assert gap(off) == pytest.approx(3.0)
    assert gap(torch.full((3, 9), torch.nan)) == torch.inf
    nothing = Sequences.pad([[5] * 9], [[False] * 9])
    assert median_gap(Samples(nothing, scored[2:], torch.ones(1)), scored[2:]) == 0


def test_a_number_that_is_none_is_over_every_bound() -> None:
    require_own_samples(0.1, 0.1, 0, None)
    with pytest.raises(UserError, match=r"are inf nats apart .* set model\.vllm to null"):
        require_own_samples(torch.inf, 0.1, 0, VLLM())
