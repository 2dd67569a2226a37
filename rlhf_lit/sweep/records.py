"""A sweep's folder: what is written there, and how it is read again.

Every file is replaced as a whole, so that a kill leaves the old one or the new one.
"""

from __future__ import annotations

import csv
import fcntl
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from rlhf_lit.errors import UserError
from rlhf_lit.files import replace_file
from rlhf_lit.runs import has_checkpoint, newest_checkpoint, versions

SWEEP, CALL, RECORD, RESOLVED, LOG, LOCK = "sweep.yaml", "sweep.json", "arm.json", "config.json", "log.txt", ".lock"
LONGEST_NAME = 100  # characters of an arm's name

Status = Literal["waiting", "running", "finished", "failed", "interrupted"]


@dataclass(frozen=True)
class Call:
    """How a sweep was asked for, beside its file.

    Attributes:
        method: grid or random.
        seed: of a random search.
        count: how many arms there are to be (None: all of the grid).
        metric: the file's, or None.
    """

    method: str
    seed: int
    count: int | None
    metric: str | None


@dataclass
class Arm:
    """One arm of a sweep: the contents of its ``arm.json``.

    Attributes:
        name: its folder's, within the sweep's.
        parameters: what the sweep has set, by dotted key, in the order of the command line.
        arguments: the same as wandb's agent writes them on a command line.
        status: waiting, running (or killed while it was: the sweep's lock tells), finished, failed or interrupted.
        run: its run folder, within its own folder; None before there is one.
        started, ended: of the last attempt, as ISO 8601 with the time zone.
        seconds: of all attempts.
        attempts: how often it was started.
        exit_status: of the last attempt; −n where signal n ended it.
        error: the line the last attempt failed with.
        metric: last value of the sweep's metric, or None.
        process: the id of the running process.
    """

    name: str
    parameters: dict[str, Any]
    arguments: list[str]
    status: Status = "waiting"
    run: str | None = None
    started: str | None = None
    ended: str | None = None
    seconds: float = 0.0
    attempts: int = 0
    exit_status: int | None = None
    error: str | None = None
    metric: float | None = None
    process: int | None = None


class Folder:
    """The folder of one sweep.

    Args:
        path: it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def exists(self) -> bool:
        """Whether there is a sweep in it, begun or done."""
        return (self.path / CALL).is_file()

    def of(self, arm: Arm) -> Path:
        """An arm's own folder."""
        return self.path / arm.name

    @contextmanager
    def lock(self) -> Iterator[int]:
        """A descriptor of the lock, which this process and the arms it starts hold until all of them have ended.

        Raises:
            UserError: somebody holds it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(f"{self.path}: cannot keep a sweep here: {error.strerror}") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            running = [str(arm.process) for arm in read_arms(self.path) if arm.status == "running"]
            raise UserError(
                f"{self.path}: this sweep is at work (processes {', '.join(running) or '?'}): wait for it, or end it"
            ) from error
        try:
            yield descriptor
        finally:
            os.close(descriptor)

    def begin(self, text: str, call: Call) -> None:
        """The records of the sweep itself; a resumed one's replace them."""
        _write(self.path / SWEEP, text)
        _write(self.path / CALL, json.dumps(asdict(call), indent=2) + "\n")

    def call(self) -> Call:
        """How the sweep was asked for."""
        return Call(**json.loads((self.path / CALL).read_text(encoding="utf-8")))

    def save(self, arm: Arm) -> None:
        """An arm's record, as it now is."""
        self.of(arm).mkdir(exist_ok=True)
        _write(self.of(arm) / RECORD, json.dumps(asdict(arm), indent=2, ensure_ascii=False) + "\n")

    def save_resolved(self, arm: Arm, config: Mapping[str, Any]) -> None:
        """What an arm's command resolves to."""
        self.of(arm).mkdir(exist_ok=True)
        _write(self.of(arm) / RESOLVED, json.dumps(config, indent=1, ensure_ascii=False) + "\n")

    def resolved(self, arm: Arm) -> dict[str, Any]:
        """What it resolved to when it was added to the sweep."""
        found: dict[str, Any] = json.loads((self.of(arm) / RESOLVED).read_text(encoding="utf-8"))
        found.pop("config", None)  # of an earlier version: the places of its configs
        return found

    def run_of(self, arm: Arm) -> Path | None:
        """The run folder that counts: the newest that has a checkpoint, else the newest."""
        found = list(versions(self.of(arm)))
        return next((run for run in found if newest_checkpoint(run)), found[0] if found else None)

    def has_checkpoint(self, arm: Arm) -> bool:
        """Whether `--ckpt_path=last` will find one."""
        return has_checkpoint(self.of(arm))


def read_arms(path: Path) -> list[Arm]:
    """The arms of a sweep's folder, in order.

    Raises:
        UserError: a record that is not what this version writes.
    """
    arms = []
    for file in sorted(path.glob(f"*/{RECORD}"), key=lambda file: number_of(file.parent.name)):
        try:
            arms.append(Arm(**json.loads(file.read_text(encoding="utf-8"))))
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}: not the record of an arm ({error})") from error
    return arms


def last_value(run: Path, metric: str) -> float | None:
    """The last value of a metric in a run's ``metrics.csv``; None where there is none."""
    try:
        with (run / "metrics.csv").open(newline="", encoding="utf-8") as file:
            values = [row[metric] for row in csv.DictReader(file) if row.get(metric)]
        return float(values[-1]) if values else None
    except (OSError, ValueError):
        return None


def arm_name(number: int, parameters: Mapping[str, Any], varied: set[str]) -> str:
    """A name for people and for folders: 003-beta=0.1-seed=2.

    Args:
        number: of the arm.
        parameters: its own.
        varied: those in which arms differ; the others say nothing.
    """
    short = short_keys(sorted(varied))
    parts = [f"{short[key]}={label(value)}" for key, value in parameters.items() if key in varied]
    text = re.sub(r"[^A-Za-z0-9.+=-]+", "_", "-".join([f"{number:03d}", *parts]))
    return text[:LONGEST_NAME].rstrip("_-=.")


def number_of(name: str) -> int:
    """An arm's number, which its name begins with."""
    number = name.split("-")[0]
    return int(number) if number.isdecimal() else -1


def short_keys(keys: list[str]) -> dict[str, str]:
    """The last part of each key where that tells it from the others; seed for seed_everything."""
    last = [key.rsplit(".", 1)[-1] for key in keys]
    names = {key: part if last.count(part) == 1 else key for key, part in zip(keys, last, strict=True)}
    return {key: "seed" if name == "seed_everything" else name for key, name in names.items()}


def label(value: Any) -> str:
    """A parameter's value in few characters: a number in four digits, a class by its name, with its arguments
    where they are given."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = yaml.safe_load(value)
        except yaml.YAMLError:
            return str(value)
    if isinstance(value, dict) and "class_path" in value:
        arguments = [f"{name}={label(inner)}" for name, inner in value.get("init_args", {}).items()]
        return "+".join([str(value["class_path"]).rsplit(".", 1)[-1], *arguments])
    if isinstance(value, str) and re.fullmatch(r"\w+(\.\w+)*\.[A-Z]\w*", value):
        return value.rsplit(".", 1)[-1]
    return str(value)


def _write(path: Path, text: str) -> None:
    replace_file(path, lambda file: file.write(text))
