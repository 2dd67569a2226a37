"""Randomness as a function of (seed, step, purpose, row), never of history or of the rank.

A resumed run therefore draws what the uninterrupted one draws, and sorting, batch size and the number of ranks cannot
change what is sampled.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

# Purposes keep streams of the same (seed, step) apart.
PURPOSES = {"step": 0, "shuffle": 1, "minibatches": 2, "sampling": 3, "validation": 4, "rollout": 5, "bootstrap": 6}

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed 64-bit integer
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB
# Numbers of the noise that are made at once: those that a CPU's caches hold, and on another device.
_CACHED, _AT_ONCE = 2**16, 2**24


def global_seed() -> int:
    """The seed of the run, as `seed_everything` set it; 0 where nobody did."""
    return int(os.environ.get("PL_GLOBAL_SEED", "0"))


def derive_seed(purpose: str, *numbers: int) -> int:
    """A 63-bit seed from the run's seed, a purpose and any numbers (a step, an epoch, a rank)."""
    state = np.random.SeedSequence((global_seed(), PURPOSES[purpose], *numbers)).generate_state(1, np.uint64)
    return int(state[0] >> 1)


def reseed(purpose: str, *numbers: int) -> None:
    """Set the global generators of Python, NumPy and torch (on all devices) anew, whatever was drawn before."""
    seed = derive_seed(purpose, *numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """What a block draws from the global generators of Python, NumPy and torch, or how it seeds them, changes nothing
    after it."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def permutation(size: int, purpose: str, *numbers: int) -> Tensor:
    """A random order of ``range(size)``, int64."""
    return torch.from_numpy(np.random.default_rng(derive_seed(purpose, *numbers)).permutation(size))


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's output function on int64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number
    generators"); right shifts are made logical by masking the sign's copies away."""
    return _mix_in_place(x.clone())


def _mix_in_place(x: Tensor) -> Tensor:
    """The same, without another tensor of its size for each step."""
    x ^= (x >> 30).bitwise_and_((1 << 34) - 1)
    x *= _MIX_1
    x ^= (x >> 27).bitwise_and_((1 << 37) - 1)
    x *= _MIX_2
    x ^= (x >> 31).bitwise_and_((1 << 33) - 1)
    return x


def row_keys(seed: int, *columns: Tensor) -> Tensor:
    """One int64 key per row from a seed and the row's own numbers (prompt index, sample). [rows] each → [rows]."""
    key = torch.full_like(columns[0], seed)
    for column in columns:
        key = _mix(key + (column + 1) * _GOLDEN)
    return key


def gumbel_noise(keys: Tensor, position: int, vocabulary: int) -> Tensor:
    """Standard Gumbel noise of each row at one position of its response: −log(−log u). [rows] → [rows, vocabulary].

    A counter-based generator (SplitMix64 over the token ids), so that a row's noise depends on its key alone, on any
    device. argmax(logits/T + noise) is then a sample of softmax(logits/T) (the Gumbel-max trick).
    """
    stream = _mix(keys + torch.full_like(keys, position + 1) * _GOLDEN)
    counter = torch.arange(1, vocabulary + 1, device=keys.device, dtype=torch.int64) * _GOLDEN
    noise = torch.empty(len(keys), vocabulary, device=keys.device)
    # A few rows at a time and in place: for all rows of a large vocabulary these eight-byte numbers would outgrow a
    # CPU's caches, and take several times the memory of the logits.
    rows = max(1, (_CACHED if keys.device.type == "cpu" else _AT_ONCE) // vocabulary)
    for part, streams in zip(noise.split(rows), stream.split(rows), strict=True):
        bits = _mix_in_place(streams[:, None] + counter)
        bits >>= 11
        bits &= (1 << 53) - 1
        uniform = bits.double().add_(0.5).div_(2**53)
        part.copy_(uniform.log_().neg_().log_().neg_())
    return noise
