"""A configuration measured at one micro-batch size after another."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.data.modules import TextDataModule
from rlhf_lit.memory.gauges import CudaBytes, Gauge, LiveBytes
from rlhf_lit.memory.measurement import Measurement, Watch
from rlhf_lit.memory.phases import Phase, is_out_of_memory
from rlhf_lit.memory.worst_case import STEPS, WorstCase, prepare


@dataclass(frozen=True)
class Machine:
    """Where and how a worst case is carried out.

    Attributes:
        accelerator, precision: as the trainer takes them.
        limit: bytes that may be in use; None is all of a GPU, or what is free of the host's.
    """

    accelerator: str = "auto"
    precision: Any = None
    limit: int | None = None


class Bench:
    """A module and its data's settings, measured at one micro-batch size after another.

    Args:
        module: the algorithm; it is of no use for training afterwards.
        data: the data module, of which only the settings are read.
        machine: where to measure.
    """

    def __init__(self, module: Algorithm, data: TextDataModule, machine: Machine) -> None:
        self.module = module
        self.data = data
        self.machine = machine
        # Threads of their own would load weights past the counter.
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        device = self.trainer([]).strategy.root_device
        self.gauge: Gauge = CudaBytes(device) if device.type == "cuda" else LiveBytes(device.type)
        self.limit = self.gauge.room if machine.limit is None else machine.limit

    def trainer(self, callbacks: list[Callback]) -> Trainer:
        return Trainer(
            accelerator=self.machine.accelerator,
            devices=1,
            precision=self.machine.precision,
            max_steps=STEPS,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            inference_mode=False,
        )

    def measure(self, budget: int) -> Measurement:
        """The worst case at ``budget`` padded tokens per micro-batch."""
        with self.gauge:
            measurement = Measurement(self.gauge)
            prepare(self.module, measurement)
            worst = WorstCase(self.module, self.data, budget, measurement)
            try:
                self.trainer([Watch(measurement, self.limit)]).fit(self.module, datamodule=worst)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                measurement.fits = False
                measurement.enter(measurement.phase)
        # Out here the traceback, which held the step's tensors, is gone; the trainer holds the optimizer's state.
        del worst
        self.module.trainer = None
        self.module.zero_grad(set_to_none=True)
        gc.collect()
        return measurement

    def worst(self, budget: int) -> WorstCase:
        """The rows of a measurement at ``budget``, to be asked about once the models are built."""
        return WorstCase(self.module, self.data, budget, Measurement(self.gauge))

    def largest(self, first: Measurement, budget: int) -> tuple[int, Measurement]:
        """The largest micro-batch that fits: exact up to 8 of the longest rows, then to an eighth.

        Args:
            first: what was measured at ``budget``.
            budget: padded tokens per micro-batch.

        Returns:
            Padded tokens per micro-batch, and what was measured with them.

        Raises:
            OutOfMemory: not even one row fits, or memory runs out where micro-batches have no say.
        """
        if not first.fits and first.phase in ("load", "rollout"):
            raise OutOfMemory(first.phase)
        worst = self.worst(budget)
        useful = worst.useful_rows
        rows = min(useful, max(1, budget // worst.row_tokens))
        failed = None if first.fits else rows
        most, best, fitting = (budget, first, rows) if first.fits else (0, None, 0)
        while (failed or useful + 1) - fitting > max(1, fitting // 8 if failed else 1):
            trial = min(2 * fitting, useful) if failed is None else (fitting + failed) // 2
            found = self.measure(trial * worst.row_tokens)
            if found.fits:
                most, best, fitting = trial * worst.row_tokens, found, trial
            else:
                failed = trial
        if best is None:
            raise OutOfMemory(first.phase)
        return most, best


class OutOfMemory(Exception):
    """Nothing fits.

    Args:
        phase: in which memory ran out.
    """

    def __init__(self, phase: Phase) -> None:
        super().__init__(phase)
        self.phase = phase
