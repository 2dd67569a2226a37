"""A reward model from preference pairs (Bradley–Terry; Ouyang et al. 2022, arXiv 2203.02155, Eq. 1).

The score is a scalar head on the hidden state of the last real token, found from the row's length, so that padding
and company in the batch do not change it. After training a constant is added so that chosen (reference) responses
of the training data score 0 on average (Stiennon et al. 2020, arXiv 2009.01325); it is saved with the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics.classification import BinaryCalibrationError
from torchmetrics.regression import PearsonCorrCoef

from rlhf_lit.algorithms.base import Algorithm, Optimizer, Schedule, Share
from rlhf_lit.batches import PreferenceBatch, Sequences
from rlhf_lit.losses.bradley_terry import BradleyTerryLoss
from rlhf_lit.models.heads import reward_bias, sequence_scores
from rlhf_lit.models.loading import Base, load_scorer, unwrapped
from rlhf_lit.rollout.rewards import score_sequences


class RewardModel(Algorithm):
    """A scorer of responses.

    Args:
        base: the model to start from, usually an SFT run.
        loss: Bradley–Terry, with or without margin and centring.
        learning_rate: peak learning rate.
        optimizer: which optimizer.
        schedule: learning rate over the run.
        centre_pairs: after training, shift the scores so that the chosen responses of the first so many training pairs
            average 0; 0 leaves them.
    """

    progress_metrics = ("accuracy",)

    def __init__(
        self,
        base: Base,
        loss: BradleyTerryLoss = BradleyTerryLoss(),
        learning_rate: float = 1e-5,
        optimizer: Optimizer = Optimizer(),
        schedule: Schedule = Schedule(),
        centre_pairs: int = 512,
    ) -> None:
        super().__init__(base, learning_rate, optimizer, schedule)
        self.loss = loss
        self.centre_pairs = centre_pairs
        self.scorer: nn.Module
        # The stage under evaluation, whose pair metrics take the scores in as they are made.
        self._evaluating: str | None = None
        # Calibration of σ(r_w − r_l), and whether the score is a measure of length.
        self.calibration = nn.ModuleDict(
            {stage: BinaryCalibrationError(n_bins=10) for stage in ("val_pairs", "test_pairs")}
        )
        self.length_correlation = nn.ModuleDict({stage: PearsonCorrCoef() for stage in ("val_pairs", "test_pairs")})

    def build(self) -> None:
        self.scorer = load_scorer(self.base)

    def modes(self) -> None:
        self.scorer.train()

    def units(self, batch: PreferenceBatch) -> dict[str, Tensor]:
        return {"pairs": torch.tensor(float(len(batch)), device=self.device)}

    @property
    def weight_of(self) -> str:
        return "pairs"

    def scores(self, sequences: Sequences) -> Tensor:
        """[rows] scores, the centring constant included."""
        inner = unwrapped(self.scorer)
        return sequence_scores(self.scorer, inner.score, sequences) + reward_bias(inner)

    def shares(self, batch: PreferenceBatch, units: dict[str, Tensor]) -> Iterator[Share]:
        sides = batch.chosen.join(batch.rejected)  # one forward for both sides
        scores = self.scores(sides)
        chosen, rejected = scores.chunk(2)
        if self._evaluating:
            self._observe(scores, sides, self._evaluating)
        losses = self.loss(chosen, rejected, batch.margin)
        count = units["pairs"]
        with torch.no_grad():
            metrics = {
                "accuracy": (chosen > rejected).float().sum() / count,
                "margin": (chosen - rejected).sum() / count,
                "score_chosen": chosen.sum() / count,
                "score_rejected": rejected.sum() / count,
                "score_square": (chosen.square() + rejected.square()).sum() / (2 * count),
            }
        yield Share(losses.sum() / count, metrics)

    def evaluate(self, batch: PreferenceBatch, stage: str) -> None:
        self._evaluating = stage
        super().evaluate(batch, stage)
        self._evaluating = None

    def _observe(self, scores: Tensor, sides: Sequences, stage: str) -> None:
        """Take a micro-batch's scores (chosen, then rejected) into the stage's calibration and length correlation."""
        calibration, correlation = self._pair_metrics(stage)
        chosen, rejected = scores.chunk(2)
        # Each pair in both orders: with one alone every label is 1 and a constant 1 would look calibrated.
        probability = torch.sigmoid(torch.cat([chosen - rejected, rejected - chosen]))
        labels = torch.cat([torch.ones_like(chosen), torch.zeros_like(chosen)]).long()
        calibration.update(probability, labels)
        correlation.update(scores, sides.mask.sum(-1).float())

    def _pair_metrics(self, stage: str) -> tuple[BinaryCalibrationError, PearsonCorrCoef]:
        calibration, correlation = self.calibration[f"{stage}_pairs"], self.length_correlation[f"{stage}_pairs"]
        assert isinstance(calibration, BinaryCalibrationError)
        assert isinstance(correlation, PearsonCorrCoef)
        return calibration, correlation

    def on_validation_epoch_end(self) -> None:
        self._log_pairs("val")

    def on_test_epoch_end(self) -> None:
        self._log_pairs("test")

    def _log_pairs(self, stage: str) -> None:
        calibration, correlation = self._pair_metrics(stage)
        self.log(f"{stage}/calibration_error", calibration.compute())
        self.log(f"{stage}/length_correlation", correlation.compute())
        averages = {name: self.average(f"{stage}/score_{name}") for name in ("chosen", "rejected", "square")}
        mean = (averages["chosen"] + averages["rejected"]) / 2
        self.log(f"{stage}/score_mean", mean)
        self.log(f"{stage}/score_std", (averages["square"] - mean.square()).clamp(min=0).sqrt())
        calibration.reset()
        correlation.reset()

    def predict_step(self, batch: PreferenceBatch, batch_idx: int) -> list[dict[str, Any]]:
        """The scores of both sides of each pair (none where the last batch is smaller than the number of ranks)."""
        if not len(batch):
            return []
        chosen, rejected = (
            score_sequences(self.scorer, side, batch.micro_batch_tokens) for side in (batch.chosen, batch.rejected)
        )
        return [
            {"score_chosen": float(a), "score_rejected": float(b), "correct": bool(a > b)}
            for a, b in zip(chosen, rejected, strict=True)
        ]

    def on_train_end(self) -> None:
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if self.centre_pairs and datamodule is not None:
            self.centre(datamodule.batches_in_order(self.centre_pairs))

    @torch.no_grad()
    def centre(self, batches: Iterable[PreferenceBatch]) -> None:
        """Shift the scores so that the chosen responses of ``batches`` average 0."""
        training = self.scorer.training
        self.scorer.eval()
        scores = [
            self.scores(micro_batch.chosen)
            for batch in batches
            for micro_batch in batch.to(self.device).micro_batches()
        ]
        self.scorer.train(training)
        inner = unwrapped(self.scorer)
        inner.config.reward_bias = reward_bias(inner) - float(torch.cat(scores).mean())
