"""Kahneman–Tversky optimisation (Ethayarajh et al. 2024, arXiv 2402.01306): single responses, each judged good or bad.

A response gains by being good and likelier than under the reference, or bad and less likely, beyond z: an estimate of
KL(π‖π₀), the same for the whole batch on all ranks, from the batch's prompts with responses of other rows.

Left out: losses without a reference, and KTO on pairs other than as two judged responses each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_lit.algorithms.algorithm import Optimizer, Schedule, StepLoss
from rlhf_lit.algorithms.offline import OfflineAlgorithm, Reference
from rlhf_lit.batches import Sequences, UnpairedBatch
from rlhf_lit.batches.micro_batches import SCORING_BUDGET
from rlhf_lit.errors import UserError
from rlhf_lit.losses.preference import KTOLoss
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.base import Base
from rlhf_lit.models.flops import uncounted
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.packing import layout_of
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.rollout.engine import Sampling


class KTO(OfflineAlgorithm):
    """A policy trained from responses that were judged one by one (``UnpairedDataModule``).

    The reference is the base as it was loaded, as in DPO; policy and reference run without dropout.

    Args:
        base: the model to start from, usually an SFT run.
        loss: β and the weights of both kinds of responses.
        reference: computed beforehand or not, fixed or following the policy.
        learning_rate: peak learning rate.
        optimizer: which optimizer.
        schedule: learning rate over the run.
        sampling: how the sample completions and predictions are drawn.
    """

    learns_from = (UnpairedBatch,)
    averaged_over = "rows"
    progress_metrics = ("baseline",)
    metrics_averaged_over = {"reward_desirable": "desirable", "reward_undesirable": "undesirable"}  # noqa: RUF012

    def __init__(
        self,
        base: Base,
        loss: KTOLoss,
        reference: Reference = Reference(),
        learning_rate: float = 1e-6,
        optimizer: Optimizer = Optimizer(),
        schedule: Schedule = Schedule(),
        sampling: Sampling = Sampling(),
    ) -> None:
        super().__init__(base, reference, True, learning_rate, optimizer, schedule, sampling)
        if reference.free:
            raise UserError("model.reference.free: KTO measures its gains from the KL to a reference; set it to false")
        self.loss = loss
        # z of the present batch, set by ``prepare``.
        self.baseline = torch.tensor(0.0)

    @torch.no_grad()
    def prepare(self, batch: UnpairedBatch) -> None:
        """z = max(0, mean Δ of the mismatched responses), over the whole batch on all ranks."""
        total = torch.zeros((), device=self.device)
        groups = batch.mismatched.cut_responses(SCORING_BUDGET * batch.micro_batch_tokens, layout_of(self))
        parts = (batch.select(rows) for rows in groups)
        for part, counts in sharding_of(self).passes(parts, batch.dummy):
            with uncounted(not counts):
                found = self._logratios(part.mismatched, part.reference_mismatched).sum()
            total = total + found if counts else total
        count = self.sum_over_ranks(torch.tensor(float(len(batch)), device=self.device))
        self.baseline = (self.sum_over_ranks(total) / count).clamp(min=0)

    def denominators(self, batch: UnpairedBatch) -> dict[str, Tensor]:
        desirable = batch.desirable.sum().float()
        rows = torch.tensor(float(len(batch)), device=self.device)
        return {"rows": rows, "desirable": desirable, "undesirable": rows - desirable}

    def with_reference(self, batch: UnpairedBatch, logprobs: Callable[[Sequences], Tensor]) -> UnpairedBatch:
        return replace(batch, reference=logprobs(batch.sequences), reference_mismatched=logprobs(batch.mismatched))

    def losses(self, batch: UnpairedBatch, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        with self.roles.acting("policy"):
            logratios = self._logratios(batch.sequences, batch.reference)
            losses = self.loss(logratios, batch.desirable, self.baseline)
            metrics = self._metrics(logratios.detach(), batch.desirable, denominators)
            yield StepLoss(losses.sum() / denominators["rows"], metrics)

    def value_at_start(self, batch: UnpairedBatch) -> float | None:
        """The batch's loss while policy = reference."""
        return float(self.loss.weights(batch.desirable).mean()) / 2

    def _logratios(self, sequences: Sequences, known: Tensor | None) -> Tensor:
        """[rows] Δ = log π(y|x) − log π₀(y|x)."""
        reference = self.reference_sums(sequences, known)
        with self.roles.acting("policy") as model:
            return row_sums(token_logprobs(model, sequences), sequences.mask) - reference

    def _metrics(self, logratios: Tensor, desirable: Tensor, denominators: dict[str, Tensor]) -> dict[str, Tensor]:
        rewards = self.loss.beta * logratios
        good, bad = (torch.where(kind, rewards, 0.0).sum() for kind in (desirable, ~desirable))
        share = len(logratios) / denominators["rows"]
        return {
            "reward_desirable": good / denominators["desirable"].clamp(min=1),
            "reward_undesirable": bad / denominators["undesirable"].clamp(min=1),
            "baseline": self.baseline * share,
        }
