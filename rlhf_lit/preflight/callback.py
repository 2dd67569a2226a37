"""The callback that runs the checks and shows what they found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.seed import isolate_rng

from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.data.text_module import TextDataModule
from rlhf_lit.errors import UserError
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.preflight.check import VERDICTS, Check, LeftOut, show
from rlhf_lit.preflight.checks import checks
from rlhf_lit.preflight.rows import Looked


class Preflight(Callback):
    """Runs the checks when models and data are ready and nothing was trained yet, and prints them in a table.

    Every rank looks at rows of its own; the worst verdict counts, on all of them.

    Args:
        left_out: checks that are not made.

    Raises:
        UserError: a check failed; in one line which, what was found, and what to do.
    """

    def __init__(self, left_out: LeftOut = LeftOut()) -> None:
        super().__init__()
        self.left_out = left_out

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Once per ``fit``, after a checkpoint was restored."""
        assert isinstance(pl_module, Algorithm)
        started = time.perf_counter()
        own: Any = getattr(trainer, "datamodule", None)
        data = own if isinstance(own, TextDataModule) else None
        found: list[Check] = []
        looked = Looked()
        error = None
        sharding = sharding_of(pl_module)
        with isolate_rng(), trainer.precision_plugin.forward_context(), torch.no_grad():
            try:
                # All ranks must run the same passes where models are sharded: there they look at the same rows.
                place = (0, 1) if sharding.is_sharded else (trainer.global_rank, trainer.world_size)
                found.extend(checks(pl_module, data, *place, self.left_out, looked))
            except UserError as problem:  # on this rank; the others wait for its findings
                error = str(problem)
        sharding.reshard()
        reports = _gathered((found, error), trainer.world_size)
        for _, line in reports:
            if line is not None:
                raise UserError(line)
        verdict = merged([rank for rank, _ in reports])
        if trainer.is_global_zero:
            show(verdict, looked, time.perf_counter() - started)
        for check in verdict:
            if check.verdict == "failed":
                without = f"to go on without it, preflight: {{skip: [{check.name}]}}"
                raise UserError(f"preflight: {check.name}: {check.found}; {check.advice}; {without}")


def _gathered(own: Any, world: int) -> list[Any]:
    """Each rank's, on all ranks."""
    if world == 1:
        return [own]
    parts: list[Any] = [None] * world
    torch.distributed.all_gather_object(parts, own)
    return parts


def merged(ranks: Sequence[Sequence[Check]]) -> list[Check]:
    """The worst of the ranks' verdicts on each check, in the order of the checks."""
    worst: dict[str, Check] = {}
    for check in (check for rank in ranks for check in rank):
        known = worst.get(check.name)
        if known is None or VERDICTS.index(check.verdict) > VERDICTS.index(known.verdict):
            worst[check.name] = check
    return list(worst.values())
