"""The command ``memory``."""

from __future__ import annotations

import warnings
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.cli import LightningArgumentParser

from rlhf_lit.commands.training import RunCLI
from rlhf_lit.commands.training import main as run_command
from rlhf_lit.errors import UserError, tell
from rlhf_lit.memory.bench import Bench, Machine, OutOfMemory
from rlhf_lit.memory.measurement import Measurement
from rlhf_lit.memory.phases import Phase, out_of_memory

GIB = 2**30


class MemoryCLI(RunCLI):
    """``fit``'s command line, which measures instead of training and writes nothing."""

    shown = "memory"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One key more than ``fit`` has."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--limit_gb",
            type=float | None,
            default=None,
            help="Search as if the device had this many GiB (null: what it has; on a CPU, what is free now).",
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Where to measure is all that is taken of the trainer's settings; no folder is made."""
        settings = self._get(self.config_init, "trainer")
        wanted = self.config[self.subcommand].limit_gb
        if wanted is not None and not wanted > 0:
            raise UserError(f"limit_gb must be greater than 0 or null, not {wanted}")
        machine = Machine(settings.accelerator, settings.precision, None if wanted is None else round(wanted * GIB))
        self.bench = Bench(self.model, self.datamodule, machine)
        return self.bench.trainer([])

    def _run_subcommand(self, subcommand: str) -> None:
        budget = self.datamodule.micro_batch_tokens
        first = self.bench.measure(budget)
        show(self.bench, first, budget)
        try:
            most, found = self.bench.largest(first, budget)
        except OutOfMemory as full:
            config = self.config[subcommand]
            config.data.init_args.micro_batch_tokens = 1  # the search has been there
            raise UserError(out_of_memory(full.phase, config)) from None
        tell(verdict(self.bench, most, found))


def show(bench: Bench, found: Measurement, budget: int) -> None:
    """What was measured: a peak for each phase, and what stays."""
    from rich.console import Console
    from rich.table import Table

    worst = bench.worst(budget)
    lines: list[tuple[str, int]] = [(f"peak, {_PHASES[phase]}", size) for phase, size in found.peaks.items()]
    if held := found.held:
        lines += [
            ("held: weights", held.weights),
            ("held: adapters and heads", held.adapters),
            ("held: gradients, within a step", held.gradients),
            ("held: optimizer state", held.optimizer),
        ]
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, size in lines:
        table.add_row(name, in_words(size))
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{type(bench.module).__name__} on {bench.gauge.name}: rows of {worst.longest} tokens, "
        f"micro-batches of {budget} tokens"
    )
    console.print(table)


_PHASES: dict[Phase, str] = {
    "load": "loading",
    "rollout": "rollout (sampling)",
    "score": "score pass",
    "update": "update",
}


def verdict(bench: Bench, most: int, found: Measurement) -> str:
    """The line that the search ends with."""
    worst = bench.worst(most)
    whole = most // worst.row_tokens >= worst.useful_rows
    return (
        f"largest data.micro_batch_tokens within {in_words(bench.limit)}: {most}"
        + (" (the whole batch at once; more changes nothing)" if whole else "")
        + f", peak {in_words(found.peak)}"
    )


def in_words(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def main(argv: list[str]) -> int:
    """Run ``memory``. Raises as ``fit`` does."""
    warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
    return run_command(["fit", *argv], MemoryCLI)
