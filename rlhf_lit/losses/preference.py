"""Losses over preference pairs, one small class per paper.

A loss sees a :class:`PairLogProbs` and returns one value per pair. To add one, write a class with ``beta``,
``__call__`` and (where it has its own notion of reward) ``rewards``, and name it in a config by its class path. A loss
that states its ``value_at_start`` has it checked before the first step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class PairLogProbs:
    """What a preference loss knows of a batch of pairs. All tensors are [pairs], in float32 or wider.

    Attributes:
        policy_chosen, policy_rejected: Σ_t log π(y_t | x, y_<t) over the response.
        reference_chosen, reference_rejected: the same under the reference π₀.
        chosen_tokens, rejected_tokens: response lengths in tokens.
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor

    @property
    def chosen_logratio(self) -> Tensor:
        """Δ_w = log π(y_w|x) − log π₀(y_w|x)."""
        return self.policy_chosen - self.reference_chosen

    @property
    def rejected_logratio(self) -> Tensor:
        """Δ_l = log π(y_l|x) − log π₀(y_l|x)."""
        return self.policy_rejected - self.reference_rejected


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss of the DPO family.

    Args:
        beta: β, the strength of the pull to the reference. Required: β values of different losses do not compare, so
            none has a default.
    """

    beta: float

    def __post_init__(self) -> None:
        if not self.beta > 0:
            raise ValueError(f"loss.beta must be greater than 0, not {self.beta}")

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        """[pairs] losses."""
        raise NotImplementedError

    def value_at_start(self) -> float | None:
        """The loss of any pair while policy = reference; None where the loss does not say."""
        return None

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Implicit rewards βΔ of the chosen and the rejected side, each [pairs] (2305.18290 Eq. 5)."""
        return self.beta * pairs.chosen_logratio, self.beta * pairs.rejected_logratio


@dataclass(frozen=True)
class DPOLoss(PreferenceLoss):
    """−log σ(βh), h = Δ_w − Δ_l (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7).

    With label smoothing ε, cDPO: (1 − ε)(−log σ(βh)) + ε(−log σ(−βh)) (Mitchell 2023, Eq. 3).

    Args:
        label_smoothing: ε in [0, 0.5), the assumed rate of flipped labels.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_label_smoothing(self.label_smoothing)

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        h = self.beta * (pairs.chosen_logratio - pairs.rejected_logratio)
        return -(1 - self.label_smoothing) * logsigmoid(h) - self.label_smoothing * logsigmoid(-h)

    def value_at_start(self) -> float | None:
        """ln 2, whatever β and ε."""
        return math.log(2)


@dataclass(frozen=True)
class RobustDPOLoss(PreferenceLoss):
    """[(1 − ε)(−log σ(βh)) − ε(−log σ(−βh))]/(1 − 2ε), h = Δ_w − Δ_l (rDPO, Chowdhury et al. 2024, arXiv 2403.00409).

    Over labels of which a share ε is flipped, its mean is the DPO loss of the right ones. A single pair's loss has no
    lower bound: once a pair is won by far, it falls by βε/(1 − 2ε) for every nat more.

    Args:
        label_smoothing: ε in [0, 0.5), the rate of flipped labels. 0 is DPO.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_label_smoothing(self.label_smoothing)

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        h = self.beta * (pairs.chosen_logratio - pairs.rejected_logratio)
        flipped = self.label_smoothing
        return (-(1 - flipped) * logsigmoid(h) + flipped * logsigmoid(-h)) / (1 - 2 * flipped)

    def value_at_start(self) -> float | None:
        """ln 2, whatever β and ε."""
        return math.log(2)


@dataclass(frozen=True)
class IPOLoss(PreferenceLoss):
    """(h − 1/(2β))² (Azar et al. 2023, arXiv 2310.12036, Eq. 17).

    Args:
        average_log_prob: h from log-ratios averaged over the response's tokens, as TRL does; the paper's own text and
            code sum them.
    """

    average_log_prob: bool = False

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        chosen, rejected = pairs.chosen_logratio, pairs.rejected_logratio
        if self.average_log_prob:
            chosen, rejected = chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
        return (chosen - rejected - 1 / (2 * self.beta)).square()

    def value_at_start(self) -> float | None:
        """1/(4β²), summed or averaged."""
        return 1 / (4 * self.beta**2)


def _check_label_smoothing(rate: float) -> None:
    if not 0 <= rate < 0.5:
        raise ValueError(f"loss.label_smoothing must lie in [0, 0.5), not {rate}")
