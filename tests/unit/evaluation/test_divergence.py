"""KL of responses against plain softmaxes over the logits of both models."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny
import torch

from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.evaluation.divergence import kl_per_response
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm
from rlhf_lit.rollout.engine import Sampling


@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("budget", [10_000, 30])
def test_both_estimates_at_the_temperature_of_sampling(tmp_path: Path, temperature: float, budget: int) -> None:
    names = [tiny.save_model(tmp_path / str(seed), seed=seed) for seed in (0, 1)]
    module = tiny.build(SFT(Base(name=names[0]), sampling=Sampling(temperature=temperature)))
    reference = load_causal_lm(Base(name=names[1]))
    module.roles.use_reference(reference)
    module.eval()
    sequences = tiny.sequences(tiny.RAGGED)
    exact, k1 = kl_per_response(module, sequences, budget)
    with torch.no_grad():
        ours, theirs = (
            (model(sequences.tokens).logits[:, :-1].double() / temperature).log_softmax(-1)
            for model in (module.roles.policy, reference)
        )
    mask, tokens = sequences.mask[:, 1:], sequences.tokens[:, 1:, None]
    full = (ours.exp() * (ours - theirs)).sum(-1)
    ratio = (ours - theirs).gather(-1, tokens).squeeze(-1)
    assert exact == pytest.approx((full * mask).sum(-1).numpy(), abs=1e-4)
    assert k1 == pytest.approx((ratio * mask).sum(-1).numpy(), abs=1e-4)
    assert min(exact) > 0
