"""Losses over preferences, one small class per paper.

A loss over pairs sees a :class:`PairLogProbs` and returns one value per pair. To add one, write a class with ``beta``,
``__call__`` and (where it has its own notion of reward) ``rewards``, and name it in a config by its class path
(docs/add_a_loss.md). A loss that states its ``value_at_start`` has it checked before the first step.

Symbols: Δ = log π(y|x) − log π₀(y|x) of a response, h = Δ_w − Δ_l, l̄ a response's mean log-prob per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
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
    """A loss of the DPO family over pairs.

    Args:
        beta: β, the strength of the pull to the reference. Required: β values of different losses do not compare, so
            none has a default.
    """

    beta: float

    # Whether the loss reads the reference's log-probs; where it does not, no reference is loaded.
    needs_reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _require_positive("beta", self.beta)

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
class LogRatioLoss(PreferenceLoss):
    """A loss of βΔ_w and βΔ_l.

    Args:
        average_log_prob: take each Δ per token of its response, so that long responses weigh no more than short ones
            (length-normalised DPO, as in Lambert et al. 2024, arXiv 2411.15124); β then has another unit.
    """

    average_log_prob: bool = field(default=False, kw_only=True)

    def logratios(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """Δ_w and Δ_l as the loss sees them, [pairs] each."""
        chosen, rejected = pairs.chosen_logratio, pairs.rejected_logratio
        if self.average_log_prob:
            return chosen / pairs.chosen_tokens, rejected / pairs.rejected_tokens
        return chosen, rejected

    def margin(self, pairs: PairLogProbs) -> Tensor:
        """βh, [pairs]."""
        chosen, rejected = self.logratios(pairs)
        return self.beta * (chosen - rejected)

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """βΔ of each side."""
        chosen, rejected = self.logratios(pairs)
        return self.beta * chosen, self.beta * rejected


@dataclass(frozen=True)
class DPOLoss(LogRatioLoss):
    """−log σ(βh) (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7).

    With label smoothing ε, cDPO: (1 − ε)(−log σ(βh)) + ε(−log σ(−βh)) (Mitchell 2023, Eq. 3).

    Args:
        label_smoothing: ε in [0, 0.5), the assumed rate of flipped labels.
    """

    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_label_smoothing(self.label_smoothing)

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        h = self.margin(pairs)
        return -(1 - self.label_smoothing) * logsigmoid(h) - self.label_smoothing * logsigmoid(-h)

    def value_at_start(self) -> float | None:
        """ln 2, whatever β and ε."""
        return math.log(2)


@dataclass(frozen=True)
class RobustDPOLoss(LogRatioLoss):
    """[(1 − ε)(−log σ(βh)) − ε(−log σ(−βh))]/(1 − 2ε) (rDPO, Chowdhury et al. 2024, arXiv 2403.00409).

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
        h = self.margin(pairs)
        flipped = self.label_smoothing
        return (-(1 - flipped) * logsigmoid(h) + flipped * logsigmoid(-h)) / (1 - 2 * flipped)

    def value_at_start(self) -> float | None:
        """ln 2, whatever β and ε."""
        return math.log(2)


@dataclass(frozen=True)
class IPOLoss(LogRatioLoss):
    """(h − 1/(2β))² (Azar et al. 2023, arXiv 2310.12036, Eq. 17).

    Args:
        average_log_prob: h from log-ratios averaged over the response's tokens, as TRL does; the paper's own text and
            code sum them.
    """

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        chosen, rejected = self.logratios(pairs)
        return (chosen - rejected - 1 / (2 * self.beta)).square()

    def value_at_start(self) -> float | None:
        """1/(4β²), summed or averaged."""
        return 1 / (4 * self.beta**2)


@dataclass(frozen=True)
class HingeLoss(LogRatioLoss):
    """relu(1 − βh): no gradient once a pair is won by 1/β nats (SLiC-HF, Zhao et al. 2023, arXiv 2305.10425, as Liu et
    al. 2023, arXiv 2309.06657, put it on log-ratios)."""

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        return (1 - self.margin(pairs)).relu()

    def value_at_start(self) -> float | None:
        """1."""
        return 1.0


@dataclass(frozen=True)
class APOZeroLoss(LogRatioLoss):
    """1 − σ(βΔ_w) + σ(βΔ_l): for chosen responses better than the model's own, which become likelier, while rejected
    ones become less likely (D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 7)."""

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return 1 - torch.sigmoid(chosen) + torch.sigmoid(rejected)

    def value_at_start(self) -> float | None:
        """½ + ½."""
        return 1.0


@dataclass(frozen=True)
class APODownLoss(LogRatioLoss):
    """σ(βΔ_w) + 1 − σ(βh): for responses worse than the model's own, which all become less likely, the rejected ones
    more so (D'Oosterlinck et al. 2024, arXiv 2408.06266, Eq. 8)."""

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return torch.sigmoid(chosen) + 1 - torch.sigmoid(chosen - rejected)

    def value_at_start(self) -> float | None:
        """½ + ½."""
        return 1.0


@dataclass(frozen=True)
class SimPOLoss(PreferenceLoss):
    """−log σ(β(l̄_w − l̄_l) − γ): mean log-probs, no reference (Meng et al. 2024, arXiv 2405.14734, Eq. 6).

    Args:
        beta: β of the mean log-probs; the paper's own runs have 2 to 10, so it does not compare with DPO's.
        gamma: γ, the margin aimed at, in units of βl̄.
    """

    gamma: float = 0.5

    needs_reference: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.gamma >= 0:
            raise ValueError(f"loss.gamma must be at least 0, not {self.gamma}")

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return -logsigmoid(chosen - rejected - self.gamma)

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """βl̄ of each side (Eq. 4)."""
        chosen, rejected = _means(pairs)
        return self.beta * chosen, self.beta * rejected


@dataclass(frozen=True)
class ORPOLoss(PreferenceLoss):
    """−l̄_w − β·log σ(log-odds_w − log-odds_l), log-odds = l̄ − log(1 − e^l̄): SFT on the chosen side and an odds ratio,
    no reference (Hong et al. 2024, arXiv 2403.07691, Eqs. 4, 6 and 7).

    Args:
        beta: the paper's λ, the weight of the odds ratio beside the chosen side's likelihood.
    """

    needs_reference: ClassVar[bool] = False

    def __call__(self, pairs: PairLogProbs) -> Tensor:
        chosen, rejected = self.rewards(pairs)
        return -_means(pairs)[0] - self.beta * logsigmoid(chosen - rejected)

    def rewards(self, pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
        """The log-odds of each side."""
        chosen, rejected = _means(pairs)
        return chosen - log1mexp(chosen), rejected - log1mexp(rejected)


@dataclass(frozen=True)
class KTOLoss:
    """w_d·(1 − σ(β(Δ − z))) of a desirable response, w_u·(1 − σ(β(z − Δ))) of an undesirable one
    (Ethayarajh et al. 2024, arXiv 2402.01306, §4.1), over single responses and not over pairs.

    Args:
        beta: β, the strength of the pull to the reference. Required.
        desirable_weight: w_d (the paper's λ_D). Where the data holds far more of one kind than of the other, set the
            weights so that w_d·n_d and w_u·n_u are about equal.
        undesirable_weight: w_u (λ_U).
    """

    beta: float
    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            _require_positive(name, getattr(self, name))

    def __call__(self, logratios: Tensor, desirable: Tensor, baseline: Tensor) -> Tensor:
        """[rows] losses.

        Args:
            logratios: [rows] Δ.
            desirable: [rows] bool.
            baseline: z ≥ 0, scalar, without a gradient: an estimate of KL(π‖π₀) from mismatched responses.
        """
        gain = self.beta * (logratios - baseline)
        weights = self.weights(desirable).to(gain.dtype)
        return weights * (1 - torch.sigmoid(torch.where(desirable, gain, -gain)))

    def weights(self, desirable: Tensor) -> Tensor:
        """[rows] w_d or w_u; half of it is a row's loss while policy = reference."""
        kinds = torch.tensor([self.undesirable_weight, self.desirable_weight], dtype=torch.float64)
        return kinds.to(desirable.device)[desirable.long()]


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x < 0 without cancellation: by expm1 above −ln 2, by log1p below (Mächler 2012, Eq. 7).

    0 stands for the largest number below it, since no softmax over two tokens or more reaches 0 but by rounding.
    """
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -math.log(2)
    # Each branch sees only what it is good at, or its infinite gradient would come through as NaN.
    inner = torch.where(near, x, torch.full_like(x, -1.0))
    outer = torch.where(near, torch.full_like(x, -1.0), x)
    return torch.where(near, torch.log(-torch.expm1(inner)), torch.log1p(-torch.exp(outer)))


def _means(pairs: PairLogProbs) -> tuple[Tensor, Tensor]:
    """l̄_w and l̄_l, [pairs] each."""
    return pairs.policy_chosen / pairs.chosen_tokens, pairs.policy_rejected / pairs.rejected_tokens


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"loss.{name} must be greater than 0, not {value}")


def _check_label_smoothing(rate: float) -> None:
    if not 0 <= rate < 0.5:
        raise ValueError(f"loss.label_smoothing must lie in [0, 0.5), not {rate}")
