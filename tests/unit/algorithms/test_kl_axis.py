"""PPO's KL penalty as three choices: estimator, placement, controller."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from types import SimpleNamespace
from typing import Any, get_args

import pytest
import tiny
import torch
from torch import Tensor

from rlhf_lit.algorithms import GRPO, PPO
from rlhf_lit.batches import ExperienceBatch
from rlhf_lit.losses.advantages import GAE
from rlhf_lit.losses.kl import AdaptiveKL, Estimator, FixedKL, Placement
from rlhf_lit.models import logprobs as logprobs_module
from rlhf_lit.models.base import Base

COMBINATIONS = list(product(get_args(Estimator), get_args(Placement)))


def moved(llama: str, kl: FixedKL | AdaptiveKL) -> PPO:
    """PPO in float64 whose policy has left its reference; returns are sums of rewards."""
    module = tiny.make_ppo(Base(name=llama), kl=kl, advantages=GAE(lam=1.0, whiten=False)).double()
    tiny.disturb(module.roles.models["policy"], 0.05)
    return module


def all_logprobs(module: PPO, role: str, experience: ExperienceBatch) -> Tensor:
    """[rows, time, vocabulary] log-probs of what each token was drawn from, by the model's own head."""
    tokens = experience.sequences.tokens
    full = module.roles.models[role](input_ids=tokens, use_cache=False).logits.log_softmax(-1)
    return torch.nn.functional.pad(full[:, :-1], (0, 0, 1, 0))


def by_hand(module: PPO, experience: ExperienceBatch, estimator: str) -> Tensor:
    """[rows, time] the penalty, from the definitions."""
    policy = all_logprobs(module, "policy", experience)
    reference = all_logprobs(module, "reference", experience).detach()
    if estimator == "full":
        return (policy.exp() * (policy - reference)).sum(-1)
    index = experience.sequences.tokens[..., None]
    ratio = (policy.gather(-1, index) - reference.gather(-1, index)).squeeze(-1)
    return {"k1": ratio, "abs": ratio.abs(), "k2": ratio**2 / 2, "k3": torch.exp(-ratio) - 1 + ratio}[estimator]


@pytest.mark.parametrize(("estimator", "placement"), COMBINATIONS)
def test_the_reward_carries_the_penalty_that_is_placed_there_and_no_other(
    llama: str, estimator: Estimator, placement: Placement
) -> None:
    module = moved(llama, FixedKL(0.2, estimator=estimator, placement=placement))
    experience = module.rollout(tiny.prompts(), 0)
    mask = experience.sequences.mask
    penalty = torch.where(mask, 0.2 * by_hand(module, experience, estimator).detach(), 0.0)
    scores = module.rollout_metrics["objective/scores"]
    first = mask.int().argmax(-1)
    returned = experience.returns[torch.arange(len(first)), first].mean()
    expected = scores - (penalty.sum(-1).mean() if placement == "reward" else 0.0)
    assert float(returned) == pytest.approx(float(expected), abs=1e-5)
    assert float(module.rollout_metrics["objective/rlhf_reward"]) == pytest.approx(float(expected), abs=1e-5)
    assert float(penalty.abs().sum()) > 0.1


@pytest.mark.parametrize("estimator", get_args(Estimator))
@pytest.mark.parametrize("chunk", [2**24, 64])
def test_the_loss_carries_its_gradient(
    llama: str, monkeypatch: pytest.MonkeyPatch, estimator: Estimator, chunk: int
) -> None:
    """With advantages and value coefficient 0 only β·mean kl is left of the loss."""
    monkeypatch.setattr(logprobs_module, "CHUNK_LOGITS", chunk)
    module = moved(llama, FixedKL(0.2, estimator=estimator, placement="loss"))
    experience = module.rollout(tiny.prompts(), 0)
    experience.advantages.zero_()
    parameters = list(module.roles.models["policy"].parameters())
    kl = by_hand(module, experience, estimator)[experience.sequences.mask].mean()
    expected = torch.autograd.grad(0.2 * kl, parameters, allow_unused=True)
    module.zero_grad()
    logged = 0.0
    for share in module.losses(experience, module.denominators(experience)):
        share.loss.backward()
        logged += float(share.metrics.get("policy/kl_loss", 0.0))
    assert logged == pytest.approx(float(kl), abs=1e-6)
    for parameter, gradient in zip(parameters, expected, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("estimator", "placement"), COMBINATIONS)
def test_micro_batches_change_nothing(llama: str, estimator: Estimator, placement: Placement) -> None:
    module = moved(llama, FixedKL(0.2, estimator=estimator, placement=placement))
    experience = module.rollout(tiny.prompts(), 0)
    tiny.disturb(module.roles.models["policy"], 0.02, seed=9)
    whole = tiny.Step(module, experience, cut=False)
    one_by_one = tiny.Step(module, replace(experience, micro_batch_tokens=1))
    one_by_one.assert_equals(whole, 1e-6)


@pytest.mark.parametrize("placement", get_args(Placement))
def test_the_penalty_is_zero_at_the_reference(llama: str, placement: Placement) -> None:
    module = tiny.make_ppo(Base(name=llama), kl=FixedKL(0.2, estimator="full", placement=placement))
    experience = module.rollout(tiny.prompts(), 0)
    assert float(module.rollout_metrics["objective/non_score_reward"]) == 0.0
    totals = [share.metrics for share in module.losses(experience, module.denominators(experience))]
    assert sum(float(metrics.get("policy/kl_loss", 0.0)) for metrics in totals) == pytest.approx(0.0, abs=1e-7)


@pytest.mark.parametrize("estimator", ["k2", "full"])
def test_the_update_uses_the_coefficient_of_its_rollout(llama: str, estimator: Estimator) -> None:
    """The adaptive controller moves after the rollout; the steps on it still use the β it was made with."""
    module = moved(llama, AdaptiveKL(0.2, estimator=estimator, placement="loss", target=1e-6, horizon=10.0))
    experience = module.rollout(tiny.prompts(), 0)
    assert experience.kl_coefficient == 0.2
    assert module.kl_coefficient == pytest.approx(0.2 * (1 + 0.2 * len(experience) / 10))
    experience.advantages.zero_()
    shares = list(module.losses(experience, module.denominators(experience)))
    share = next(share for share in shares if "policy/kl_loss" in share.metrics)
    assert float(share.loss) == pytest.approx(0.2 * float(share.metrics["policy/kl_loss"]), rel=1e-6)
    assert float(share.loss) > 0.01


@pytest.mark.parametrize(("estimator", "placement"), COMBINATIONS)
def test_one_line_says_what_a_combination_converges_to(
    llama: str, capsys: pytest.CaptureFixture[str], estimator: Estimator, placement: Placement
) -> None:
    kl = FixedKL(0.2, estimator=estimator, placement=placement)
    module = tiny.make_ppo(Base(name=llama), kl=kl, advantages=GAE(whiten=False))
    module._trainer = SimpleNamespace(ckpt_path="last.ckpt")  # whose critic's head has started already
    capsys.readouterr()  # what loading had to say
    module.on_fit_start()
    said = capsys.readouterr().err
    if (estimator, placement) in {("k1", "reward"), ("k2", "loss"), ("full", "loss")}:
        assert said == ""
    else:
        assert said.startswith(f"note: model.kl: {estimator} in the {placement} converges to ")
        assert said.count("\n") == 1


@pytest.mark.parametrize(("estimator", "placement"), [("k1", "reward"), ("k2", "loss"), ("full", "loss")])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [(PPO, {"critic": tiny.Critic(init="policy")}), (GRPO, {})],
)
def test_one_line_says_that_rescaled_advantages_have_another_unit_than_beta(
    llama: str,
    capsys: pytest.CaptureFixture[str],
    estimator: Estimator,
    placement: Placement,
    kind: Any,
    settings: dict[str, Any],
) -> None:
    module = tiny.make_on_policy(kind, Base(name=llama), kl=FixedKL(0.2, estimator, placement), **settings)
    module._trainer = SimpleNamespace(datamodule=SimpleNamespace(samples_per_prompt=2), ckpt_path="last.ckpt")
    capsys.readouterr()
    module.on_fit_start()
    said = capsys.readouterr().err
    assert said.startswith("note: model.kl: the advantages are divided") == (placement == "loss")
    assert said.count("\n") == (placement == "loss")
