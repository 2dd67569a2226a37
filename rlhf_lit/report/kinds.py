"""The kind of a run's algorithm, by its class, or by the run's files where the class cannot be imported."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from rlhf_lit.algorithms.offline import OfflineAlgorithm
from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.algorithms.policy import Writer
from rlhf_lit.runs import EXPORT


@dataclass(frozen=True)
class Kind:
    """An algorithm, as far as a report asks what it is.

    Attributes:
        writes: it trains a policy, which writes responses; else a reward model.
        on_policy: it learns from its own rollouts.
        has_reference: it compares its policy with the model that it began from.
    """

    writes: bool
    on_policy: bool
    has_reference: bool


def kind_of_run(class_path: str, folder: Path, model: Container[str], metrics: Container[str]) -> Kind:
    """The kind of a run's algorithm.

    Args:
        class_path: of the algorithm, as the run's configuration names it.
        folder: the run's.
        model: names of the algorithm's arguments.
        metrics: names of what the run logged.
    """
    algorithm = imported(class_path)
    if algorithm is not None:
        on_policy = issubclass(algorithm, OnPolicy)
        return Kind(issubclass(algorithm, Writer), on_policy, on_policy or issubclass(algorithm, OfflineAlgorithm))
    on_policy = "objective/scores" in metrics
    writes = not (folder / EXPORT / "reward.json").is_file()  # which comes with every reward model
    return Kind(writes, on_policy, on_policy or "reference" in model)


@cache
def imported(class_path: str) -> type[Any] | None:
    """A class by its path; None where there is none."""
    module, _, name = class_path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except Exception:  # a user's file may be gone, or raise whatever it likes
        return None
    return found if isinstance(found, type) else None
