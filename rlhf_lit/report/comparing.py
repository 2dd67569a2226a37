"""Which runs are seeds of one arm, and in what the arms differ.

An arm is a configuration without its seed, its name and folders, and without what only says how a machine carries it
out (docs/configuration.md, "What defines an experiment"). What this file does not know counts as part of the
experiment: two runs are rather shown apart, with the key that tells them apart, than averaged.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_lit.errors import UserError
from rlhf_lit.report.kinds import Kind
from rlhf_lit.report.reading import LeftOut, Run
from rlhf_lit.sweep.records import label, short_keys

PLACE = ("seed_everything", "name", "runs", "preflight", "checkpoint", "debug", "weights_only")
MACHINE = (
    "trainer.accelerator",
    "trainer.strategy",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.logger",
    "trainer.fast_dev_run",
    "trainer.num_sanity_val_steps",
    "trainer.log_every_n_steps",
    "trainer.enable_checkpointing",
    "trainer.enable_progress_bar",
    "trainer.enable_model_summary",
    "trainer.deterministic",
    "trainer.benchmark",
    "trainer.inference_mode",
    "trainer.use_distributed_sampler",
    "trainer.profiler",
    "trainer.detect_anomaly",
    "trainer.barebones",
    "trainer.plugins",
    "trainer.sync_batchnorm",
    "trainer.default_root_dir",
    "trainer.enable_autolog_hparams",
    "trainer.model_registry",
    "model.base.attention",
    "model.base.gradient_checkpointing",
    "model.base.compile",
    "model.sampling.rows_at_once",
    "model.share_prompts",  # of runs from when it was a setting
    "model.reference.precompute",
    "model.reference.complete",
    "model.reference.cache",
    "data.micro_batch_tokens",
    "data.workers",
    "data.cache",
)
ABSENT = "–"
LONGEST_LABEL = 48


@dataclass(frozen=True)
class Arm:
    """One configuration and its seeds.

    Attributes:
        label: what tells it from the other arms, in few words.
        settings: the experiment, by dotted key.
        varied: those settings in which it differs from another arm of its algorithm.
        runs: one a seed, by seed.
    """

    label: str
    settings: dict[str, Any]
    varied: dict[str, Any]
    runs: tuple[Run, ...]

    @property
    def algorithm(self) -> str:
        """The class's name."""
        return self.runs[0].algorithm

    @property
    def kind(self) -> Kind:
        """What the algorithm is."""
        return self.runs[0].kind

    @property
    def seeds(self) -> int:
        """How many."""
        return len(self.runs)

    def values(self, metric: str) -> list[float | None]:
        """The last value of each run."""
        return [run.last(metric) for run in self.runs]


@dataclass(frozen=True)
class Swept:
    """A number in which the arms of one algorithm differ, and in nothing else.

    Attributes:
        key: dotted.
        short: its last part, or as much as tells it from others.
        arms: in the order of the values.
        values: of the arms.
    """

    key: str
    short: str
    arms: tuple[Arm, ...]
    values: tuple[float, ...]


def flat(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key with its value, as one types it: without init_args, a class under its own key."""
    if not isinstance(config, dict) or not config:
        yield path, config
        return
    for name, value in config.items():
        inner = path if name in ("init_args", "class_path") else f"{path}.{name}".lstrip(".")
        yield from flat(value, inner)


def settings(config: dict[str, Any], ignore: Sequence[str] = ()) -> dict[str, Any]:
    """What defines the experiment, the seed left out.

    Args:
        config: resolved.
        ignore: further keys that do not define an arm here; of a key with fields, all of them.
    """
    without = (*PLACE, *MACHINE, *ignore)
    return {
        key: value
        for key, value in flat(config)
        if not any(key == other or key.startswith(f"{other}.") for other in without)
    }


def arms_of(runs: Sequence[Run], ignore: Sequence[str] = ()) -> tuple[list[Arm], list[LeftOut]]:
    """Group runs into arms; a run that repeats another's seed is left out, since it would count as a second one.

    Args:
        runs: finished.
        ignore: see ``settings``.

    Raises:
        UserError: a key to ignore that no run has.
    """
    groups: dict[str, list[Run]] = {}
    known: dict[str, dict[str, Any]] = {}
    keys = {key for run in runs for key, _ in flat(run.config)}
    for key in ignore:
        if not any(other == key or other.startswith(f"{key}.") for other in keys):
            raise UserError(f"--ignore {key}: no run has such a key")
    left = []
    for run in runs:
        found = settings(run.config, ignore)
        identity = json.dumps(found, sort_keys=True, default=str)
        known.setdefault(identity, found)
        group = groups.setdefault(identity, [])
        twin = next((other for other in group if other.seed == run.seed is not None), None)
        if twin is None:
            group.append(run)
        else:
            left.append(
                LeftOut(run.name, f"the same configuration and seed as {twin.name}: a repetition is no second seed")
            )
    return _labelled(groups, known), left


def _labelled(groups: dict[str, list[Run]], known: dict[str, dict[str, Any]]) -> list[Arm]:
    algorithms = list(dict.fromkeys(group[0].algorithm for group in groups.values()))
    arms: list[Arm] = []
    for algorithm in algorithms:
        own = [identity for identity, group in groups.items() if group[0].algorithm == algorithm]
        varied = differing([known[identity] for identity in own])
        labels = _labels([known[identity] for identity in own], varied, algorithm if len(algorithms) > 1 else "")
        for number, (identity, text) in enumerate(zip(own, labels, strict=True), 1):
            mine = {key: known[identity].get(key) for key in varied}
            if not text or len(text) > LONGEST_LABEL:
                text = f"{algorithm} {number}" if text else algorithm
            by_seed = sorted(groups[identity], key=lambda run: (run.seed is None, run.seed or 0))
            arms.append(Arm(text, known[identity], mine, tuple(by_seed)))
    return sorted(arms, key=lambda arm: (algorithms.index(arm.algorithm), _order(arm)))


def _labels(arms: Sequence[dict[str, Any]], varied: Sequence[str], prefix: str) -> list[str]:
    """What is written for each arm of an algorithm. An argument that comes with a class, and is the same in all arms
    that have it, says no more than the class does."""
    telling = [key for key in varied if len({repr(arm[key]) for arm in arms if key in arm}) > 1]
    for keys in (telling, varied):
        short = short_keys(list(keys))
        words = [[f"{short[key]}={label(arm[key])}" for key in keys if key in arm] for arm in arms]
        found = [" ".join([*([prefix] if prefix else []), *own]) for own in words]
        if len(set(found)) == len(found):
            break
    return found


def _order(arm: Arm) -> list[tuple[bool, float, str]]:
    """Numbers by their size, then texts."""
    return [(False, float(value), "") if is_number(value) else (True, 0.0, str(value)) for value in arm.varied.values()]


def is_number(value: Any) -> bool:
    """A number, and no truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def differing(settings: Sequence[dict[str, Any]]) -> list[str]:
    """Keys that one has and another has not, or has otherwise; in order of appearance."""
    missing = object()
    keys = dict.fromkeys(key for one in settings for key in one)
    return [key for key in keys if any(one.get(key, missing) != settings[0].get(key, missing) for one in settings)]


def swept(arms: Sequence[Arm]) -> list[Swept]:
    """For each algorithm whose arms differ in one number alone: which, and how."""
    found = []
    for algorithm in dict.fromkeys(arm.algorithm for arm in arms):
        own = [arm for arm in arms if arm.algorithm == algorithm]
        keys = list(own[0].varied)
        if len(own) > 1 and len(keys) == 1 and all(is_number(arm.varied[keys[0]]) for arm in own):
            values = tuple(float(arm.varied[keys[0]]) for arm in own)
            found.append(Swept(keys[0], short_keys(keys)[keys[0]], tuple(own), values))
    return found
