"""Which runs a report is about, and what they left."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from rlhf_lit.errors import UserError
from rlhf_lit.files import load_yaml, short_path
from rlhf_lit.report.kinds import Kind, kind_of_run
from rlhf_lit.report.metrics import Series, read_metrics
from rlhf_lit.runs import EXPORT, versions
from rlhf_lit.sweep.records import Folder, read_arms


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: absolute.
        config: as it was resolved; of a run that went on, the last one.
        text: the same, as the file has it.
        metrics: by column.
        samples: the lines of ``samples.jsonl``.
    """

    folder: Path
    config: dict[str, Any]
    text: str
    metrics: dict[str, Series]
    samples: list[dict[str, Any]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """How people find it."""
        return short_path(self.folder)

    @property
    def algorithm(self) -> str:
        """The class's name."""
        return str(self.config["model"]["class_path"]).rsplit(".", 1)[-1]

    @cached_property
    def kind(self) -> Kind:
        """What the algorithm is."""
        return kind_of_run(self.config["model"]["class_path"], self.folder, self.model, self.metrics)

    @property
    def seed(self) -> int | None:
        """What `seed_everything` was."""
        seed = self.config.get("seed_everything")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else None

    @property
    def model(self) -> dict[str, Any]:
        """The algorithm's arguments."""
        return dict(self.config["model"].get("init_args") or {})

    @property
    def data(self) -> dict[str, Any]:
        """The data module's arguments."""
        return dict(self.config["data"].get("init_args") or {})

    def last(self, metric: str) -> float | None:
        """The last value that was logged."""
        return float(self.metrics[metric].values[-1]) if metric in self.metrics else None


@dataclass(frozen=True)
class LeftOut:
    """A run that is not in the report.

    Attributes:
        folder: where it is.
        reason: why not.
    """

    folder: str
    reason: str

    def __str__(self) -> str:
        return f"{self.folder}: {self.reason}"


def read_all(names: Sequence[str]) -> tuple[list[Run], list[LeftOut]]:
    """The finished runs that are meant, each once, and the others.

    Args:
        names: run folders, run names (`runs/dpo`: its newest finished version) and sweeps' folders.

    Raises:
        UserError: something that is none of them.
    """
    runs: dict[Path, Run] = {}
    left: dict[str, LeftOut] = {}
    for name in names:
        for found in _candidates(name):
            if isinstance(found, Path):
                folder = found.resolve()
                if folder in runs:
                    continue
                try:
                    runs[folder] = read(folder)
                    continue
                except UserError as error:
                    found = LeftOut(short_path(folder), str(error))
            left[found.folder] = found
    return list(runs.values()), list(left.values())


def _candidates(name: str) -> Iterator[Path | LeftOut]:
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(f"{name}: no such run; name a run folder, a run (runs/dpo) or a sweep's folder (runs/sweeps/…)")
    if not path.is_dir():
        raise UserError(f"{name} is a file: name the run's folder")
    sweep = Folder(path)
    if sweep.exists():
        for arm in read_arms(path):
            if arm.status == "finished" and arm.run:
                yield sweep.of(arm) / arm.run
            else:
                reason = f"{arm.status}: {arm.error}" if arm.error else arm.status
                yield LeftOut(short_path(sweep.of(arm).resolve()), f"the sweep has it as {reason}")
        return
    if (path / "config.yaml").is_file():
        yield path
        return
    runs = list(versions(path))
    if not runs:
        raise UserError(f"{name}: not a run folder: it has no config.yaml, no version_0 and no sweep.json")
    for run in runs:
        if (run / EXPORT).is_dir():
            yield run
            return
        yield LeftOut(short_path(run.resolve()), UNFINISHED)


UNFINISHED = "it has no hf/, which every finished fit leaves: it failed, is at work, or was no fit"


def read(folder: Path) -> Run:
    """A run's folder.

    Raises:
        UserError: it did not finish, or one of its files is damaged; said without the folder's name.
    """
    if not (folder / EXPORT).is_dir():
        raise UserError(UNFINISHED)
    files = sorted(folder.glob("config_resumed_*.yaml"), key=lambda file: int(file.stem.rsplit("_", 1)[-1]))
    first, last = (_config(file) for file in (folder / "config.yaml", [folder / "config.yaml", *files][-1]))
    config, text = last
    # A run that goes on names its own checkpoint; what it began from is the first configuration's.
    config = {**config, "ckpt_path": first[0].get("ckpt_path")}
    return Run(folder, config, text, read_metrics(folder / "metrics.csv"), read_lines(folder / "samples.jsonl"))


def _config(file: Path) -> tuple[dict[str, Any], str]:
    try:
        text = file.read_text(encoding="utf-8")
        config = load_yaml(text, file.name)
        if not isinstance(config["model"]["class_path"], str) or not isinstance(config["data"], dict):
            raise TypeError("no model.class_path")
    except FileNotFoundError as error:
        raise UserError(f"it has no {file.name}") from error
    except (OSError, UnicodeDecodeError, UserError, KeyError, TypeError) as error:
        raise UserError(f"{file.name} is not a run's configuration ({' '.join(str(error).split())})") from error
    return config, text


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The rows of a JSON Lines file; none where there is no file.

    Raises:
        UserError: a line that is not a JSON object.
    """
    if not file.is_file():
        return []
    try:
        # Not splitlines: what a model writes may hold other characters that end a line.
        lines = file.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file.name} cannot be read ({error})") from error
    rows = []
    for number, line in enumerate(lines if lines != [""] else [], 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{file.name} is torn: line {number} is not JSON") from error
        if not isinstance(row, dict):
            raise UserError(f"{file.name} is torn: line {number} is not an object")
        rows.append(row)
    return rows
