"""What the KL penalties converge to, by the experiment's own descent on its committed instance."""

import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))  # experiments are not part of the installed package

from experiments.kl_fixed_points.run import ESTIMATORS, PLACEMENTS, Outcome, committed_instance, descend
from rlhf_lit.losses.kl import Estimator, Placement, fixed_point

RIGHT = {("k1", "reward"), ("k2", "loss"), ("full", "loss")}
STEPS = 1500


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reach(estimator: Estimator, placement: Placement) -> Outcome:
    return descend(committed_instance(), estimator, placement, "gradient_descent", STEPS)


@pytest.mark.parametrize(("estimator", "placement"), list(product(ESTIMATORS, PLACEMENTS)))
def test_only_three_combinations_reach_the_optimum_and_only_the_others_warn(
    estimator: Estimator, placement: Placement
) -> None:
    distance = float(reach(estimator, placement).distance)
    if (estimator, placement) in RIGHT:
        assert distance < 1e-3
        assert fixed_point(estimator, placement) is None
    else:
        assert distance > 0.02
        assert fixed_point(estimator, placement)


@pytest.mark.parametrize(("estimator", "placement"), [("full", "reward"), ("k1", "loss")])
def test_penalties_without_a_mean_gradient_leave_the_argmax(estimator: Estimator, placement: Placement) -> None:
    policy = reach(estimator, placement).policy[0]
    assert policy[committed_instance().reward[0].argmax()] > 0.99


def test_k3_as_loss_is_the_forward_kl() -> None:
    """Its gradient is that of β·KL(π₀‖π), whose stationary point is π = βπ₀/(c − r): βπ₀/π + r is one constant."""
    bandit = committed_instance()
    constant = bandit.beta * bandit.start / reach("k3", "loss").policy + bandit.reward
    torch.testing.assert_close(constant, constant.mean().expand_as(constant), rtol=0, atol=1e-6)


@pytest.mark.parametrize("estimator", ["abs", "k2"])
def test_abs_and_k2_in_the_reward_drop_tokens(estimator: Estimator) -> None:
    """Below π₀ their penalty grows as the token goes: only tokens above π₀ are left, at equal penalised reward."""
    bandit = committed_instance()
    policy = reach(estimator, "reward").policy[0]
    kept = policy > bandit.start[0]
    assert 1 < kept.sum() < len(kept)
    assert (policy[~kept] < 1e-2).all()
    ratio = (policy / bandit.start[0]).log()[kept]
    penalised = bandit.reward[0][kept] - bandit.beta * (ratio if estimator == "abs" else ratio**2 / 2)
    torch.testing.assert_close(penalised, penalised.mean().expand_as(penalised), rtol=0, atol=1e-2)
