"""Costs at the points → a table with the exponents of their growth."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from experiments.benchmarks.scaling.axes import Point
from experiments.benchmarks.throughput.workload import Measured

NONE = "–"


@dataclass
class Costs:
    """What one side took at one point, turn by turn; nothing where it was not run, and why."""

    measured: list[Measured] = field(default_factory=list)
    why_not: str | None = None

    @property
    def seconds(self) -> float:
        """Of the timed steps together: the median."""
        return statistics.median(one.seconds for one in self.measured)

    @property
    def peak(self) -> float:
        """Bytes: the median."""
        return statistics.median(one.peak for one in self.measured)


@dataclass(frozen=True)
class Side:
    """Ours or the peer's.

    Attributes:
        name: as the table shows it.
        base: peak bytes of a process that has next to nothing to do.
        costs: at each point.
    """

    name: str
    base: int
    costs: list[Costs]


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float | None:
    """b of cost ∝ size^b, by least squares on the logarithms; None of fewer than two points with a cost above 0."""
    found = [(size, cost) for size, cost in zip(sizes, costs, strict=True) if cost > 0]
    if len(found) < 2:
        return None
    x, y = np.log(np.array(found)).T
    return float(np.polyfit(x, y, 1)[0])


def foreseen(sizes: Sequence[float], costs: Sequence[float], size: float) -> float:
    """The cost at a larger size: by the growth between the last two points, and at least in proportion."""
    growth = max(1.0, exponent(sizes[-2:], costs[-2:]) or 1.0)
    return float(costs[-1] * (size / sizes[-1]) ** growth)


def table(name: str, points: Sequence[Point], sides: Sequence[Side]) -> str:
    """Rows of medians, the base, and the exponents: over all points, and of the last two.

    Args:
        name: of what is varied.
        points: the rows.
        sides: ours, and the peer's where there is one.
    """
    rest = "above base and state, GB"
    head = [name, *(f"{s.name}, s a step" for s in sides), *(["faster (least–most)"] if len(sides) == 2 else [])]
    head += [f"{s.name}, peak GB" for s in sides]
    head += [*(["memory"] if len(sides) == 2 else []), "state, GB", *(f"{s.name}, {rest}" for s in sides)]
    lines = [head, ["---"] * len(head), *(row(i, point, sides) for i, point in enumerate(points))]
    base = ["libraries (base)", *blank(sides), *(gigabytes(side.base) for side in sides)]
    lines += [[*base, *[NONE] * (len(head) - len(base))]]
    lines += [exponents(f"exponent, {words}", points, sides, last) for words, last in (("all", 0), ("last two", 2))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(index: int, point: Point, sides: Sequence[Side]) -> list[str]:
    """One point."""
    costs = [side.costs[index] for side in sides]
    steps = point.workload.steps
    cells = [point.label, *(cost.why_not or f"{cost.seconds / steps:.3g}" for cost in costs)]
    both = len(costs) == 2 and all(cost.measured for cost in costs)
    if len(costs) == 2:
        cells.append(faster(*costs) if both else NONE)
    cells += [gigabytes(cost.peak) if cost.measured else NONE for cost in costs]
    if len(costs) == 2:
        cells.append(f"{costs[0].peak / costs[1].peak:.2f}" if both else NONE)
    cells.append(gigabytes(point.state))
    above = [
        cost.peak - side.base - point.state if cost.measured else None for cost, side in zip(costs, sides, strict=True)
    ]
    return cells + [NONE if one is None else gigabytes(one) for one in above]


def faster(ours: Costs, peer: Costs) -> str:
    """The ratio of times turn by turn: median, least and most."""
    ratios = [b.seconds / a.seconds for a, b in zip(ours.measured, peer.measured, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"


def exponents(label: str, points: Sequence[Point], sides: Sequence[Side], last: int) -> list[str]:
    """Of seconds, of the peak above the base, and of that above the state too; of the last so many points, 0 all."""
    seconds, peaks, rests = [], [], []
    for side in sides:
        run = [(point, cost) for point, cost in zip(points, side.costs, strict=True) if cost.measured][-last:]
        sizes = [point.size for point, _ in run]
        seconds.append(exponent(sizes, [cost.seconds / point.workload.steps for point, cost in run]))
        peaks.append(exponent(sizes, [cost.peak - side.base for _, cost in run]))
        rests.append(exponent(sizes, [cost.peak - side.base - point.state for point, cost in run]))
    states = exponent([point.size for point in points[-last:]], [point.state for point in points[-last:]])
    between = [NONE] if len(sides) == 2 else []
    return [label, *map(power, seconds), *between, *map(power, peaks), *between, power(states), *map(power, rests)]


def blank(sides: Sequence[Side]) -> list[str]:
    """The cells of times, empty."""
    return [NONE] * (3 if len(sides) == 2 else 1)


def power(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def gigabytes(count: float) -> str:
    return f"{count / 1e9:.3f}"
