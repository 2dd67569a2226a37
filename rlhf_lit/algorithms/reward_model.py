"""A reward model from preference pairs or ranked lists (Bradley–Terry; Ouyang et al. 2022, arXiv 2203.02155, Eq. 1).

The score is a scalar head on the hidden state of the last real token, found from the row's length, so that padding
and company in the batch do not change it. Each answer goes through the model once, however many pairs it is in. After
training a constant is added so that the preferred (reference) responses of the training data score 0 on average
(Stiennon et al. 2020, arXiv 2009.01325), and on request the head is scaled; both are saved with the model
(``normalisation``).

Left out: scores of single tokens or steps (process rewards), several heads, and Plackett–Luce over whole rankings.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torchmetrics.classification import BinaryCalibrationError
from torchmetrics.regression import PearsonCorrCoef

from rlhf_lit.algorithms.algorithm import Algorithm, Optimizer, Schedule, StepLoss
from rlhf_lit.batches import ComparedBatch, Comparisons, PreferenceBatch, RankedBatch, Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.losses.bradley_terry import BradleyTerryLoss
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base
from rlhf_lit.models.heads import reward_bias, sequence_scores
from rlhf_lit.models.loading import load_scorer
from rlhf_lit.models.packing import layout_of
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.rollout.rewards import score_sequences
from rlhf_lit.training.head_start import HeadStart, first_rows, measured, scale_down
from rlhf_lit.training.normalisation import Normalisation, head_of, load, normalise, save, undo


class RewardModel(Algorithm):
    """A scorer of responses.

    Args:
        base: the model to start from, usually an SFT run.
        loss: Bradley–Terry, with or without margin and centring.
        learning_rate: peak learning rate.
        optimizer: which optimizer.
        schedule: learning rate over the run.
        centre_pairs: after training, shift the scores so that the chosen responses of the first so many training pairs
            (of ranked lists: their best answers) average 0; 0 leaves them.
        unit_variance: then also scale them so that all responses of those pairs have standard deviation 1.
        head: how a new score head starts: drawn by the seed with standard deviation 1/√(d+1), and divided by the
            standard deviation of its scores of the first training rows where that is above 1 (`scaled`), or as it was
            drawn (`seed`).
    """

    progress_metrics = ("accuracy",)
    metrics_averaged_over = {  # noqa: RUF012
        **dict.fromkeys(("accuracy", "margin", "score_chosen", "score_rejected"), "pairs"),
        **dict.fromkeys(("score_mean", "score_square"), "answers"),
    }
    learns_from = (PreferenceBatch, RankedBatch)
    averaged_over = "prompts"
    trains_scorer = True

    def __init__(
        self,
        base: Base,
        loss: BradleyTerryLoss = BradleyTerryLoss(),
        learning_rate: float = 1e-5,
        optimizer: Optimizer = Optimizer(),
        schedule: Schedule = Schedule(),
        centre_pairs: int = 512,
        unit_variance: bool = False,
        head: HeadStart = "scaled",
    ) -> None:
        super().__init__(base, learning_rate, optimizer, schedule)
        if centre_pairs < 0:
            raise UserError(f"model.centre_pairs must be at least 0, not {centre_pairs}")
        if unit_variance and not centre_pairs:
            raise UserError("model.unit_variance: needs pairs to measure the scores on; set model.centre_pairs above 0")
        self.loss = loss
        self.centre_pairs = centre_pairs
        self.unit_variance = unit_variance
        self.head: HeadStart = head
        self.scorer: nn.Module
        self.normalisation: Normalisation | None = None
        # The stage under evaluation, whose pair metrics take the scores in as they are made.
        self._evaluating: str | None = None
        # Calibration of σ(r_w − r_l), and whether the score is a measure of length.
        self.calibration = nn.ModuleDict(
            {stage: BinaryCalibrationError(n_bins=10) for stage in ("val_pairs", "test_pairs")}
        )
        self.length_correlation = nn.ModuleDict({stage: PearsonCorrCoef() for stage in ("val_pairs", "test_pairs")})

    def build(self) -> None:
        self.scorer = load_scorer(self.base)

    @property
    def trained_model(self) -> nn.Module:
        return self.scorer

    def set_train_mode(self) -> None:
        self.scorer.train()

    def denominators(self, batch: ComparedBatch) -> dict[str, Tensor]:
        compared = batch.comparisons()
        counts = {"prompts": len(batch), "pairs": len(compared.better), "answers": len(compared.answers)}
        return {name: torch.tensor(float(count), device=self.device) for name, count in counts.items()}

    def scores(self, sequences: Sequences) -> Tensor:
        """[rows] scores, the constant included."""
        inner = unwrapped(self.scorer)
        return sequence_scores(self.scorer, inner.score, sequences) + reward_bias(inner)

    def losses(self, batch: ComparedBatch, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        compared = batch.comparisons()
        scores = self.scores(compared.answers)
        if self._evaluating and not self.on_dummy:
            self._observe(scores, compared, self._evaluating)
        better, worse = scores[compared.better], scores[compared.worse]
        # Every prompt counts as one, however many pairs its answers make: 1/C(K, 2) of each among K without ties.
        losses = self.loss(better, worse, compared.margin) / compared.siblings
        with torch.no_grad():
            sums = {
                "accuracy": (better > worse).float(),
                "margin": better - worse,
                "score_chosen": better,
                "score_rejected": worse,
                "score_mean": scores,
                "score_square": scores.square(),
            }
            counted_in = self.metrics_averaged_over
            metrics = {name: values.sum() / denominators[counted_in[name]] for name, values in sums.items()}
        yield StepLoss(losses.sum() / denominators["prompts"], metrics)

    def evaluate(self, batch: ComparedBatch, stage: str) -> None:
        self._evaluating = stage
        super().evaluate(batch, stage)
        self._evaluating = None

    def _observe(self, scores: Tensor, compared: Comparisons, stage: str) -> None:
        """Take a micro-batch's scores into the stage's calibration and length correlation."""
        calibration, correlation = self._pair_metrics(stage)
        difference = scores[compared.better] - scores[compared.worse]
        # Each pair in both orders: with one alone every label is 1 and a constant 1 would look calibrated.
        probability = torch.sigmoid(torch.cat([difference, -difference]))
        labels = torch.cat([torch.ones_like(difference), torch.zeros_like(difference)]).long()
        calibration.update(probability, labels)
        correlation.update(scores, compared.answers.mask.sum(-1).float())

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
        mean, square = (self.averages.value(f"{stage}/score_{name}") for name in ("mean", "square"))
        self.log(f"{stage}/score_std", (square - mean.square()).clamp(min=0).sqrt())
        calibration.reset()
        correlation.reset()

    def predict_step(self, batch: ComparedBatch, batch_idx: int) -> list[dict[str, Any]]:
        """The scores of both sides of each pair, or of each answer of a list (none where the last batch is smaller than
        the number of ranks)."""
        answers = batch.comparisons().answers
        return batch.score_records(score_sequences(self.scorer, answers, batch.micro_batch_tokens))

    # Before training

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.head == "scaled" and unwrapped(self.scorer).new_head and self.trainer.ckpt_path is None:
            scale_down(self, head_of(self), self._first_scores(), "model.head")

    @torch.no_grad()
    def _first_scores(self) -> Tensor:
        """[answers] the scores of the first training rows, the same on all ranks."""
        if not len(rows := first_rows(self)):
            return torch.zeros(0)
        batch = self.trainer.datamodule.collate(rows)  # type: ignore[attr-defined]
        tokens = torch.zeros(len(batch), dtype=torch.int64)
        for side in batch.answers():
            tokens.index_add_(0, batch.rows_of_answers(), side.lengths)
        batch = batch.select(torch.arange(measured(tokens.tolist()))).to(self.device)
        self.scorer.eval()
        with self.trainer.precision_plugin.forward_context():
            found = [self.scores(part.comparisons().answers) for part in batch.micro_batches(layout_of(self))]
        sharding_of(self).reshard()
        self.set_train_mode()
        return torch.cat(found)

    # After training

    def configure_callbacks(self) -> list[Callback]:
        return [_AfterTraining()]

    def finish(self) -> None:
        """Normalise the scores on the first training rows, as configured."""
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if self.centre_pairs and datamodule is not None:
            self.normalise(datamodule.batches_in_order(self.centre_pairs))

    @torch.no_grad()
    def normalise(self, batches: Iterable[ComparedBatch]) -> None:
        """Shift the scores so that the preferred responses of ``batches`` average 0; with ``unit_variance`` scale them
        so that all responses have standard deviation 1 (population). Scores that are no numbers are left alone."""
        training = self.scorer.training
        self.scorer.eval()
        found: list[Tensor] = []
        reference: list[Tensor] = []
        for batch in batches:
            for part in batch.to(self.device).micro_batches(layout_of(self)):
                compared = part.comparisons()
                # Without a scale to find, the preferred ones are enough.
                rows = torch.arange(len(compared.best), device=compared.best.device)
                rows = rows if self.unit_variance else rows[compared.best]
                found.append(self.scores(compared.answers.select(rows)).double())
                reference.append(compared.best[rows])
        sharding_of(self).reshard()  # all ranks made the same passes
        self.scorer.train(training)
        self.normalisation = normalise(
            self, torch.cat(found), torch.cat(reference), self.unit_variance, self.normalisation
        )

    def on_train_start(self) -> None:
        if self.normalisation:
            undo(self, self.normalisation)
            self.normalisation = None
        super().on_train_start()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.normalisation:
            save(checkpoint, self.normalisation)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.normalisation = load(self, checkpoint)


class _AfterTraining(Callback):
    """Normalises before the last checkpoint is saved: Lightning asks the module itself only after its callbacks."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, RewardModel)
        pl_module.finish()
