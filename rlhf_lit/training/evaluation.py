"""Evaluation of an algorithm: losses and metrics on held-out batches, averaged over all of them and all ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchmetrics import MeanMetric

from rlhf_lit.randomness import reseed


class Averages(nn.ModuleDict):
    """Weighted means of what an evaluation logs, one for each key; made when a key is first seen."""

    def add(self, key: str, value: Tensor, weight: Tensor) -> MeanMetric:
        """Take a value in, and return the mean to be logged."""
        if key not in self:
            self[key] = MeanMetric().to(value.device)
        mean = self._mean(key)
        mean.update(value, weight)
        return mean

    def value(self, key: str) -> Tensor:
        """The mean so far."""
        return self._mean(key).compute()

    def _mean(self, key: str) -> MeanMetric:
        mean: nn.Module = self[key]
        assert isinstance(mean, MeanMetric)
        return mean


# The functions below are methods of ``Algorithm``, which is their first argument.


def validation_step(algorithm: Any, batch: Any, batch_idx: int) -> None:
    """Losses and metrics on held-out rows (none where the last batch is smaller than the number of ranks)."""
    _evaluation_step(algorithm, batch, batch_idx, "val")


def test_step(algorithm: Any, batch: Any, batch_idx: int) -> None:
    """The same on the test rows."""
    _evaluation_step(algorithm, batch, batch_idx, "test")


def _evaluation_step(algorithm: Any, batch: Any, batch_idx: int, stage: str) -> None:
    algorithm.prepare(batch)
    reseed("validation", algorithm.global_step, batch_idx, algorithm.global_rank)
    algorithm.evaluate(batch, stage)


def evaluate(algorithm: Any, batch: Any, stage: str) -> None:
    """Average the batch's numbers into the stage's, weighted by what the batch is counted in."""
    denominators = algorithm.denominators(batch)
    totals: dict[str, Tensor] = {}
    for term in algorithm.step_losses(batch, denominators):
        term.add_to(totals)
    for name, total in totals.items():
        weight = denominators[algorithm.metrics_averaged_over.get(name, algorithm.averaged_over)]
        algorithm.log_averages(stage, {name: total}, weight, batch_size=len(batch))


def log_averages(algorithm: Any, stage: str, values: dict[str, Tensor], weight: Tensor, batch_size: int) -> None:
    """Log means over a whole evaluation, over all ranks."""
    for name, value in values.items():
        key = f"{stage}/{name}"
        shown = name == "loss" or name in algorithm.progress_metrics
        mean = algorithm.averages.add(key, value, weight)
        algorithm.log(key, mean, prog_bar=shown, batch_size=batch_size, metric_attribute=f"averages.{key}")
