"""The loss of a mixture of experts' routers, beside what an algorithm minimises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_lit.errors import say
from rlhf_lit.models.routing import collecting, hear_routers, own_coefficient
from rlhf_lit.training.reduction import StepLoss

SEQUENCES = "router_sequences"  # among a step's denominators


class RouterLoss:
    """c · the mean of L_bal over the batch's sequences on all ranks (``losses.balance``), where c is above 0.

    Args:
        model: what trains. Its routers are heard from now on. None as long as there is no model.
        coefficient: c; None is what the model's own config says.

    Raises:
        UserError: the model has no routers for which there is such a loss.
    """

    def __init__(self, model: nn.Module | None = None, coefficient: float | None = None) -> None:
        self.from_config = coefficient is None
        self.coefficient, self.chosen = coefficient or 0.0, 0
        if model is None:
            return
        if coefficient is None:
            self.coefficient = own_coefficient(model)
        if self.coefficient:
            self.chosen = hear_routers(model)

    def tell(self) -> None:
        """Say where the model's config has asked for it."""
        if self.from_config and self.coefficient:
            say(
                f"note: model.base.router_loss: {self.coefficient:g}, as the model's config says "
                "(output_router_logits, router_aux_loss_coef); 0 leaves it out"
            )

    def denominators(self, batch: Any) -> dict[str, Tensor]:
        """How many sequences this rank's batch holds; nothing where there is no such loss."""
        sequences = batch.answers() if self.coefficient else ()
        count = sum(len(part) for part in sequences)
        return {SEQUENCES: torch.tensor(float(count), device=sequences[0].tokens.device)} if sequences else {}

    def added(self, terms: Iterator[StepLoss], denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        """The losses of a micro-batch, each with that of the routers in its pass.

        Args:
            terms: of ``Algorithm.losses``.
            denominators: of the whole batch, summed over all ranks; in an evaluation, which leaves it out, without its.
        """
        if SEQUENCES not in denominators:
            yield from terms
            return
        while True:
            with collecting(self.chosen) as collected:
                term = next(terms, None)
            if term is None:
                return
            if collected.balance:
                mean = torch.cat(collected.balance).sum() / denominators[SEQUENCES]
                metrics = {**term.metrics, "router_loss": mean.detach()}
                term = StepLoss(term.loss + self.coefficient * mean, metrics)
            yield term
