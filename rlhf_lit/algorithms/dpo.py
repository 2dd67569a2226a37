"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its family.

For each pair, the summed log-probs of both responses under the policy and the reference; what is made of them is the
loss's own business (``rlhf_lit.losses.preference``). Losses that read no reference (SimPO, ORPO) are given none.

Left out: pairs sampled from the policy itself (online DPO), and weights of single tokens within a response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from rlhf_lit.algorithms.algorithm import Optimizer, Schedule, StepLoss
from rlhf_lit.algorithms.offline import OfflineAlgorithm, Reference
from rlhf_lit.batches import PreferenceBatch, Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.losses.preference import PairLogProbs, PreferenceLoss
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.base import Base
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.rollout.engine import Sampling


class DPO(OfflineAlgorithm):
    """A policy trained straight from preference pairs.

    The reference is the base as it was loaded: the adapters off with fresh LoRA, a frozen copy otherwise. Both sides
    run without dropout, so that at step 0 policy and reference agree to the bit.

    Args:
        base: the model to start from, usually an SFT run.
        loss: which loss, with its β.
        reference: whether there is one, computed beforehand or not, fixed or following the policy.
        sft_coefficient: c of an added c·Σ −log π(y_w,t)/Σ 1 over the tokens of the chosen responses, which keeps them
            likely (Liu et al. 2024, arXiv 2405.16436; Pang et al. 2024, arXiv 2404.19733). 0 leaves it out.
        learning_rate: peak learning rate.
        optimizer: which optimizer.
        schedule: learning rate over the run.
        sampling: how the sample completions and predictions are drawn.
    """

    learns_from = (PreferenceBatch,)
    averaged_over = "pairs"
    progress_metrics = ("accuracy", "margin")
    metrics_averaged_over = {"sft_loss": "chosen_tokens"}  # noqa: RUF012

    def __init__(
        self,
        base: Base,
        loss: PreferenceLoss,
        reference: Reference = Reference(),
        sft_coefficient: float = 0.0,
        learning_rate: float = 1e-6,
        optimizer: Optimizer = Optimizer(),
        schedule: Schedule = Schedule(),
        sampling: Sampling = Sampling(),
    ) -> None:
        super().__init__(base, reference, loss.needs_reference, learning_rate, optimizer, schedule, sampling)
        if not loss.needs_reference and reference.update:
            raise UserError(f"model.reference.update: {type(loss).__name__} reads no reference; leave it out")
        if not sft_coefficient >= 0:
            raise UserError(f"model.sft_coefficient must be at least 0, not {sft_coefficient}")
        self.loss = loss
        self.sft_coefficient = sft_coefficient

    def denominators(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        pairs = torch.tensor(float(len(batch)), device=self.device)
        return {"pairs": pairs, "chosen_tokens": batch.chosen.mask.sum().float()}

    def with_reference(self, batch: PreferenceBatch, logprobs: Callable[[Sequences], Tensor]) -> PreferenceBatch:
        return replace(batch, reference_chosen=logprobs(batch.chosen), reference_rejected=logprobs(batch.rejected))

    def losses(self, batch: PreferenceBatch, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        sides = batch.sides()  # one forward for both
        reference = self.reference_sums(sides, batch.reference_sides())
        with self.roles.acting("policy") as model:
            policy = row_sums(token_logprobs(model, sides), sides.mask)
            pairs = PairLogProbs(*policy.chunk(2), *reference.chunk(2), *sides.mask.sum(-1).chunk(2))
            loss = self.loss(pairs).sum() / denominators["pairs"]
            metrics = self._metrics(pairs, denominators["pairs"])
            if self.sft_coefficient:
                sft = -pairs.policy_chosen.sum() / denominators["chosen_tokens"]
                loss = loss + self.sft_coefficient * sft
                metrics["sft_loss"] = sft.detach()
            yield StepLoss(loss, metrics)

    def value_at_start(self, batch: PreferenceBatch) -> float | None:
        """The batch's loss while policy = reference; None where that is not known."""
        return self.loss.value_at_start() if self.compares and not self.sft_coefficient else None

    @torch.no_grad()
    def _metrics(self, pairs: PairLogProbs, count: Tensor) -> dict[str, Tensor]:
        chosen, rejected = self.loss.rewards(pairs)
        metrics = {
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "margin": chosen - rejected,
            "accuracy": (chosen > rejected).float(),
            "logprob_chosen": pairs.policy_chosen,
            "logprob_rejected": pairs.policy_rejected,
        }
        return {name: values.sum() / count for name, values in metrics.items()}
