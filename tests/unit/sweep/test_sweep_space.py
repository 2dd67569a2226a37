"""The values of a sweep: grids, and draws from W&B's distributions, by hand and by what must hold of them."""

import math
from typing import Any

import numpy as np
import pytest

from rlhf_lit.errors import UserError
from rlhf_lit.sweep.space import SETTINGS, Parameter, draws, grid, read_parameter, uniform_number


def parameter(**given: Any) -> Parameter:
    return read_parameter("model.x", given, "s.yaml")


@pytest.mark.parametrize(
    ("given", "points"),
    [
        ({"value": "null"}, ["null"]),
        ({"values": [0.1, "1e-05", True]}, [0.1, "1e-05", True]),
        ({"values": [1, 2, 1, 1.0, True]}, [1, 2, True]),
        ({"min": 2, "max": 5}, [2, 3, 4, 5]),
        ({"distribution": "q_uniform", "min": 0.1, "max": 0.5, "q": 0.1}, [0.1, 0.2, 0.3, 0.4]),
        ({"distribution": "q_uniform", "min": 0, "max": 32, "q": 8}, [0, 8, 16, 24]),
    ],
)
def test_points_of_a_grid(given, points):
    found = parameter(**given).points()
    assert found == points
    assert [type(value) for value in found] == [type(value) for value in points]


def test_a_grid_runs_through_the_last_parameter_first():
    one, two = read_parameter("a", {"values": [1, 2]}, ""), read_parameter("b", {"values": ["x", "y"]}, "")
    assert grid([one, two]) == [{"a": 1, "b": "x"}, {"a": 1, "b": "y"}, {"a": 2, "b": "x"}, {"a": 2, "b": "y"}]


Z = 0.6744897501960817  # Φ⁻¹(3/4)

# At u = 1/2 and u = 3/4, by hand from the definitions at https://docs.wandb.ai/models/sweeps/sweep-config-keys.
DRAWS: list[tuple[dict[str, Any], Any, Any]] = [
    ({"value": [1, 2]}, [1, 2], [1, 2]),
    ({"values": ["a", "b", "c", "d"]}, "c", "d"),
    ({"values": ["a", "b", "c"], "probabilities": [0.6, 0.1, 0.3]}, "a", "c"),
    ({"min": 1, "max": 4}, 3, 4),
    ({"min": 1.0, "max": 4}, 2.5, 3.25),
    ({"distribution": "uniform", "min": 1, "max": 5}, 3.0, 4.0),
    ({"distribution": "q_uniform", "min": 0, "max": 5, "q": 2}, 2, 4),
    ({"distribution": "q_uniform", "min": 0.0, "max": 1.2, "q": 0.1}, 0.6, 0.9),
    ({"distribution": "log_uniform", "min": -2, "max": 0}, math.exp(-1), math.exp(-0.5)),
    ({"distribution": "log_uniform_values", "min": 1.0e-4, "max": 1.0}, 1e-2, 1e-1),
    ({"distribution": "q_log_uniform", "min": 0, "max": 2, "q": 0.5}, 2.5, 4.5),
    ({"distribution": "q_log_uniform_values", "min": 1, "max": 10_000, "q": 100}, 100, 1000),
    ({"distribution": "inv_log_uniform", "min": 0, "max": 2}, math.exp(-1), math.exp(-0.5)),
    ({"distribution": "inv_log_uniform_values", "min": 1.0e-4, "max": 1.0}, 1e-2, 1e-1),
    ({"distribution": "normal", "mu": 1.0, "sigma": 2.0}, 1.0, 1 + 2 * Z),
    ({"distribution": "normal"}, 0.0, Z),
    ({"distribution": "q_normal", "mu": 1.0, "sigma": 2.0, "q": 0.5}, 1.0, 2.5),
    ({"distribution": "log_normal", "mu": 1.0}, math.e, math.exp(1 + Z)),
    ({"distribution": "q_log_normal", "q": 1}, 1, 2),
    ({"distribution": "beta", "a": 1, "b": 2}, 1 - math.sqrt(0.5), 1 - math.sqrt(0.25)),
    ({"distribution": "q_beta", "a": 1, "b": 2, "q": 0.25}, 0.25, 0.5),
]


@pytest.mark.parametrize(("given", "at_half", "at_three_quarters"), DRAWS)
def test_draws_are_the_inverse_of_the_distribution(given, at_half, at_three_quarters):
    for u, expected in ((0.5, at_half), (0.75, at_three_quarters)):
        found = parameter(**given).draw(u)
        assert found == (pytest.approx(expected, rel=1e-12, abs=1e-15) if isinstance(expected, float) else expected)
        assert type(found) is type(expected)


def test_every_distribution_was_drawn_from():
    assert {parameter(**given).distribution for given, *_ in DRAWS} == set(SETTINGS)


def test_draws_stay_within_their_bounds_at_the_ends():
    ends = (2.0**-53, 1 - 2.0**-53)  # the least and the greatest that a draw is made of
    assert [parameter(min=3, max=5).draw(u) for u in ends] == [3, 5]
    assert [parameter(values=["a", "b"], probabilities=[1 / 3, 2 / 3]).draw(u) for u in ends] == ["a", "b"]
    assert all(1e-5 <= parameter(distribution="log_uniform_values", min=1.0e-5, max=0.1).draw(u) <= 0.1 for u in ends)


def test_a_draw_depends_on_seed_arm_and_name_alone():
    lr, beta = read_parameter("lr", {"min": 0.0, "max": 1.0}, ""), read_parameter("beta", {"min": 0.0, "max": 1.0}, "")
    alone, both = draws([lr], 3, 5), draws([beta, lr], 3, 9)
    assert [arm["lr"] for arm in both[:5]] == [arm["lr"] for arm in alone]
    values = [value for seed in (3, 4) for arm in draws([beta, lr], seed, 9) for value in arm.values()]
    assert len(set(values)) == 36


def test_numbers_are_uniform():
    """Kolmogorov–Smirnov: 2 000 of them lie within 1.95/√n of the diagonal (p = 0.001), over arms and over seeds."""
    for numbers in (
        [uniform_number(0, arm, "a") for arm in range(2000)],
        [uniform_number(s, 0, "a") for s in range(2000)],
    ):
        assert np.abs(np.sort(numbers) - (np.arange(2000) + 0.5) / 2000).max() < 1.95 / math.sqrt(2000)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        (0.1, r"parameters\.model\.x: expected `value:`"),
        ({"parameters": {"beta": {"value": 1}}}, r"flat dotted keys such as model\.x\.beta"),
        ({"distribution": "cauchy", "min": 0, "max": 1}, "no distribution 'cauchy'"),
        ({"values": [1], "min": 0}, "categorical has no min"),
        ({"min": 0}, "int_uniform|uniform needs max"),
        ({"distribution": "constant"}, "constant needs value"),
        ({"value": None}, "null reaches a run as the text None"),
        ({"values": [1, None]}, "write it in quotes, 'null'"),
        ({"values": [{"a": [None]}]}, "null reaches a run as the text None"),
        ({"values": []}, "values must be a list"),
        ({"values": 3}, "values must be a list"),
        ({"min": 0.0, "max": "1e-5"}, r"max must be a number, not '1e-5': to YAML that is a text"),
        ({"min": 0.0, "max": float("inf")}, "max must be a number"),
        ({"min": True, "max": 3}, "min must be a number"),
        ({"min": 2.0, "max": 1.0}, "min must be below max"),
        ({"distribution": "int_uniform", "min": 0.5, "max": 2}, "whole numbers"),
        ({"distribution": "q_uniform", "min": 0, "max": 1, "q": 0}, "q must be greater than 0"),
        ({"distribution": "log_uniform_values", "min": 0, "max": 1}, "min must be greater than 0"),
        ({"distribution": "normal", "sigma": -1}, "sigma must be at least 0"),
        ({"distribution": "beta", "a": 0}, "a must be greater than 0"),
        ({"values": [1, 2], "probabilities": [0.5, 0.6]}, "sum to 1"),
        ({"values": [1, 2], "probabilities": [1.0]}, "2 values, but 1 probabilities"),
    ],
)
def test_what_is_no_parameter_is_refused(given, complaint):
    with pytest.raises(UserError, match=complaint) as refused:
        read_parameter("model.x", given, "s.yaml")
    assert str(refused.value).startswith("s.yaml: parameters.model.x")
    assert "\n" not in str(refused.value)
