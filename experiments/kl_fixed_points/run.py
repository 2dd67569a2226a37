"""What each KL estimator, in the reward or as a loss, converges to on a one-token bandit. See README.md beside this."""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Literal, get_args

import torch
from matplotlib.figure import Figure
from torch import Tensor

from rlhf_lit.losses.kl import Estimator, Placement, estimate_kl, exact_kl

FOLDER = Path(__file__).parent
ESTIMATORS: tuple[Estimator, ...] = get_args(Estimator)
OptimizerName = Literal["gradient_descent", "adam"]
RATES: dict[OptimizerName, float] = {"gradient_descent": 4.0, "adam": 0.02}
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)
# Past this a penalty is infinite in the float32 that policies are trained in, though not yet in the float64 used here.
OVERFLOW = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class Bandit:
    """N one-token problems over V tokens with one β: start = π₀ (rows sum to 1), reward = r, both float64 [N, V]."""

    start: Tensor
    reward: Tensor
    beta: float

    def optimum(self) -> Tensor:
        """π* ∝ π₀·exp(r/β), [N, V]."""
        return (self.start.log() + self.reward / self.beta).softmax(-1)


@dataclass(frozen=True)
class Outcome:
    """Where a descent ended: policy [N, V] with total variation [N] to π*, what moved [N] in its second half (as a
    total variation), and the largest penalty [N] any token got on the way. Non-finite gradients freeze a problem."""

    policy: Tensor
    distance: Tensor
    moved: Tensor
    penalty: Tensor


def committed_instance() -> Bandit:
    """The instance of instance.json, as a batch of one."""
    stored = json.loads((FOLDER / "instance.json").read_text())
    start, reward = (torch.tensor([stored[key]], dtype=torch.float64) for key in ("start", "reward"))
    return Bandit(start, reward, stored["beta"])


def random_instances(count: int, tokens: int, beta: float, seed: int) -> Bandit:
    """π₀ the softmax of standard normals, r standard normal."""
    generator = torch.Generator().manual_seed(seed)
    start, reward = torch.randn(2, count, tokens, generator=generator, dtype=torch.float64)
    return Bandit(start.softmax(-1), reward, beta)


def total_variation(left: Tensor, right: Tensor) -> Tensor:
    """½·Σ_v |p(v) − q(v)|, [N, V] → [N]."""
    return (left - right).abs().sum(-1) / 2


def losses(logits: Tensor, bandit: Bandit, estimator: Estimator, placement: Placement) -> tuple[Tensor, Tensor]:
    """The loss whose gradient is the expected policy gradient, [N], and the penalties without gradient, [N, V].

    The expectation over the sampled token is written out, with the sampling detached: Σ_v sg[π(v)]·(…).
    """
    logprobs = logits.log_softmax(-1)
    reference = bandit.start.log()
    sampled = logprobs.detach().exp()
    if estimator == "full":
        penalty = exact_kl(logprobs, reference)[:, None].expand_as(logprobs)
    else:
        penalty = estimate_kl(logprobs - reference, estimator)
    if placement == "reward":
        return -(sampled * logprobs * (bandit.reward - bandit.beta * penalty.detach())).sum(-1), penalty.detach()
    return (sampled * (bandit.beta * penalty - logprobs * bandit.reward)).sum(-1), penalty.detach()


def descend(
    bandit: Bandit, estimator: Estimator, placement: Placement, optimizer: OptimizerName, steps: int
) -> Outcome:
    """Minimise the loss by its exact gradient on the logits, from π₀, the rate falling linearly to 0 over `steps`."""
    logits = bandit.start.log().requires_grad_()
    rate = RATES[optimizer]
    # Adam's ε is kept out of the way: the gradient of a token that is dying out is small, and still counts.
    descent = torch.optim.Adam([logits], eps=1e-12) if optimizer == "adam" else torch.optim.SGD([logits])
    largest = torch.zeros_like(bandit.start)
    halfway = bandit.start
    for step in range(steps):
        loss, penalty = losses(logits, bandit, estimator, placement)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        finite = gradient.isfinite().all(-1, keepdim=True)
        logits.grad = torch.where(finite, gradient, 0)
        descent.param_groups[0]["lr"] = rate * (1 - step / steps)
        descent.step()
        largest = torch.maximum(largest, penalty.abs().nan_to_num(nan=torch.inf))
        if step == steps // 2:
            halfway = logits.detach().softmax(-1)
    policy = logits.detach().softmax(-1)
    return Outcome(
        policy, total_variation(policy, bandit.optimum()), total_variation(policy, halfway), largest.amax(-1)
    )


def nature(bandit: Bandit, outcome: Outcome, row: int) -> str:
    """In words, what the policy of one problem became."""
    policy, optimum = outcome.policy[row], bandit.optimum()[row]
    if outcome.distance[row] < 1e-3:
        return "π*"
    lost = policy < 0.01 * torch.minimum(bandit.start[row], optimum)
    if policy[bandit.reward[row].argmax()] > 0.99:
        words = "argmax r"
    elif lost.any():
        kept = int((~lost).sum())
        words = f"truncated to {kept} token{'s' * (kept > 1)}"
    else:
        words = "biased, full support"
    return f"diverges ({words})" if outcome.penalty[row] > OVERFLOW else words


def draw(bandit: Bandit, policies: dict[tuple[Estimator, Placement], Tensor], path: Path) -> None:
    """One panel a combination: π₀, the policy reached [V] and π* of the first problem."""
    figure = Figure(figsize=(14, 5.2), layout="constrained")
    panels = figure.subplots(len(PLACEMENTS), len(ESTIMATORS), sharex=True, sharey=True)
    tokens = torch.arange(bandit.start.shape[-1])
    optimum = bandit.optimum()
    for i, placement in enumerate(PLACEMENTS):
        for j, estimator in enumerate(ESTIMATORS):
            policy, panel = policies[estimator, placement], panels[i, j]
            distance = float(total_variation(policy[None], optimum[:1]))
            panel.bar(tokens - 0.2, bandit.start[0], 0.4, color="#cccccc", label="π₀")
            panel.bar(tokens + 0.2, policy, 0.4, color="#2a7f62" if distance < 1e-3 else "#c2452d", label="reached")
            panel.plot(tokens + 0.2, optimum[0], "k_", markersize=11, markeredgewidth=2, label="π*")
            where = "in the reward" if placement == "reward" else "as a loss"
            panel.set_title(f"{estimator} {where}: TV {distance:.3f}", fontsize=10)
            panel.set_xticks(tokens, [f"{reward:g}" for reward in bandit.reward[0].tolist()], fontsize=8)
    panels[0, 0].legend(fontsize=8)
    figure.supxlabel("tokens, by their reward")
    figure.supylabel("probability")
    figure.savefig(path, dpi=110)


def main() -> None:
    """Measure the ten combinations; write results.json and fixed_points.png beside this file and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--instances", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # six numbers at a time
    committed = committed_instance()
    drawn = random_instances(arguments.instances, committed.start.shape[-1], committed.beta, arguments.seed)
    both = Bandit(
        torch.cat([committed.start, drawn.start]), torch.cat([committed.reward, drawn.reward]), committed.beta
    )
    rows, policies = [], {}
    print("| optimiser | estimator | placement | TV, committed | ends as | TV, random: mean (min–max) | end as |")
    print("|---|---|---|---|---|---|---|")
    for optimizer, placement, estimator in product(RATES, PLACEMENTS, ESTIMATORS):
        outcome = descend(both, estimator, placement, optimizer, arguments.steps)
        if optimizer == "gradient_descent":
            policies[estimator, placement] = outcome.policy[0]
        natures = [nature(both, outcome, row) for row in range(len(both.start))]
        counts = {words: natures[1:].count(words) for words in sorted(set(natures[1:]))}
        others = outcome.distance[1:]
        rows.append(
            {
                "optimizer": optimizer,
                "estimator": estimator,
                "placement": placement,
                "committed": {
                    "total_variation": float(outcome.distance[0]),
                    "nature": natures[0],
                    "policy": outcome.policy[0].tolist(),
                },
                "random": {"total_variation": others.tolist(), "nature": natures[1:]},
                "moved_in_second_half": float(outcome.moved.max()),
                "largest_penalty": float(outcome.penalty.max().clamp(max=torch.finfo(torch.float64).max)),
            }
        )
        print(
            f"| {optimizer} | {estimator} | {placement} | {float(outcome.distance[0]):.3f} | {natures[0]} "
            f"| {float(others.mean()):.3f} ({float(others.min()):.3f}–{float(others.max()):.3f}) "
            f"| {', '.join(f'{count} × {words}' for words, count in counts.items())} |"
        )
    stored = {**vars(arguments), "beta": committed.beta, "optimum": committed.optimum()[0].tolist(), "rows": rows}
    (FOLDER / "results.json").write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n")
    draw(committed, policies, FOLDER / "fixed_points.png")


if __name__ == "__main__":
    main()
