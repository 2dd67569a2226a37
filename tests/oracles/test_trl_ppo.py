"""PPO's pieces against TRL's last PPO (1.12.0, experimental) and the original one (0.11.4), from golden values.

``golden/make.py`` had TRL's own lines compute ``golden/ppo.json``, in float64, and says how to do so again. Ours are
the same numbers to 1e-12, with these peculiarities of TRL's converted where they matter:

* the last PPO places the score one token past EOS, and trains its critic there (``padding_mask_p1``; TRL #3750, #1893);
  the original placed it on the last token, as ours does;
* both whiten with the unbiased variance, where N+ (arXiv 2403.17031) and ours take the population's (no issue);
* the last PPO tells padding by its token id (TRL #1623): the golden run has a pad token of its own, and none sampled;
* the last PPO takes `max_grad_norm` and never clips (no issue; #3961 comes near it): ``golden/make.py`` asserts it.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf_lit.losses.advantages import generalised_advantages
from rlhf_lit.losses.kl import AdaptiveKL, Estimator, estimate_kl, exact_kl
from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss, ClippedValueLoss
from rlhf_lit.losses.reductions import masked_mean, moments, row_sums, whiten
from rlhf_lit.rollout import collect

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "golden" / "ppo.json").read_text())
LAST, ORIGINAL = GOLDEN["last"], GOLDEN["original"]


def tensor(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mask_of(values: list[Any]) -> Tensor:
    return torch.tensor(values, dtype=torch.bool)


def assert_equal(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def token_rewards(golden: dict[str, Any], logprobs: Tensor, beta: float, mask: Tensor) -> Tensor:
    """What PPO makes of the golden scores and log-probs, the score on the last action."""
    penalty = beta * estimate_kl(logprobs - tensor(golden["reference_logprobs"]), "k1")
    return collect.token_rewards(tensor(golden["scores"]), penalty, mask)


def whiten_unbiased(values: Tensor, mask: Tensor, precision: torch.dtype) -> Tensor:
    """Ours, converted to the unbiased variance σ²·n/(n − 1) that TRL divides by, n/(n − 1) rounded to a dtype."""
    count, total, squares = moments(values, mask)
    variance = squares / count - (total / count).square()
    correction = (count / (count - 1)).to(precision)
    conversion = (variance + 1e-8) / (variance * correction + 1e-8)
    return whiten(values, mask, count, total, squares) * conversion.sqrt()


# The last PPO


@pytest.mark.parametrize(("estimator", "name"), [("k1", "kl"), ("k3", "k3")])
def test_last_kl_estimators(estimator: Estimator, name: str) -> None:
    actions = mask_of(LAST["actions"])
    kl = estimate_kl(tensor(LAST["old_logprobs"]) - tensor(LAST["reference_logprobs"]), estimator)
    assert_equal(kl[actions], tensor(LAST[name])[actions])
    if estimator == "k1":
        assert float(row_sums(kl, actions).mean()) == pytest.approx(LAST["logged"]["objective/kl"], rel=1e-12)


def test_last_advantages_and_returns_from_its_own_rewards() -> None:
    """With the token past EOS taken for an action, as TRL takes it (#3750)."""
    settings, mask, values = LAST["settings"], mask_of(LAST["actions_and_one_past"]), tensor(LAST["values"])
    advantages, returns = generalised_advantages(
        tensor(LAST["rewards"]), values, mask, settings["gamma"], settings["lam"]
    )
    assert_equal(advantages, tensor(LAST["advantages"]))
    assert_equal(returns, tensor(LAST["returns"]))


def test_last_score_one_token_past_eos() -> None:
    """TRL #3750: with s the score, V′ the value past EOS and T its position, ours exceed TRL's advantages at t ≤ T by
    (γλ)^(T−t)·((1 − γλ)s − γ(1 − λ)V′); where a response fills its length there is no token past it, and no difference.
    """
    gamma, lam, beta = (LAST["settings"][name] for name in ("gamma", "lam", "kl_coef"))
    actions, past = mask_of(LAST["actions"]), mask_of(LAST["actions_and_one_past"])
    values, scores = tensor(LAST["values"]), tensor(LAST["scores"])
    rewards = token_rewards(LAST, tensor(LAST["old_logprobs"]), beta, actions)
    advantages, _ = generalised_advantages(rewards, values, actions, gamma, lam)

    ended = past.sum(-1) > actions.sum(-1)
    assert ended.tolist() == [True, False, True, False]
    past_value = row_sums(values, past & ~actions)
    at_eos = torch.where(ended, (1 - gamma * lam) * scores - gamma * (1 - lam) * past_value, 0.0)
    distance = actions.sum(-1, keepdim=True) - 1 - torch.arange(actions.shape[1])
    difference = torch.where(actions, (gamma * lam) ** distance.double() * at_eos[:, None], 0.0)
    assert float(difference.abs().max()) > 0.1
    assert_equal(advantages - difference, torch.where(actions, tensor(LAST["advantages"]), 0.0))


def test_last_whitening() -> None:
    """Over the actions alone, with the unbiased variance; its n/(n − 1), of a boolean mask, is a float32 quotient."""
    actions, advantages = mask_of(LAST["actions"]), tensor(LAST["advantages"])
    assert_equal(whiten_unbiased(advantages, actions, torch.float32), tensor(LAST["whitened_advantages"]))


@pytest.mark.parametrize("step", range(2))
def test_last_losses_and_their_gradients(step: int) -> None:
    """The first step at ratio 1, the second with both clips at work; the value's loss covers the token past EOS."""
    settings, update = LAST["settings"], LAST["updates"][step]
    actions, past = mask_of(LAST["actions"]), mask_of(LAST["actions_and_one_past"])
    logprobs, values = tensor(update["logprobs"]).requires_grad_(), tensor(update["values"]).requires_grad_()
    old = tensor(LAST["old_logprobs"])

    policy_loss = ClippedPolicyLoss(clip_low=settings["cliprange"])
    value_loss = ClippedValueLoss(clip=settings["cliprange_value"], coefficient=settings["vf_coef"])
    policy = policy_loss(logprobs, old, tensor(LAST["whitened_advantages"]), actions, old)
    value, _ = value_loss(values, tensor(LAST["values"]), tensor(LAST["returns"]))
    assert_equal(policy.losses[actions], tensor(update["policy_losses"])[actions])
    assert_equal(value[past], tensor(update["squared_value_errors"])[past] / 2)

    means = masked_mean(policy.losses, actions), masked_mean(value, past)
    assert_equal(torch.stack(means), tensor([update["policy_loss"], update["value_loss"]]))
    loss = means[0] + value_loss.coefficient * means[1]
    assert_equal(loss, tensor(update["loss"]))
    loss.backward()
    assert logprobs.grad is not None
    assert values.grad is not None
    assert_equal(logprobs.grad, tensor(update["logprob_gradient"]))
    assert_equal(values.grad, tensor(update["value_gradient"]))


def test_last_clip_fractions() -> None:
    """The mean over the steps, which TRL logs in float32; that of the values over the token past EOS too."""
    settings, old = LAST["settings"], tensor(LAST["old_logprobs"])
    actions, past = mask_of(LAST["actions"]), mask_of(LAST["actions_and_one_past"])
    policy, value = [], []
    for update in LAST["updates"]:
        terms = ClippedPolicyLoss(clip_low=settings["cliprange"])(
            tensor(update["logprobs"]), old, tensor(LAST["whitened_advantages"]), actions, old
        )
        _, clipped = ClippedValueLoss(clip=settings["cliprange_value"])(
            tensor(update["values"]), tensor(LAST["values"]), tensor(LAST["returns"])
        )
        policy.append(float(masked_mean(terms.clipped.double(), actions)))
        value.append(float(masked_mean(clipped.double(), past)))
    assert policy[0] == 0
    assert min(policy[1], value[1]) > 0
    assert sum(policy) / 2 == pytest.approx(LAST["logged"]["policy/clipfrac_avg"], abs=1e-7)
    assert sum(value) / 2 == pytest.approx(LAST["logged"]["val/clipfrac_avg"], abs=1e-7)


# The original PPO


@pytest.mark.parametrize(("estimator", "name"), [("k1", "kl"), ("abs", "abs"), ("k2", "mse")])
def test_original_kl_penalties(estimator: Estimator, name: str) -> None:
    logratio = tensor(ORIGINAL["logprobs"]) - tensor(ORIGINAL["reference_logprobs"])
    assert_equal(estimate_kl(logratio, estimator), tensor(ORIGINAL["penalties"][name]))


def test_original_full_kl_penalty() -> None:
    full = ORIGINAL["full"]
    assert_equal(exact_kl(tensor(full["logprobs"]), tensor(full["reference_logprobs"])), tensor(full["penalty"]))


def test_original_rewards_advantages_and_losses() -> None:
    """From the scores to the losses, each of ours from ours before it: the score stands on the last action in both."""
    settings, mask = ORIGINAL["settings"], mask_of(ORIGINAL["mask"])
    logprobs, values = tensor(ORIGINAL["logprobs"]), tensor(ORIGINAL["values"])
    rewards = token_rewards(ORIGINAL, logprobs, settings["init_kl_coef"], mask)
    assert_equal(rewards[mask], tensor(ORIGINAL["rewards"])[mask])

    advantages, returns = generalised_advantages(rewards, values, mask, settings["gamma"], settings["lam"])
    whitened = whiten_unbiased(advantages, mask, torch.float64)
    assert_equal(returns[mask], tensor(ORIGINAL["returns"])[mask])
    assert_equal(whitened[mask], tensor(ORIGINAL["whitened_advantages"])[mask])

    value_loss = ClippedValueLoss(clip=settings["cliprange_value"], coefficient=settings["vf_coef"])
    policy = ClippedPolicyLoss(clip_low=settings["cliprange"])(
        tensor(ORIGINAL["new_logprobs"]), logprobs, whitened, mask, logprobs
    )
    value, clipped = value_loss(tensor(ORIGINAL["new_values"]), values, returns)
    assert_equal(masked_mean(policy.losses, mask), tensor(ORIGINAL["policy_loss"]))
    assert_equal(value_loss.coefficient * masked_mean(value, mask), tensor(ORIGINAL["weighted_value_loss"]))
    fractions = [float(masked_mean(x.double(), mask)) for x in (policy.clipped, clipped)]
    assert fractions == pytest.approx([ORIGINAL["policy_clip_fraction"], ORIGINAL["value_clip_fraction"]], abs=1e-7)
    assert min(fractions) > 0


@pytest.mark.parametrize("run", ORIGINAL["controllers"], ids=lambda run: f"{run['beta']}-{run['kl'][0]}")
def test_original_adaptive_controller(run: dict[str, Any]) -> None:
    controller, beta = AdaptiveKL(run["beta"], target=run["target"], horizon=run["horizon"]), run["beta"]
    for kl, expected in zip(run["kl"], run["betas"], strict=True):
        beta = controller.next_beta(beta, kl, run["episodes"])
        assert beta == pytest.approx(expected, rel=1e-14)
