"""``fit``, ``validate``, ``test`` and ``predict``: a LightningCLI that ends bad input with one line, gives every run
its own folder, and lets nothing override what the user set.

How a run is carried out by default (progress bar, checkpoints, logs) is here; what it computes is in its config alone.
"""

from __future__ import annotations

import ast
import json
import os
import pickle
import signal
import sys
import traceback
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import Namespace, get_loader, set_loader, set_parsing_settings
from lightning.fabric.utilities.rank_zero import _get_rank
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

from rlhf_lit import runs
from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.commands.help import Formatter, class_helps, describe
from rlhf_lit.commands.noise import quiet_libraries
from rlhf_lit.commands.parser_errors import check_keys, condense, mendable, read_configs, read_options, refuse_ambiguous
from rlhf_lit.commands.renamed import require_present_names
from rlhf_lit.commands.shipped import with_files
from rlhf_lit.data.modules import TextDataModule
from rlhf_lit.errors import UserError, say, tell
from rlhf_lit.files import check_yaml
from rlhf_lit.losses.advantages import AdvantageEstimator
from rlhf_lit.losses.kl import KLController
from rlhf_lit.losses.policy_gradient import PolicyLoss
from rlhf_lit.losses.preference import PreferenceLoss
from rlhf_lit.memory.phases import is_out_of_memory, out_of_memory, phase_of
from rlhf_lit.parallel.faults import RANK_LOST, how_to_go_on, is_lost_connection
from rlhf_lit.preflight.callback import Preflight
from rlhf_lit.preflight.check import LeftOut
from rlhf_lit.trainer import loggers, progress, strategies
from rlhf_lit.trainer.callbacks import Checkpoint, HFExport, PredictionWriter, RolloutDump, RunRecord, SampleWriter
from rlhf_lit.trainer.preemption import Preemption
from rlhf_lit.trainer.ranks import Ranks
from rlhf_lit.trainer.timing import Phases
from rlhf_lit.training.checkpoint import WholeFiles

TRAINER_DEFAULTS: dict[str, Any] = {
    "num_sanity_val_steps": 0,  # for PPO a sanity check would sample before the first step
    "log_every_n_steps": 1,  # a Lightning step is an optimizer step here
    "use_distributed_sampler": False,  # the data modules deal rows to ranks themselves
    "inference_mode": False,  # tensors born in inference mode cannot enter a later backward
    "enable_model_summary": False,
}

ELSEWHERE: dict[str, tuple[tuple[Any, ...], str]] = {
    "gradient_clip_val": ((None,), "model.optimizer.max_grad_norm clips the gradient"),
    "gradient_clip_algorithm": ((None,), "model.optimizer.max_grad_norm clips the gradient, by its norm"),
    "accumulate_grad_batches": (
        (1,),
        "data.batch_size is what one optimizer step sees, and data.micro_batch_tokens how it is cut for the device",
    ),
    "default_root_dir": ((None,), "the run folder is <runs>/<name>/version_<n>: set runs and name"),
}
"""Trainer fields that another field of ours replaces: name → (values that say nothing, what to set instead)."""

BAD_PRECISION = {
    "bf16-true": "it would round the stored log-probs too; set model.base.dtype to bfloat16 and leave precision",
    "16-true": "float16 weights do not train; set model.base.dtype to bfloat16 and leave precision",
    "16-mixed": "gradients would be clipped before they are unscaled; use bf16-mixed",
    "16": "gradients would be clipped before they are unscaled; use bf16-mixed",
    "bf16": "say bf16-mixed",
}

_load_yaml = get_loader("yaml")


def _load_checked(text: str) -> Any:
    """As the parser loads YAML, but not what is ambiguous."""
    if any(sign in text for sign in "\n{&"):
        check_yaml(text)
    return _load_yaml(text)


class Parser(LightningArgumentParser):
    """Ends in one line and status 2 where jsonargparse prints its usage and some sixty lines, and refuses YAML in which
    a key is there twice."""

    program = "rlhf-lit"  # of the command that is running: nested parsers are made without it

    def __init__(self, *args: Any, **options: Any) -> None:
        Parser.program = options.setdefault("prog", Parser.program)
        super().__init__(*args, **{"formatter_class": Formatter, **options})
        set_loader("yaml", _load_checked, (yaml.YAMLError,))

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Nested parsers still raise: a union is resolved by trying its members and catching that."""
        if not self.exit_on_error:
            raise ArgumentError(None, message) from ex
        say(f"error: {condense(message)}", every_rank=True)
        sys.exit(2)

    def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **options: Any) -> Namespace:
        """As jsonargparse's, but null survives in ``--model.optimizer.max_grad_norm=null``.

        It reads an option's value as YAML, and hands that of a field's field down to a nested parser as Python prints
        it: None, which is a text in YAML.

        Raises:
            UserError: no such config; one with a key that is there twice, or with aliases that have no end, and
                likewise of an option.
        """
        if self.exit_on_error:
            args = with_files(sys.argv[1:] if args is None else args)
            refuse_ambiguous(args)
        if not self.exit_on_error and args is not None:
            args = [_as_yaml(word) for word in args]
        return super().parse_args(args, *rest, **options)

    def instantiate_classes(self, cfg: Namespace, **options: Any) -> Namespace:
        """As jsonargparse's; see ``mendable``."""
        with mendable():
            return super().instantiate_classes(cfg, **options)


def _as_yaml(word: str) -> str:
    """``--key=None`` as ``--key=null``, and likewise inside a list or a mapping; anything else as it is."""
    flag, equals, value = word.partition("=")
    if "None" not in value:
        return word
    try:
        return f"{flag}{equals}{json.dumps(ast.literal_eval(value), ensure_ascii=False)}"
    except (ValueError, SyntaxError, TypeError):
        return word


class RunCLI(LightningCLI):
    """The command line of the four training commands.

    Beside Lightning's keys a config has ``name`` and ``runs`` (where the run's folder stands), ``preflight`` (whether
    it is checked before its first step, or by which checks not) and ``checkpoint`` (how often to save). ``--ckpt_path
    last`` continues the newest run of that name that has a checkpoint, in its folder; ``last-or-none`` starts one where
    there is none.
    """

    shown: str | None = None  # the command's name, where it is another than that of the trainer's function

    def __init__(self, argv: list[str]) -> None:
        argv = with_files(argv)
        self.asked = argv[0]
        self.documents = [*read_configs(argv), *read_options(argv)]
        require_present_names(self.documents)
        self.folder: Path | None = None
        self.resumed = False
        super().__init__(
            model_class=Algorithm,
            datamodule_class=TextDataModule,
            save_config_callback=RunRecord,
            trainer_defaults=TRAINER_DEFAULTS,
            seed_everything_default=0,
            parser_class=Parser,
            parser_kwargs={"allow_abbrev": False, "prog": f"rlhf-lit {self.shown or argv[0]}"},
            subclass_mode_model=True,
            subclass_mode_data=True,
            args=argv,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,  # the record of a run is its config.yaml, not its checkpoint
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """The one that is asked for: its parser takes a tenth of a second to make, and Lightning would make four."""
        return {name: skipped for name, skipped in super().subcommands().items() if name == self.asked}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The keys that Lightning does not have."""
        parser.add_argument(
            "--name", type=str | None, default=None, help="Name of the run (default: the algorithm's, lower-case)."
        )
        parser.add_argument("--runs", type=str, default="runs", help="Folder that holds the runs.")
        # Known to all four commands, since a run's config.yaml serves them all.
        parser.add_argument(
            "--preflight",
            type=bool | LeftOut,
            default=True,
            help="Check rows, models and rewards before the first step of fit; {skip: [NAME]} leaves some out.",
        )
        parser.add_lightning_class_args(Checkpoint, "checkpoint")
        parser.add_lightning_class_args(RolloutDump, "debug")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **options: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **options)
        describe(parser, self.shown or subcommand, ELSEWHERE)
        return parser

    def _parse_ckpt_path(self) -> None:
        """Lightning merges a checkpoint's hyper-parameters over what the user set here; we never do."""

    def before_instantiate_classes(self) -> None:
        """Refuse what can be told from the config alone, and find the checkpoint to start from."""
        config = self.config[self.subcommand]
        for note in check_keys(self.documents, config):
            say(f"note: {note}")
        _check_trainer(config.trainer)
        if self.subcommand == "fit" and (length := progress.note_on_length(config.trainer, config.data.init_args)):
            say(f"note: {length}")
        if config.name is None:
            config.name = config.model.class_path.rsplit(".", 1)[-1].lower()
        parent = runs.run_parent(config.runs, config.name)
        if config.ckpt_path == "last-or-none":
            config.ckpt_path = "last" if runs.has_checkpoint(parent) else None
        if config.ckpt_path:
            self.resumed = self.subcommand == "fit" and config.ckpt_path == "last"
            checkpoint = runs.resolve_checkpoint(str(config.ckpt_path), config.runs, config.name)
            config.ckpt_path = str(checkpoint)
            if self.resumed:
                self.folder = checkpoint.parent.parent

    def instantiate_classes(self) -> None:
        """As Lightning does it, the trainer among them; see ``mendable``."""
        with mendable():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that works in the run's folder, with our callbacks beside the user's and a CSV log always."""
        config = self.config[self.subcommand]
        settings = self._get(self.config_init, "trainer")
        made = None
        if self.folder is None and not _get_rank():  # other ranks never write; they are told by broadcast
            self.folder = made = runs.new_run(config.runs, config.name)
        folder = self.folder or runs.run_parent(config.runs, config.name)
        self.save_config_kwargs = {"resumed": self.resumed}
        written = self._parser(self.subcommand).dump(config, skip_none=False, skip_validation=True)
        # The ranks are compared first, before anything is written.
        callbacks = [Ranks(yaml.safe_load(written)), *_as_list(settings.callbacks)]
        plugins = _as_list(settings.plugins)
        if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
            plugins.append(WholeFiles())
        left_out: LeftOut | bool = self._get(self.config_init, "preflight")
        if self.subcommand == "fit" and left_out:  # before the callbacks that show or write anything
            callbacks.append(Preflight(LeftOut() if left_out is True else left_out))
        try:
            return super().instantiate_trainer(
                default_root_dir=str(folder.absolute()),
                callbacks=[*callbacks, *_own_callbacks(settings, callbacks)],
                logger=_loggers(settings.logger, folder, config.name),
                plugins=plugins,
            )
        except BaseException as error:
            if made is not None:
                made.rmdir()  # nothing was written yet: a refused trainer leaves no empty run behind
            if isinstance(error, TypeError):  # what Lightning raises for some values, such as devices: -3
                raise UserError(f"trainer: {_one_line(error)}") from error
            raise

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        if config["enable_checkpointing"] is False:
            callbacks = [c for c in callbacks if not isinstance(c, Checkpoint)]
        return super()._instantiate_trainer(config, callbacks)

    def _run_subcommand(self, subcommand: str) -> None:
        try:
            super()._run_subcommand(subcommand)
        except SIGTERMException as stop:  # it has no status of its own: a run that was ended would pass for a whole one
            say(f"terminated{self._way_on()}")
            raise SystemExit(128 + signal.SIGTERM) from stop
        except MisconfigurationException as error:
            raise UserError(_one_line(error)) from error
        except ValueError as error:
            if _innermost_module(error).startswith("lightning."):  # a setting that shows as wrong only now
                raise UserError(_one_line(error)) from error
            raise
        except (RuntimeError, KeyError, pickle.UnpicklingError) as error:
            from torch._dynamo.exc import BackendCompilerFailed

            if is_lost_connection(error):
                line = f"another rank ended or did not answer: {_one_line(error)}{self._way_on()}"
                say(f"error: {line}", every_rank=True)
                raise SystemExit(RANK_LOST) from error
            if is_out_of_memory(error):
                raise UserError(out_of_memory(phase_of(error), self.config[subcommand])) from error
            if isinstance(error, BackendCompilerFailed):
                line = "torch.compile could not compile the layers; without base.compile they run as they are"
                raise UserError(f"base.compile: {line} ({str(error).splitlines()[0]})") from error
            if self.config[subcommand].ckpt_path and _while_restoring(error):
                path = self.config[subcommand].ckpt_path
                raise UserError(f"--ckpt_path {path}: not a checkpoint of this model ({_one_line(error)})") from error
            raise

    def _way_on(self) -> str:
        """How a run that ends here is continued."""
        return f"; {how_to_go_on(Path(self.trainer.default_root_dir))}" if self.subcommand == "fit" else ""

    def after_fit(self) -> None:
        """One line to end with: where the run is, and what it reached."""
        if self.trainer.is_global_zero:
            tell(progress.closing_line(self.trainer))


def _check_trainer(trainer: Namespace) -> None:
    for key, (silent, instead) in ELSEWHERE.items():
        if trainer[key] not in silent:
            raise UserError(f"trainer.{key} is not for this: {instead}")
    strategies.check(str(trainer.strategy))
    precision = str(trainer.precision)
    if precision in BAD_PRECISION:
        raise UserError(f"trainer.precision {precision}: {BAD_PRECISION[precision]}")


def _as_list(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _own_callbacks(settings: Namespace, given: list[Callback]) -> list[Callback]:
    own: list[Callback] = [
        Preemption(),
        Phases(),
        SampleWriter(),
        PredictionWriter(),
        HFExport(),
    ]
    if settings.enable_progress_bar is not False and not any(isinstance(c, ProgressBar) for c in given):
        own.append(progress.progress_bar())
    return own


def _loggers(given: Any, folder: Path, name: str) -> list[Logger]:
    """The CSV log first (its folder is the run's), then the user's."""
    others = [] if isinstance(given, bool) else _as_list(given)
    for logger in others:
        if isinstance(logger, loggers.WandB):
            logger.use_folder(folder, f"{name}/{folder.name}")
    return [loggers.MetricsFile(folder), *others]


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _frames(error: BaseException) -> Iterator[tuple[str, str]]:
    """(module, function) from the outermost to the innermost frame."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        yield frame.f_globals.get("__name__", ""), frame.f_code.co_name


def _innermost_module(error: BaseException) -> str:
    return [module for module, _ in _frames(error)][-1]


def _while_restoring(error: BaseException) -> bool:
    return any("checkpoint_connector" in module for module, _ in _frames(error))


def main(argv: list[str], command: Callable[[list[str]], object] = RunCLI) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict``, or what another command line makes of their options.

    Raises:
        UserError: bad input, in one line.
        SystemExit: 2 from the parser (its line is printed), 0 after ``--help`` or ``--print_config``.
    """
    quiet_libraries()
    if os.getcwd() not in sys.path and "" not in sys.path:
        # A reward function in the user's folder, for the console script as for `python -m`.
        sys.path.append(os.getcwd())
    # Dataclasses are plain fields to the parser, unless it is told that one is a family chosen from by class_path.
    set_parsing_settings(subclasses_enabled=[PreferenceLoss, PolicyLoss, AdvantageEstimator, KLController])
    for words in [[argv[0], option] for option in class_helps(argv)] or [argv]:
        try:
            command(words)
        except SystemExit as stop:
            if stop.code:
                raise
    return 0
