"""Reading a sweep file, and the commands of its arms, made by wandb's own builder as its agent makes them."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_lit.errors import UserError
from rlhf_lit.files import load_yaml
from rlhf_lit.sweep import space

METHODS = ("grid", "random")
_ELSEWHERE = {
    "early_terminate": "a local sweep runs every arm to its end; remove it, or use `wandb agent`",
    "controller": "a local sweep has no controller; remove it, or use `wandb agent`",
    "scheduler": "a local sweep has no scheduler; remove it, or use `wandb agent`",
    "metrics": "a local sweep searches for nothing: name one `metric` to be shown, or none",
    "job": "this is a W&B Launch sweep; give a `command` instead",
    "image_uri": "this is a W&B Launch sweep; give a `command` instead",
}
_IGNORED = {"apiVersion", "kind", "description", "name", "project", "entity"}  # W&B's own, of no effect here
_USED = {"method", "parameters", "command", "program", "run_cap", "metric"}
_MACRO = re.compile(r"\$\{[^}]*\}")


@dataclass(frozen=True)
class SweepFile:
    """A sweep file whose parts have been checked.

    Attributes:
        path: where it was read.
        text: as it was read.
        method: grid or random.
        parameters: by name in alphabetical order, in which W&B's search goes through them.
        command: words and macros, `${args}` among them.
        program: what `${program}` stands for.
        run_cap: the most arms there may be, or None.
        metric: what W&B would optimise, shown when an arm ends, or None.
    """

    path: Path
    text: str
    method: str
    parameters: tuple[space.Parameter, ...]
    command: tuple[str, ...]
    program: str
    run_cap: int | None
    metric: str | None

    def arms(self, seed: int, count: int | None) -> list[dict[str, Any]]:
        """The parameters of the first ``count`` arms (None: all of a grid, ``run_cap`` of a random search).

        Raises:
            UserError: a random search without a number of arms.
        """
        count = min((n for n in (count, self.run_cap) if n is not None), default=None)
        if self.method == "grid":
            return space.grid(list(self.parameters))[:count]
        if count is None:
            raise UserError(f"{self.path}: a random search has no end: say how many arms with --count or run_cap")
        return space.draws(list(self.parameters), seed, count)

    @staticmethod
    def arguments(parameters: Mapping[str, Any]) -> list[str]:
        """What wandb's agent puts in the place of `${args}`."""
        from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

        command = {"args": {name: {"value": value} for name, value in parameters.items()}}
        return list(create_sweep_command_args(command)["args"])

    def words(self, parameters: Mapping[str, Any], *more: str) -> list[str]:
        """An arm's command: the file's, its macros filled in, and then ``more``.

        `${interpreter}` is the Python that runs this; wandb's agent takes the first `python` of the PATH.
        """
        from wandb.sdk.launch.sweeps.utils import create_sweep_command

        filled = {
            "${env}": ["/usr/bin/env"],
            "${interpreter}": [sys.executable],
            "${program}": [self.program],
            "${args}": self.arguments(parameters),
        }
        # create_sweep_command fills in ${envvar:…}, in the list it is given.
        return [w for word in create_sweep_command(list(self.command)) for w in filled.get(word, [word])] + [*more]

    def argv(self, parameters: Mapping[str, Any], *more: str) -> list[str]:
        """The part of the command that ``rlhf_lit`` itself is given: `fit` and what follows it."""
        words = self.words(parameters, *more)
        return words[_after_program(words) :]


def _after_program(words: Sequence[str]) -> int:
    """Index of the word after `-m rlhf_lit` or `rlhf-lit`; 0 where there is neither."""
    for i, word in enumerate(words):
        if (word == "rlhf_lit" and i and words[i - 1] == "-m") or Path(word).name == "rlhf-lit":
            return i + 1
    return 0


def read(path: Path) -> SweepFile:
    """Read and check a sweep file.

    Raises:
        UserError: what is wrong with it, and where.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = load_yaml(text, str(path))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a W&B sweep file, with `method:`, `parameters:` and `command:`")
    for key in content:
        if key in _ELSEWHERE:
            raise UserError(f"{path}: {key}: {_ELSEWHERE[key]}")
        if key not in _USED | _IGNORED:
            raise UserError(f"{path}: {key}: unknown key; a sweep file has {', '.join(sorted(_USED | _IGNORED))}")
    method = content.get("method")
    if method not in METHODS:
        searches = " (bayes needs W&B's server: use `wandb agent`)" if method == "bayes" else ""
        raise UserError(f"{path}: method: expected grid or random, not {method!r}{searches}")
    parameters = _read_parameters(path, content.get("parameters"), method)
    program = content.get("program", "")
    command = _read_command(path, content.get("command"), program)
    return SweepFile(
        path, text, method, parameters, command, program, _read_cap(path, content), _read_metric(path, content)
    )


def _read_parameters(path: Path, given: Any, method: str) -> tuple[space.Parameter, ...]:
    if not isinstance(given, dict) or not given:
        raise UserError(f"{path}: parameters: expected dotted keys, such as model.loss.beta")
    found = tuple(space.read_parameter(str(name), given[name], str(path)) for name in sorted(given, key=str))
    for parameter in found:
        if parameter.name in ("config", "name", "runs", "ckpt_path"):
            raise UserError(f"{path}: parameters.{parameter.name}: the sweep sets this itself, or the command does")
        if method == "grid" and parameter.distribution not in space.GRID:
            raise UserError(
                f"{path}: parameters.{parameter.name}: a grid has no points of {parameter.distribution}; "
                f"list `values:`, or use method: random"
            )
    return found


def _read_command(path: Path, given: Any, program: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not given:
        raise UserError(f"{path}: command: expected a list of words that ends in ${{args}}; see sweeps/ for examples")
    command = tuple(str(word) for word in given)
    for word in command:
        for macro in _MACRO.findall(word):
            known = ("${env}", "${interpreter}", "${program}", "${args}")
            if macro.startswith("${envvar:"):
                continue
            if macro not in known or word != macro:
                raise UserError(f"{path}: command: {word}: expected one of {', '.join(known)}, as a word of its own")
    if command.count("${args}") != 1:
        raise UserError(f"{path}: command: ${{args}} must stand there once")
    if late := [word for word in command[command.index("${args}") :] if word.split("=")[0] in ("--config", "-c")]:
        raise UserError(f"{path}: command: {late[0]} after ${{args}} would undo the sweep's values; put ${{args}} last")
    if "${program}" in command and not (program and isinstance(program, str)):
        raise UserError(f"{path}: program: expected a name for ${{program}} in the command")
    words = [program if word == "${program}" else word for word in command]
    start = _after_program(words)
    if not start or words[start : start + 1] != ["fit"]:
        raise UserError(f"{path}: command: only `python -m rlhf_lit fit …` can be checked and resumed by this command")
    if taken := [w for w in words[start:] if w.split("=")[0] in ("--runs", "--ckpt_path")]:
        raise UserError(f"{path}: command: {taken[0]}: the sweep sets this itself")
    return command


def _read_cap(path: Path, content: dict[str, Any]) -> int | None:
    cap = content.get("run_cap")
    if cap is not None and (isinstance(cap, bool) or not isinstance(cap, int) or cap < 1):
        raise UserError(f"{path}: run_cap: expected a whole number above 0, not {cap!r}")
    return cap


def _read_metric(path: Path, content: dict[str, Any]) -> str | None:
    metric = content.get("metric")
    if metric is None:
        return None
    if not isinstance(metric, dict) or not isinstance(metric.get("name"), str):
        raise UserError(f"{path}: metric: expected `name:` and `goal:` below it")
    if metric.get("goal", "minimize") not in ("minimize", "maximize"):
        raise UserError(f"{path}: metric.goal: expected minimize or maximize, not {metric['goal']!r}")
    return str(metric["name"])
