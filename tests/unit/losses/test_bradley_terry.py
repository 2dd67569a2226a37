"""The reward model's loss by hand."""

import math

import pytest
import torch

from rlhf_lit.losses.bradley_terry import BradleyTerryLoss

CHOSEN, REJECTED = torch.tensor([2.0, -1.0]), torch.tensor([0.5, 1.0])
MARGIN = torch.tensor([1.0, 0.25])


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_plain() -> None:
    losses = BradleyTerryLoss()(CHOSEN, REJECTED, MARGIN)
    assert losses.tolist() == pytest.approx([softplus(-1.5), softplus(2.0)], abs=1e-6)


def test_margin_is_subtracted_where_asked() -> None:
    losses = BradleyTerryLoss(use_margin=True)(CHOSEN, REJECTED, MARGIN)
    assert losses.tolist() == pytest.approx([softplus(-0.5), softplus(2.25)], abs=1e-6)


def test_centring_penalises_the_sum() -> None:
    losses = BradleyTerryLoss(centring=0.01)(CHOSEN, REJECTED, MARGIN)
    assert losses.tolist() == pytest.approx([softplus(-1.5) + 0.0625, softplus(2.0)], abs=1e-6)


def test_only_the_difference_counts_without_centring() -> None:
    loss = BradleyTerryLoss()
    assert loss(CHOSEN, REJECTED, MARGIN).equal(loss(CHOSEN + 64, REJECTED + 64, MARGIN))
    assert not BradleyTerryLoss(centring=0.01)(CHOSEN, REJECTED, MARGIN).equal(
        BradleyTerryLoss(centring=0.01)(CHOSEN + 64, REJECTED + 64, MARGIN)
    )


def test_equal_scores_give_ln_2() -> None:
    assert BradleyTerryLoss()(CHOSEN, CHOSEN, MARGIN).tolist() == pytest.approx([math.log(2)] * 2, abs=1e-6)


def test_negative_centring_is_refused() -> None:
    with pytest.raises(ValueError, match="centring"):
        BradleyTerryLoss(centring=-0.1)
