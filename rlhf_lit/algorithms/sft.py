"""Supervised fine-tuning: maximise the log-likelihood of demonstrated responses.

L = −Σ m·log π / Σ m, both sums over the whole optimizer batch on all ranks.

Left out: label smoothing, and weights of single tokens beyond the mask.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_lit.algorithms.algorithm import Algorithm, Optimizer, Schedule, StepLoss
from rlhf_lit.algorithms.policy import Writer
from rlhf_lit.batches import SupervisedBatch
from rlhf_lit.losses.reductions import masked_sum
from rlhf_lit.losses.supervised import NLLLoss
from rlhf_lit.models.base import Base
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.roles import Roles
from rlhf_lit.rollout.engine import Sampling


class SFT(Writer, Algorithm):
    """Supervised fine-tuning on demonstrations.

    Args:
        base: the model to start from.
        learning_rate: peak learning rate.
        optimizer: which optimizer.
        schedule: learning rate over the run.
        sampling: how the sample completions and predictions are drawn.
    """

    learns_from = (SupervisedBatch,)
    averaged_over = "tokens"

    def __init__(
        self,
        base: Base,
        learning_rate: float = 2e-5,
        optimizer: Optimizer = Optimizer(),
        schedule: Schedule = Schedule(),
        sampling: Sampling = Sampling(),
    ) -> None:
        super().__init__(base, learning_rate, optimizer, schedule)
        self.sampling = sampling
        self.loss = NLLLoss()

    def build(self) -> None:
        self.roles = Roles(self.base)

    def set_train_mode(self) -> None:
        self.roles.train()

    def denominators(self, batch: SupervisedBatch) -> dict[str, Tensor]:
        return {"tokens": batch.sequences.mask.sum().float()}

    def losses(self, batch: SupervisedBatch, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        mask = batch.sequences.mask
        with self.roles.acting("policy") as model:
            logprobs = token_logprobs(model, batch.sequences)
            loss = masked_sum(self.loss(logprobs), mask) / denominators["tokens"]
            yield StepLoss(loss, {})

    def on_validation_epoch_end(self) -> None:
        self._log_perplexity("val")

    def on_test_epoch_end(self) -> None:
        self._log_perplexity("test")

    def _log_perplexity(self, stage: str) -> None:
        """exp of the mean loss over all held-out tokens, which no mean of batch perplexities is."""
        if f"{stage}/loss" in self.averages:
            self.log(f"{stage}/perplexity", torch.exp(self.averages.value(f"{stage}/loss")))
