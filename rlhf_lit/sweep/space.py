"""The values of a sweep's parameters: the points of a grid, or draws, from the distributions that W&B defines.

A draw is the inverse of the distribution's cumulative function at a uniform number that is a function of (seed, arm,
parameter): another parameter, or another arm, changes no other value.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats

from rlhf_lit.errors import UserError

GRID = ("constant", "categorical", "int_uniform", "q_uniform")
"""Distributions that have points to make a grid of."""

_BOUNDS = {"min": None, "max": None}
_NORMAL = {"mu": 0.0, "sigma": 1.0}
_BETA = {"a": 1.0, "b": 1.0}
_STEP = {"q": 1.0}
# Distribution → its settings and their defaults (None: required).
SETTINGS: dict[str, dict[str, Any]] = {
    "constant": {"value": None},
    "categorical": {"values": None},
    "categorical_w_probabilities": {"values": None, "probabilities": None},
    "int_uniform": _BOUNDS,
    "uniform": _BOUNDS,
    "q_uniform": _BOUNDS | _STEP,
    "log_uniform": _BOUNDS,
    "log_uniform_values": _BOUNDS,
    "q_log_uniform": _BOUNDS | _STEP,
    "q_log_uniform_values": _BOUNDS | _STEP,
    "inv_log_uniform": _BOUNDS,
    "inv_log_uniform_values": _BOUNDS,
    "normal": _NORMAL,
    "q_normal": _NORMAL | _STEP,
    "log_normal": _NORMAL,
    "q_log_normal": _NORMAL | _STEP,
    "beta": _BETA,
    "q_beta": _BETA | _STEP,
}

Inverse = Callable[[float, Mapping[str, Any]], float]


def _uniform(u: float, low: float, high: float) -> float:
    return low + u * (high - low)


# Without the rounding of the q_ kinds. log_uniform's bounds are exponents of e, as W&B has them.
_INVERSE: dict[str, Inverse] = {
    "uniform": lambda u, s: _uniform(u, s["min"], s["max"]),
    "log_uniform": lambda u, s: math.exp(_uniform(u, s["min"], s["max"])),
    "log_uniform_values": lambda u, s: math.exp(_uniform(u, math.log(s["min"]), math.log(s["max"]))),
    "inv_log_uniform": lambda u, s: math.exp(-_uniform(1 - u, s["min"], s["max"])),
    "inv_log_uniform_values": lambda u, s: math.exp(-_uniform(1 - u, -math.log(s["max"]), -math.log(s["min"]))),
    "normal": lambda u, s: float(stats.norm.ppf(u, s["mu"], s["sigma"])),
    "log_normal": lambda u, s: math.exp(stats.norm.ppf(u, s["mu"], s["sigma"])),
    "beta": lambda u, s: float(stats.beta.ppf(u, s["a"], s["b"])),
}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a sweep.

    Attributes:
        name: a dotted key of the command line.
        distribution: one of ``SETTINGS``.
        settings: all of the distribution's, its defaults filled in.
    """

    name: str
    distribution: str
    settings: Mapping[str, Any]

    @property
    def varies(self) -> bool:
        """Whether arms can differ in it."""
        return self.distribution != "constant" and len(self.settings.get("values", "any")) > 1

    def points(self) -> list[Any]:
        """The values that a grid takes, each once; q_uniform stops short of its max, as W&B's does."""
        s = self.settings
        match self.distribution:
            case "constant":
                return [s["value"]]
            case "categorical":
                return _each_once(s["values"])
            case "int_uniform":
                return list(range(s["min"], s["max"] + 1))
            case "q_uniform":
                return [_plain(value, s["q"]) for value in np.arange(s["min"], s["max"], s["q"])]
        raise AssertionError(self.distribution)

    def draw(self, u: float) -> Any:
        """The value at ``u`` in (0, 1) of the cumulative distribution."""
        s = self.settings
        match self.distribution:
            case "constant":
                return s["value"]
            case "categorical":
                return s["values"][int(u * len(s["values"]))]
            case "categorical_w_probabilities":
                return s["values"][min(_rank(u, s["probabilities"]), len(s["values"]) - 1)]
            case "int_uniform":
                return s["min"] + int(u * (s["max"] - s["min"] + 1))
        value = _INVERSE[self.distribution.removeprefix("q_")](u, s)
        if self.distribution.startswith("q_"):
            return _plain(float(np.round(value / s["q"])) * s["q"], s["q"])
        return value


def _each_once(values: list[Any]) -> list[Any]:
    """1 and 1.0 are one value to W&B, 1 and true are two."""
    seen: dict[tuple[bool, str], Any] = {}
    for value in values:
        whole = isinstance(value, float) and value.is_integer()
        seen.setdefault((isinstance(value, bool), repr(int(value) if whole else value)), value)
    return list(seen.values())


def _rank(u: float, probabilities: list[float]) -> int:
    return int(np.searchsorted(np.cumsum(probabilities), u, side="right"))


def _plain(value: float, q: float) -> float | int:
    """A multiple of q, whole where q is, without the digits that binary fractions leave (0.30000000000000004)."""
    return int(value) if isinstance(q, int) else float(f"{value:.12g}")


def grid(parameters: list[Parameter]) -> list[dict[str, Any]]:
    """All combinations, the last parameter's values following each other first, as W&B goes through them."""
    names = [parameter.name for parameter in parameters]
    return [dict(zip(names, point, strict=True)) for point in itertools.product(*(p.points() for p in parameters))]


def draws(parameters: list[Parameter], seed: int, count: int) -> list[dict[str, Any]]:
    """The first ``count`` arms of a random search: more of them leave these as they are."""
    return [{p.name: p.draw(uniform_number(seed, arm, p.name)) for p in parameters} for arm in range(count)]


def uniform_number(seed: int, arm: int, name: str) -> float:
    """In (0, 1), from all three alone."""
    key = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    bits = int(np.random.SeedSequence((seed, arm, key)).generate_state(1, np.uint64)[0]) >> 12
    return (bits + 0.5) / 2**52  # with one bit more the largest would round to 1


def read_parameter(name: str, given: Any, where: str) -> Parameter:
    """One entry of ``parameters``.

    Args:
        name: its key.
        given: what stands there.
        where: the file, for messages.

    Raises:
        UserError: it is none of W&B's distributions, or has values that no command line can carry.
    """
    key = f"{where}: parameters.{name}"
    if not isinstance(given, dict):
        raise UserError(f"{key}: expected `value:`, `values:` or `min:` and `max:` below it, found {given!r}")
    if "parameters" in given:
        raise UserError(f"{key}: nested parameters reach no command line; write flat dotted keys such as {name}.beta")
    kind = str(given.get("distribution") or _guess(given))
    if kind not in SETTINGS:
        raise UserError(f"{key}: no distribution {kind!r}; there are {', '.join(SETTINGS)}")
    known = SETTINGS[kind]
    if unknown := given.keys() - known.keys() - {"distribution"}:
        raise UserError(f"{key}: {kind} has no {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    settings = {setting: given.get(setting, default) for setting, default in known.items()}
    if "value" in known and "value" not in given:
        raise UserError(f"{key}: {kind} needs value")
    for setting, value in settings.items():
        if setting == "value":
            _check_value(value, key)
        elif value is None:
            raise UserError(f"{key}: {kind} needs {setting}")
        elif setting in ("values", "probabilities"):
            _check_list(setting, value, key)
        elif isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UserError(f"{key}: {setting} must be a number, not {value!r}{_exponent(value)}")
    _check_sense(kind, settings, key)
    return Parameter(name, kind, settings)


def _guess(given: dict[str, Any]) -> str:
    """W&B's: by what is given."""
    if "value" in given:
        return "constant"
    if "values" in given:
        return "categorical_w_probabilities" if "probabilities" in given else "categorical"
    whole = all(isinstance(given.get(bound), int) for bound in ("min", "max"))
    return "int_uniform" if whole else "uniform"


def _check_list(setting: str, values: Any, key: str) -> None:
    if not isinstance(values, list) or not values:
        raise UserError(f"{key}: {setting} must be a list with something in it, not {values!r}")
    if setting == "values":
        for value in values:
            _check_value(value, key)
    elif not all(isinstance(p, int | float) and p >= 0 for p in values) or not math.isclose(sum(values), 1):
        raise UserError(f"{key}: probabilities must be at least 0 and sum to 1, not {values}")


def _check_value(value: Any, key: str) -> None:
    if _holds_null(value):
        raise UserError(f"{key}: null reaches a run as the text None; write it in quotes, 'null'")


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_null, value.values()))
    return value is None or (isinstance(value, list) and any(map(_holds_null, value)))


def _exponent(value: Any) -> str:
    """What YAML 1.1 makes of a number without a point."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+e[+-]?\d+", value, re.IGNORECASE)
    return ": to YAML that is a text, write it with a point (1.0e-05)" if is_number else ""


def _check_sense(kind: str, s: Mapping[str, Any], key: str) -> None:
    if "min" in s and s["min"] >= s["max"] and not (kind == "int_uniform" and s["min"] == s["max"]):
        raise UserError(f"{key}: min must be below max, not {s['min']} and {s['max']}")
    if kind == "int_uniform" and not all(isinstance(s[bound], int) for bound in ("min", "max")):
        raise UserError(f"{key}: int_uniform needs whole numbers as min and max, not {s['min']} and {s['max']}")
    for setting in ("q", "a", "b", *(["min"] if kind.endswith("_values") else [])):
        if setting in s and s[setting] <= 0:
            raise UserError(f"{key}: {setting} must be greater than 0, not {s[setting]}")
    if s.get("sigma", 0) < 0:
        raise UserError(f"{key}: sigma must be at least 0, not {s['sigma']}")
    if "probabilities" in s and len(s["probabilities"]) != len(s["values"]):
        raise UserError(f"{key}: {len(s['values'])} values, but {len(s['probabilities'])} probabilities")
