"""Whether all ranks carry out the same run: configuration, rows and packages, compared before the first step."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import Any

PACKAGES = ("rlhf_lit", "torch", "lightning", "transformers")
OWN = ("data.cache", "data.workers", "model.reference.cache", "runs", "config")
"""Keys that may differ from machine to machine: where things lie, and how many processes tokenise. Only rank zero's
``runs`` is written to."""

Facts = dict[str, str]


def facts_of(config: Mapping[str, Any], rows: Mapping[str, str]) -> Facts:
    """What a rank is about to do, as names and values that must be equal everywhere.

    Args:
        config: of the command, resolved, as plain values.
        rows: what identifies the rows of each split.
    """
    facts = {f"the version of {name}": version(name) for name in PACKAGES}
    facts |= {key: value for key, value in _flat(config, ()) if key not in OWN}
    return facts | {f"the data of {split}": identity for split, identity in rows.items()}


def _flat(value: Any, path: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, path if key == "init_args" else (*path, str(key)))
    else:
        yield ".".join(path), json.dumps(value, default=str)


def difference(ranks: Sequence[Facts]) -> str | None:
    """The first difference between rank zero and another rank, in one line; None where there is none."""
    first = ranks[0]
    for name in dict.fromkeys(name for facts in ranks for name in facts):
        for rank, facts in enumerate(ranks):
            if facts.get(name) != first.get(name):
                others = sum(facts != first for facts in ranks)
                return (
                    f"rank {rank} is not set up as rank 0 is: {name} is {_shown(facts, name)} there and "
                    f"{_shown(first, name)} on rank 0 ({others} of {len(ranks)} ranks differ from rank 0)"
                )
    return None


def _shown(facts: Facts, name: str) -> str:
    return facts.get(name, "not there")
