"""The reward model's loss (Bradley and Terry 1952; Ouyang et al. 2022, Eq. 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid


@dataclass(frozen=True)
class BradleyTerryLoss:
    """−log σ(r_w − r_l − margin) + c·(r_w + r_l)².

    Args:
        centring: c, pulls the scores of a pair towards a mean of 0 (Eisenstein et al. 2023, arXiv 2312.09244, Eq. 3,
            advises 0.01). 0 leaves it out.
        use_margin: subtract the pair's margin (Llama 2, arXiv 2307.09288, Eq. 2).
    """

    centring: float = 0.0
    use_margin: bool = False

    def __post_init__(self) -> None:
        if self.centring < 0:
            raise ValueError(f"loss.centring must be at least 0, not {self.centring}")

    def __call__(self, chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
        """[pairs] scores of both sides and [pairs] margins → [pairs] losses."""
        difference = chosen - rejected
        if self.use_margin:
            difference = difference - margin
        loss = -logsigmoid(difference)
        if self.centring:
            loss = loss + self.centring * (chosen + rejected).square()
        return loss
