"""What `--help` shows: what is typed, and the options that a person needs first."""

from __future__ import annotations

from argparse import Action
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

from jsonargparse import DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

ABOUT = {
    "fit": "Train a model",
    "validate": "Losses and accuracies on the validation rows",
    "test": "Losses and accuracies on the test rows",
    "predict": "Completions, or a reward model's scores, to predictions.jsonl",
    "memory": "Measure what a configuration needs, and the largest micro-batch that fits; nothing is trained",
}
# Of the trainer's some forty options the first to be shown; the others follow in Lightning's order.
TRAINER = (
    "max_epochs", "max_steps", "accelerator", "devices", "num_nodes", "strategy", "precision", "logger", "callbacks",
    "val_check_interval", "check_val_every_n_epoch", "limit_val_batches", "max_time", "fast_dev_run",
)  # fmt: skip
_TITLES = {
    "model": "the algorithm (SFT, RewardModel, DPO, KTO, PPO, RLOO, GRPO) with its model",
    "data": "the rows (SFTDataModule, PreferenceDataModule, UnpairedDataModule, RankingDataModule, RolloutDataModule)",
    "checkpoint": "how often the state of the run is saved",
    "debug": "to look into a run",
    "trainer": "Lightning's trainer",
}
_STATE = "the state to start from"
_OURS = {
    "config": "A YAML file, or a name that `rlhf-lit configs` lists; each further one is laid over those before it.",
    "ckpt_path": (
        "A checkpoint's file, a run folder, or `last`: the newest run of that name goes on, in its folder "
        "(`last-or-none`: or begins)."
    ),
    "weights_only": "As of torch.load.",
}
"""What is said of options that Lightning describes otherwise."""


class Formatter(DefaultHelpFormatter):
    """jsonargparse's, with one line of usage: what must be given, and that options follow."""

    def add_usage(self, usage: str | None, actions: Iterable[Action], groups: Any, prefix: str | None = None) -> None:
        """Where a command has no line of its own."""
        if usage is None:
            names = [action.metavar or action.dest.upper() for action in actions if not action.option_strings]
            required = [action for action in actions if action.option_strings and action.required]
            options = [f"{one.option_strings[0]}={one.dest.rsplit('.', 1)[-1].upper()}" for one in required]
            usage = " ".join(["%(prog)s", *map(str, names), *options, "[--option=value ...]"])
        super().add_usage(usage, actions, groups, prefix)

    def add_argument(self, action: Action) -> None:
        """Not of one that another key replaces. (With a suppressed help it would be absent from configurations too.)"""
        if not getattr(action, "is_elsewhere", False):
            super().add_argument(action)


def describe(parser: LightningArgumentParser, command: str, elsewhere: Iterable[str]) -> None:
    """What the help of a training command says, and in which order.

    Args:
        parser: the command's own, with all its options.
        command: its name.
        elsewhere: trainer options that another key replaces; they are not shown.
    """
    parser.usage = f"rlhf-lit {command} --config NAME_OR_FILE [--config OVERLAY ...] [--key=value ...]"
    parser.description = (
        f"{ABOUT[command]}. The options of an algorithm are shown by `rlhf-lit {command} --model DPO --help`, those of "
        f"its rows by `rlhf-lit {command} --data PreferenceDataModule --help`, those of a loss by `rlhf-lit {command} "
        "--model.help=DPO --model.loss.help=DPOLoss`; what a command line comes to, by --print_config at its end. "
        "`rlhf-lit configs` lists configurations to begin with; docs/configuration.md explains them."
    )
    named = {name: parser.groups[name] for name in _TITLES}
    for name, title in _TITLES.items():
        named[name].title = title
    rest: list[Any] = [group for group in parser._action_groups if group not in named.values()]
    for group in rest:
        if any(action.dest == "ckpt_path" for action in group._group_actions):
            group.title = _STATE
    after = [named[name] for name in ("checkpoint", "debug", "trainer")]
    opening = [group for group in rest if group.title != _STATE]
    state = [group for group in rest if group.title == _STATE]
    parser._action_groups = [*opening, named["model"], named["data"], *state, *after]
    place = {f"trainer.{name}": i for i, name in enumerate(TRAINER)}
    named["trainer"]._group_actions.sort(key=lambda action: place.get(action.dest.removesuffix(".help"), len(place)))
    for action in parser._actions:
        action.help = _OURS.get(action.dest, action.help)
    hidden = {f"trainer.{name}" for name in elsewhere}
    for action in named["trainer"]._group_actions:
        action.is_elsewhere = action.dest in hidden


def class_helps(argv: Sequence[str]) -> list[str]:
    """`--model.help=DPO` for `--model DPO --help`, and likewise of `--data`; nothing where no class or no help is asked
    for."""
    if not {"--help", "-h"} & {*argv}:
        return []
    named = [tuple(word.split("=", 1)) for word in argv if "=" in word]
    named += [(flag, value) for flag, value in pairwise(argv) if not value.startswith("-")]
    return [f"{flag}.help={value}" for wanted in ("--model", "--data") for flag, value in named if flag == wanted]
