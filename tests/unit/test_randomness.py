"""Randomness as a function of its arguments: keyed Gumbel noise against the distributions it must have."""

import math
import random

import numpy as np
import pytest
import torch

from rlhf_lit.randomness import derive_seed, gumbel_noise, permutation, reseed, row_keys

EULER_GAMMA = 0.5772156649015329


def keys(count: int, seed: int = 7) -> torch.Tensor:
    index = torch.arange(count)
    return row_keys(seed, index, torch.zeros_like(index))


def test_noise_of_a_key_ignores_its_company() -> None:
    many = keys(64)
    noise = gumbel_noise(many, 5, 33)
    alone = torch.cat([gumbel_noise(many[i : i + 1], 5, 33) for i in range(64)])
    backwards = gumbel_noise(many.flip(0), 5, 33).flip(0)
    assert noise.equal(alone)
    assert noise.equal(backwards)


def test_a_larger_vocabulary_only_adds_noise() -> None:
    assert gumbel_noise(keys(4), 0, 50)[:, :20].equal(gumbel_noise(keys(4), 0, 20))


def test_noise_has_the_gumbel_moments_and_quantiles() -> None:
    noise = gumbel_noise(keys(2000), 3, 500).double().flatten()
    assert torch.isfinite(noise).all()
    error = math.pi / math.sqrt(6 * len(noise))
    assert abs(float(noise.mean()) - EULER_GAMMA) < 4 * error
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, rel=0.01)
    for quantile in (0.01, 0.25, 0.5, 0.9, 0.999):
        below = float((noise < -math.log(-math.log(quantile))).double().mean())
        assert abs(below - quantile) < 5 * math.sqrt(quantile * (1 - quantile) / len(noise))


def test_noise_is_uncorrelated_over_rows_positions_and_tokens() -> None:
    table = torch.stack([gumbel_noise(keys(300), t, 40).double() for t in range(6)]) - EULER_GAMMA  # [time, rows, v]
    scale = math.pi**2 / 6
    for shifted in (table.roll(1, 0), table.roll(1, 1), table.roll(1, 2), table.roll((1, 1), (0, 2))):
        correlation = float((table * shifted).mean()) / scale
        assert abs(correlation) < 4 / math.sqrt(table.numel())


def test_argmax_samples_the_softmax() -> None:
    """Chi-square of 20 000 draws against softmax(logits/T), 9 degrees of freedom: 27.9 is the 99.9 % point."""
    logits = torch.linspace(-2, 2, 10)
    for temperature in (1.0, 0.5):
        probability = torch.softmax(logits / temperature, -1).double()
        for position in (0, 11):
            draws = (logits / temperature + gumbel_noise(keys(20_000), position, 10)).argmax(-1)
            observed = torch.bincount(draws, minlength=10).double()
            expected = probability * len(draws)
            assert float(((observed - expected).square() / expected).sum()) < 27.9


def test_two_positions_are_sampled_independently() -> None:
    first, second = (gumbel_noise(keys(20_000), t, 4).argmax(-1) for t in (0, 1))
    observed = torch.bincount(first * 4 + second, minlength=16).double()
    expected = 20_000 / 16
    assert float(((observed - expected).square() / expected).sum()) < 37.7  # 15 degrees of freedom, 99.9 %


def test_row_keys_differ_in_every_argument() -> None:
    index, sample = torch.arange(50).repeat(4), torch.arange(4).repeat_interleave(50)
    all_keys = torch.cat([row_keys(seed, index, sample) for seed in (0, 1, 2)])
    assert len(all_keys.unique()) == 600


def test_permutation_is_one_and_a_function_of_its_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    order = permutation(100, "shuffle", 3)
    assert sorted(order.tolist()) == list(range(100))
    assert order.equal(permutation(100, "shuffle", 3))
    others = [permutation(100, "shuffle", 4), permutation(100, "minibatches", 3)]
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    others.append(permutation(100, "shuffle", 3))
    assert not any(order.equal(other) for other in others)


def test_seeds_do_not_touch_the_global_generators() -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    derive_seed("step", 1, 2)
    permutation(10, "shuffle", 0)
    gumbel_noise(keys(2), 0, 5)
    assert torch.rand(3).equal(expected)


def test_reseeding_decides_what_every_global_generator_draws() -> None:
    def draws(*numbers: int) -> tuple[float, float, float]:
        reseed("step", *numbers)
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    first = draws(4, 0)
    assert draws(4, 0) == first
    for other in (draws(5, 0), draws(4, 1)):
        assert not set(other) & set(first)
