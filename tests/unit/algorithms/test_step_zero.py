"""Before the first update everything about the policy's distance to its reference is known."""

import math

import pytest
import tiny
import torch

from rlhf_lit.algorithms import DPO, KTO
from rlhf_lit.algorithms.algorithm import Optimizer
from rlhf_lit.losses.preference import (
    APODownLoss,
    APOZeroLoss,
    DPOLoss,
    HingeLoss,
    IPOLoss,
    KTOLoss,
    PreferenceLoss,
    RobustDPOLoss,
)
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.logprobs import token_logprobs

LORAS = [None, LoRA(rank=4)]


@pytest.fixture(params=LORAS, ids=["full", "lora"])
def base(request: pytest.FixtureRequest, llama: str) -> Base:
    return Base(name=llama, lora=request.param)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (DPOLoss(beta=0.1), math.log(2)),
        (DPOLoss(beta=3.0, label_smoothing=0.3), math.log(2)),
        (IPOLoss(beta=0.1), 25.0),
        (IPOLoss(beta=0.5, average_log_prob=True), 1.0),
        (RobustDPOLoss(beta=0.3, label_smoothing=0.3), math.log(2)),
        (HingeLoss(beta=0.3), 1.0),
        (APOZeroLoss(beta=0.3), 1.0),
        (APODownLoss(beta=0.3), 1.0),
    ],
)
def test_preference_losses(base: Base, loss: PreferenceLoss, expected: float) -> None:
    module = tiny.build(DPO(base, loss))
    for budget in (1, 60, tiny.EVERYTHING):
        totals = tiny.Step(module, tiny.preferences(budget)).totals
        assert totals["loss"] == pytest.approx(expected, abs=1e-6 * max(1, expected))
        for name in ("margin", "accuracy", "reward_chosen", "reward_rejected"):
            assert totals[name] == 0.0, name


def test_kto(base: Base) -> None:
    module = tiny.build(KTO(base, KTOLoss(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)))
    for budget in (1, 60, tiny.EVERYTHING):
        batch = tiny.unpaired(budget)
        totals = tiny.Step(module, batch).totals
        good = float(batch.desirable.float().mean())
        assert totals["loss"] == pytest.approx((1.5 * good + 0.5 * (1 - good)) / 2, abs=1e-6)
        assert totals["loss"] == pytest.approx(module.value_at_start(batch), abs=1e-6)
        for name in ("baseline", "reward_desirable", "reward_undesirable"):
            assert totals[name] == 0.0, name


@pytest.mark.parametrize("direction", [1, -1])
def test_kto_measures_gains_from_a_kl_that_is_never_negative(llama: str, direction: int) -> None:
    """A step towards the mismatched responses raises z, one away from them leaves it at 0."""
    module, batch = tiny.build(KTO(Base(name=llama), KTOLoss(beta=0.3))), tiny.unpaired()
    tiny.logprobs_of(module, batch.mismatched).sum().backward()
    for parameter in module.trainable_parameters():
        parameter.data += direction * 3e-3 * parameter.grad  # type: ignore[operator]
    module.prepare(batch)
    reference, policy = (
        token_logprobs(module.roles.models[role], batch.mismatched).sum(-1).mean() for role in ("reference", "policy")
    )
    assert direction * float(policy - reference) > 0.01
    assert float(module.baseline) == pytest.approx(max(0.0, float(policy - reference)), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_ppo_to_the_bit_with_equal_micro_batches(base: Base, temperature: float) -> None:
    sampling = tiny.Sampling(max_new_tokens=10, temperature=temperature)
    module = tiny.make_ppo(base, sampling=sampling)
    experience = module.rollout(tiny.prompts(), 0)
    totals = tiny.Step(module, experience).totals
    assert totals["policy/ratio_mean"] == pytest.approx(1.0, abs=2e-7)  # a sum of ones divided by their count
    assert totals["policy/approxkl"] == 0.0
    assert totals["policy/clipfrac"] == 0.0
    assert totals["value/clipfrac"] == 0.0
    assert module.rollout_metrics["objective/kl"] == 0.0
    assert module.rollout_metrics["objective/kl_exact"] == 0.0
    assert float(module.rollout_metrics["rollout/sampler_gap"]) < 1e-5
    # The value loss starts at ½(V − R)² = ½A², of the advantages before whitening.
    mask = experience.sequences.mask
    error = (experience.returns - experience.values)[mask]
    assert totals["value/loss"] == pytest.approx(float(error.square().mean() / 2), rel=1e-5)
    assert totals["policy/loss"] == pytest.approx(-float(experience.advantages[mask].mean()), abs=1e-6)


@pytest.mark.parametrize("budget", [1, 30, 60])
def test_ppo_within_rounding_whatever_the_micro_batches(base: Base, budget: int) -> None:
    module = tiny.make_ppo(base)
    experience = module.rollout(tiny.prompts(budget=budget), 0)
    for rows in torch.arange(8).split(3):
        totals = tiny.Step(module, experience.select(rows)).totals
        assert totals["policy/ratio_mean"] == pytest.approx(1.0, abs=1e-5)
        assert totals["policy/approxkl"] < 1e-10
        assert totals["policy/clipfrac"] == 0.0
    assert abs(float(module.rollout_metrics["objective/kl"])) < 1e-5
    assert abs(float(module.rollout_metrics["objective/kl_exact"])) < 1e-5


def test_the_metrics_move_once_the_policy_does(llama: str) -> None:
    """The zeros above are not the zeros of a metric that is never computed."""
    module = tiny.make_ppo(Base(name=llama), optimizer=Optimizer())
    experience = module.rollout(tiny.prompts(), 0)
    tiny.disturb(module.roles.models["policy"], 0.05)
    totals = tiny.Step(module, experience).totals
    assert totals["policy/approxkl"] > 0.01
    assert totals["policy/clipfrac"] > 0.05
    assert abs(totals["policy/ratio_mean"] - 1) > 1e-3
    module.rollout(tiny.prompts(), 1)
    assert float(module.rollout_metrics["objective/kl_exact"]) > 0.05


def test_dropout_in_the_models_config_stays_off(tmp_path_factory: pytest.TempPathFactory) -> None:
    """GPT-2 keeps its attention dropout as a number that only eval mode switches off."""
    base = Base(name=tiny.save_model(tmp_path_factory.mktemp("gpt2"), "gpt2"))
    assert tiny.Step(tiny.build(DPO(base, DPOLoss(beta=0.1))), tiny.preferences()).totals["margin"] == 0.0
    module = tiny.make_ppo(base)
    assert tiny.Step(module, module.rollout(tiny.prompts(), 0)).totals["policy/approxkl"] == 0.0
