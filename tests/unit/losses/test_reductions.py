"""Reductions over real tokens, by hand; what lies off the mask may be anything."""

import math

import pytest
import torch

from rlhf_lit.losses.reductions import masked_sum, moments, row_sums, token_weights, whiten
from rlhf_lit.losses.supervised import NLLLoss

VALUES = torch.tensor([[1.0, math.nan, 3.0], [math.inf, 8.0, -2.0]])
MASK = torch.tensor([[True, False, True], [False, True, True]])


def test_sums_and_means_by_hand() -> None:
    assert masked_sum(VALUES, MASK).item() == 10.0
    assert row_sums(VALUES, MASK).tolist() == [4.0, 6.0]


def test_no_gradient_comes_from_off_the_mask() -> None:
    values = VALUES.clone().requires_grad_()
    masked_sum(values, MASK).backward()
    assert values.grad is not None
    assert values.grad.equal(MASK.float())


def test_whitening_uses_the_population_variance() -> None:
    """1, 3, 8, −2: mean 2.5, population variance 13.25 (unbiased: 17.67)."""
    whitened = whiten(VALUES, MASK, *moments(VALUES, MASK))
    expected = torch.tensor([[-1.5, 0.0, 0.5], [0.0, 5.5, -4.5]]) / math.sqrt(13.25)
    torch.testing.assert_close(whitened, expected)
    assert whitened[MASK].square().mean().item() == pytest.approx(1.0, abs=1e-6)


def test_moments_of_parts_add_up_to_those_of_the_whole() -> None:
    whole = moments(VALUES, MASK)
    parts = [moments(VALUES[i : i + 1], MASK[i : i + 1]) for i in range(2)]
    for i in range(3):
        assert whole[i].item() == parts[0][i].item() + parts[1][i].item()
    first = whiten(VALUES[:1], MASK[:1], *(a + b for a, b in zip(*parts, strict=True)))
    assert first.equal(whiten(VALUES, MASK, *whole)[:1])


def test_constant_values_whiten_to_zero() -> None:
    constant = torch.full((2, 3), 7.0)
    assert not whiten(constant, MASK, *moments(constant, MASK)).any()


def test_nll_is_minus_the_log_prob() -> None:
    assert NLLLoss()(torch.tensor([[-0.5, 0.0]])).tolist() == [[0.5, 0.0]]


def test_token_weights_by_hand() -> None:
    """Responses of 2 and 1 tokens, in a batch of 5 tokens and 3 episodes over all ranks, none longer than 4."""
    mask = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    tokens, episodes = torch.tensor(5.0), torch.tensor(3.0)
    expected = {"token_mean": (1 / 5, 1 / 5), "sequence_mean": (1 / 6, 1 / 3), "constant": (1 / 12, 1 / 12)}
    for aggregation, (long, short) in expected.items():
        weights = token_weights(mask, aggregation, tokens, episodes, longest=4)  # type: ignore[arg-type]
        by_hand = torch.tensor([[0.0, long, long], [0.0, short, 0.0]], dtype=torch.float64)
        torch.testing.assert_close(weights, by_hand, rtol=0, atol=1e-15)
    assert not token_weights(torch.zeros(1, 2), "sequence_mean", tokens, episodes, 4).any(), "an empty row is no NaN"
