"""Keys and class paths of earlier versions, each with its successor; docs/migration.md lists the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_lit.errors import UserError

KEYS = {
    "model.policy_loss.clip": "model.policy_loss.clip_low (clip_high is as low where it is null)",
    "model.gamma": "model.advantages.gamma",
    "model.lam": "model.advantages.lam",
    "model.whiten_advantages": "model.advantages.whiten",
    "model.scale_advantages": "model.advantages.scale (group for true, none for false)",
    "model.share_prompts": "nothing: models share prompts by themselves",
    "data.world": "data.train.world, and likewise of each other source whose path is playground",
}
"""Key → what takes its place. Under a model or a data module of this package; a class of yours may have such a key."""

OPTIONS = {"world": "prompts.world"}
"""Option of another command (evaluate) → what takes its place."""

PATHS = {
    "rlhf_lit.tracking.LiveProgress": "rlhf_lit.trainer.progress.LiveProgress",
    "rlhf_lit.tracking.PlainProgress": "rlhf_lit.trainer.progress.PlainProgress",
    "rlhf_lit.tracking.": "rlhf_lit.trainer.loggers.",
    "rlhf_lit.recording.": "rlhf_lit.trainer.callbacks.",
    "rlhf_lit.ranks.preemption.": "rlhf_lit.trainer.preemption.",
    "rlhf_lit.ranks.callback.": "rlhf_lit.trainer.ranks.",
    "rlhf_lit.timing.": "rlhf_lit.trainer.timing.",
    "rlhf_lit.checkpoint_io.": "rlhf_lit.training.checkpoint.",
    "rlhf_lit.strategies.FSDP1": "rlhf_lit.trainer.strategies.FSDP2",
    "rlhf_lit.strategies.": "rlhf_lit.trainer.strategies.",
    "rlhf_lit.data.playground.": "rlhf_lit.playground.",
    "rlhf_lit.data.batching.RolloutLoader": "rlhf_lit.rollout.loop.RolloutLoader",
    "rlhf_lit.data.batching.": "rlhf_lit.data.loader.",
    "rlhf_lit.models.states.": "rlhf_lit.models.packing.",
    "rlhf_lit.algorithms.base.": "rlhf_lit.algorithms.algorithm.",
    "rlhf_lit.rollout.verifiable.PatternReward": "rlhf_lit.rollout.verifiable.RegexReward",
    "PatternReward": "RegexReward",
}
"""Where an import path began, and where it begins now."""


def successor(key: str) -> str | None:
    """What takes the place of a key that is not known (any more); None where it never was one."""
    for old, new in KEYS.items():
        if f".{old}." in f".{key}.":
            return new
    return OPTIONS.get(key.split(".")[0])


def require_present_names(documents: list[tuple[str, dict[str, Any]]]) -> None:
    """Refuse keys and class paths of earlier versions, all of a file's in one line.

    Args:
        documents: (name, content) of configuration files and of options of the command line.

    Raises:
        UserError: a document holds some; says what takes their place.
    """
    for name, document in documents:
        if found := [*_keys(document), *_paths(document)]:
            changes = "; ".join(f"{old} is now {new}" for old, new in dict(found).items())
            raise UserError(f"{name} is of an earlier version: {changes} (docs/migration.md)")


def _keys(document: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys of a model or a data module that the document names, and that is of this package."""
    for key, new in KEYS.items():
        room, *path, last = key.split(".")
        holder: Any = document.get(room)
        if not isinstance(holder, Mapping) or not _is_ours(holder.get("class_path")):
            continue
        for part in path:
            holder = _fields(holder).get(part)
        if isinstance(holder, Mapping) and last in _fields(holder):
            yield key, new


def _is_ours(class_path: object) -> bool:
    return isinstance(class_path, str) and ("." not in class_path or class_path.startswith("rlhf_lit."))


def _fields(value: Any) -> Mapping[str, Any]:
    inner = value.get("init_args", value) if isinstance(value, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _paths(value: Any) -> Iterator[tuple[str, str]]:
    """Strings that are import paths of earlier versions, wherever they stand."""
    if isinstance(value, Mapping):
        for inner in value.values():
            yield from _paths(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _paths(inner)
    elif isinstance(value, str) and (moved := next((old for old in PATHS if value.startswith(old)), None)):
        yield value, PATHS[moved] + value.removeprefix(moved)
