"""Means over a whole evaluation, over all ranks."""

from __future__ import annotations

from torch import Tensor, nn
from torchmetrics import MeanMetric


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
