"""REINFORCE with a leave-one-out baseline.

Kool et al. 2019; Ahmadian et al. 2024, "Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human
Feedback in LLMs" (arXiv 2402.14740).

A whole response is one action, judged by the other responses to its prompt: ``LeaveOneOut`` in
``losses/advantages.py``. The rollout (``rollout/collect.py``) and the update (``on_policy.py``) are those of every
on-policy algorithm; with one pass over each rollout and one minibatch, ρ = 1 and the clipped objective's gradient is
REINFORCE's. In the paper k1 stands in the reward: R = score − β·Σ_t k1.

Left out: a critic.
"""

from __future__ import annotations

from rlhf_lit.algorithms.on_policy import OnPolicy


class RLOO(OnPolicy):
    """A policy trained on its own samples, each compared with the others to its prompt; no critic.

    Needs ``data.samples_per_prompt`` of 2 or more. Arguments: see ``OnPolicy``, whose defaults are RLOO's.
    """
