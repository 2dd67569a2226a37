"""Randomness as a function of its arguments: keyed Gumbel noise against the distributions it must have."""

import math
import random

import numpy as np
import pytest
import torch

from rlhf_lit.memory.gauges import LiveBytes
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


def python_noise(key: int, position: int, token: int) -> float:
    """SplitMix64 on Python's integers, and the two logarithms."""

    def mixed(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    stream = mixed((key + (position + 1) * golden) % 2**64)
    bits = mixed((stream + (token + 1) * golden) % 2**64)
    return -math.log(-math.log(((bits >> 11) + 0.5) / 2**53))


@pytest.mark.parametrize("vocabulary", [50, 20_000, 151_936])
def test_noise_is_that_generators_whatever_is_made_at_once(vocabulary: int) -> None:
    """So samples of earlier versions, and of other devices, are repeated. Rows of large vocabularies are made a few, or
    one, at a time; of small ones together."""
    many = keys(9)
    noise = gumbel_noise(many, 6, vocabulary)
    assert noise.shape == (9, vocabulary)
    for row in (0, 3, 8):
        for token in (0, 17, vocabulary - 1):
            expected = python_noise(int(many[row]) % 2**64, 6, token)
            assert float(noise[row, token]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_noise_of_a_large_vocabulary_takes_little_memory() -> None:
    """Beside the noise itself the numbers of a row: not ten times as much."""
    many = keys(64)
    with LiveBytes() as gauge:
        noise = gumbel_noise(many, 0, 49_152)
    assert gauge.peak < 1.2 * noise.nbytes


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
