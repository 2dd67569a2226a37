"""Every arm's command of a sweep through the parser that its run will use, before anything is started."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from typing import Any

from lightning.pytorch import Trainer

from rlhf_lit.commands.parser_errors import check_keys, read_configs, read_options
from rlhf_lit.commands.shipped import with_files
from rlhf_lit.commands.training import RunCLI
from rlhf_lit.commands.training import main as run_command
from rlhf_lit.errors import UserError
from rlhf_lit.sweep.check import Resolved, as_plain


class Check(RunCLI):
    """``fit``'s command line up to the module, the data module and the callbacks it makes; no folder, no run."""

    def before_instantiate_classes(self) -> None:
        """A value on the command line that reaches nothing is an arm that is not what it says."""
        super().before_instantiate_classes()
        options = [document for document in self.documents if document[0] == "the command line"]
        for note in check_keys(options, self.config[self.subcommand]):
            raise UserError(note)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Its settings have been parsed; a trainer of theirs might ask for devices that are busy now."""
        return Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    def _run_subcommand(self, subcommand: str) -> None:
        """Nothing is run."""

    def again(self, argv: list[str]) -> None:
        """Another command through the same parser, which takes longer to build than to use."""
        argv = with_files(argv)
        self.documents = [*read_configs(argv), *read_options(argv)]
        self.parse_arguments(self.parser, argv)
        self.before_instantiate_classes()
        self.instantiate_classes()


def resolve(commands: Mapping[str, Sequence[str]]) -> Iterator[Resolved]:
    """What each arm's command (name → `fit` and its options) resolves to, in order.

    Raises:
        UserError: the first arm that its run would refuse, and what about it.
    """
    made: list[Check] = []

    def first(argv: list[str]) -> None:
        made.append(Check(argv))

    for name, argv in commands.items():
        _call(name, lambda argv: made[0].again(argv) if made else run_command(argv, first), list(argv))
        yield as_plain(made[0].config["fit"])


def _call(name: str, call: Callable[[list[str]], object], argv: list[str]) -> None:
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            call(argv)
    except UserError as error:
        raise UserError(f"arm {name}: {error}") from error
    except SystemExit as stop:  # the parser has printed its line
        lines = [line for line in said.getvalue().splitlines() if line.strip()] or [str(stop.code)]
        raise UserError(f"arm {name}: {lines[-1].removeprefix('error: ')}") from stop
