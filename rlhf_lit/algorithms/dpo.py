"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its family.

For each pair, the summed log-probs of both responses under the policy and the frozen reference; what is made of them
is the loss's own business (``rlhf_lit.losses.preference``).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from rlhf_lit.algorithms.base import Optimizer, Schedule, Share, require_no_dropout
from rlhf_lit.algorithms.writing import WritingAlgorithm
from rlhf_lit.batches import PreferenceBatch
from rlhf_lit.losses.preference import PairLogProbs, PreferenceLoss
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.loading import Base
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.roles import Roles
from rlhf_lit.rollout.engine import Sampling


class DPO(WritingAlgorithm):
    """A policy trained straight from preference pairs.

    The reference is the base as it was loaded: the adapters off with fresh LoRA, a frozen copy otherwise. Both sides
    run without dropout, so that at step 0 policy and reference agree to the bit.

    Args:
        base: the model to start from, usually an SFT run.
        loss: which loss, with its β.
        learning_rate: peak learning rate.
        optimizer: which optimizer.
        schedule: learning rate over the run.
        sampling: how the sample completions and predictions are drawn.
    """

    progress_metrics = ("accuracy", "margin")

    def __init__(
        self,
        base: Base,
        loss: PreferenceLoss,
        learning_rate: float = 1e-6,
        optimizer: Optimizer = Optimizer(),
        schedule: Schedule = Schedule(),
        sampling: Sampling = Sampling(),
    ) -> None:
        super().__init__(base, learning_rate, optimizer, schedule, sampling)
        require_no_dropout(base, "DPO")
        self.loss = loss

    def build(self) -> None:
        self.roles = Roles(self.base, reference=True)

    def modes(self) -> None:
        self.roles.without_dropout()

    def units(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        return {"pairs": torch.tensor(float(len(batch)), device=self.device)}

    @property
    def weight_of(self) -> str:
        return "pairs"

    def shares(self, batch: PreferenceBatch, units: dict[str, Tensor]) -> Iterator[Share]:
        sides = batch.chosen.join(batch.rejected)  # one forward for both sides
        with torch.no_grad(), self.roles.acting("reference") as model:
            reference = row_sums(token_logprobs(model, sides), sides.mask)
        with self.roles.acting("policy") as model:
            policy = row_sums(token_logprobs(model, sides), sides.mask)
            pairs = PairLogProbs(*policy.chunk(2), *reference.chunk(2), *sides.mask.sum(-1).chunk(2))
            losses = self.loss(pairs)
            yield Share(losses.sum() / units["pairs"], self._metrics(pairs, units["pairs"]))

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
