"""What the reward makes of a few sampled responses."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_lit.errors import UserError
from rlhf_lit.preflight.check import Check, count, judge
from rlhf_lit.preflight.models import relative


def scores_vary(scores: Tensor) -> Check:
    """Equal scores teach nothing; but a verifiable reward may be 0 on all of a few answers, so the run goes on."""
    low, high = float(scores.min()), float(scores.max())
    found = f"{low:.4g} to {high:.4g} on {count(len(scores), 'answer')}"
    if not bool(scores.isfinite().all()):
        return Check("reward scores", "failed", found, "the reward model is broken, or too wide for its dtype")
    if low == high and len(scores) > 1:
        found = f"all {len(scores)} are {low:.4g}"
        return Check("reward scores", "warning", found, "a reward that never varies teaches nothing")
    return Check("reward scores", "ok", found)


def scores_alone(score: Callable[[Tensor], Tensor], scores: Tensor, limit: float) -> Check:
    """A response's score is its own: alone or among others, the same.

    Args:
        score: [n] numbers of responses → [n] their scores, as a batch.
        scores: [rows] of all of them together.
        limit: how far apart they may lie, relative to the larger of 1 and the scores.
    """
    name, advice = "reward alone", "a score must not depend on the other responses or on padding: score each by itself"
    try:
        alone = torch.cat([score(row[None]) for row in torch.arange(len(scores))])
    except Exception as error:  # the reward is anybody's code, and it did score them together
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Check(name, "failed", f"a response alone cannot be scored: {reason}", advice)
    apart = relative(alone, scores)
    if apart > limit and (again := relative(score(torch.arange(len(scores))), scores)) > limit:
        found = f"the same responses scored twice lie {again:.1g} apart"
        return Check(name, "warning", found, "a noisy reward: whether it depends on the batch cannot be told")
    return judge(name, apart <= limit, f"alone and in a batch {apart:.1g} apart, {limit:g} allowed", advice)
