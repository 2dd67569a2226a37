"""What is varied, and the workload at each point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from experiments.benchmarks.throughput.workload import SHAPES, Workload

Axis = Literal["length", "batch", "vocabulary", "size", "logits"]
AXES: tuple[Axis, ...] = get_args(Axis)
# `logits` varies batch, length and vocabulary together, their product fourfold or more from point to point.
POINTS: dict[Axis, tuple[str, ...]] = {
    "length": ("64", "128", "256", "512", "1024", "2048"),
    "batch": ("2", "4", "8", "16", "32", "64"),
    "vocabulary": ("8192", "16384", "32768", "65536", "131072"),
    "size": ("2m", "7m", "18m", "50m"),
    "logits": ("4x128x8192", "8x128x16384", "8x256x32768", "16x256x65536", "16x512x131072"),
}
NAMES: dict[Axis, str] = {
    "length": "tokens of a row",
    "batch": "rows or pairs",
    "vocabulary": "vocabulary",
    "size": "weights",
    "logits": "batch × length × vocabulary",
}
# Of the shape `narrow` the vocabulary is filled in: so small a body leaves most of the time and memory to the LM head.
NARROW = "128-352-2-2-2"
DEFAULTS: dict[Axis, dict[str, str | int]] = {
    "length": {"shape": "7m", "batch_size": 4},
    "batch": {"shape": "7m", "row_tokens": 128},
    "vocabulary": {"shape": NARROW, "batch_size": 8, "row_tokens": 128},
    "size": {"batch_size": 8, "row_tokens": 128},
    "logits": {"shape": NARROW},
}
# A model and a batch that take nothing, so that what a process needs before there is any work is seen.
NOTHING = {"shape": "16-32-1-2-2-8192", "batch_size": 1, "row_tokens": 8, "steps": 1, "warm_up": 1}


@dataclass(frozen=True)
class Point:
    """One row of the table.

    Attributes:
        label: as the table shows it.
        size: what the cost is fitted against.
        workload: what both sides do.
    """

    label: str
    size: float
    workload: Workload

    @property
    def state(self) -> int:
        """Bytes of weights, gradients and AdamW's two moments in float32; of DPO also the reference's weights."""
        return self.workload.weights * (20 if self.workload.task == "dpo" else 16)


def points(axis: Axis, texts: Sequence[str], common: Workload) -> list[Point]:
    """The axis's points, the smallest first.

    Args:
        axis: what is varied.
        texts: the values: numbers; of `size` names of shapes or six numbers as ``Workload.shape`` has them; of `logits`
            BATCHxLENGTHxVOCABULARY.
        common: everything else.

    Raises:
        ValueError: a value that is none of the axis.
    """
    return sorted((point(axis, text, common) for text in texts), key=lambda one: one.size)


def point(axis: Axis, text: str, common: Workload) -> Point:
    """One of them. Raises ValueError."""
    if axis == "size":
        known = text in SHAPES or (text.replace("-", "").isdigit() and text.count("-") == 5)
        if not known:
            raise ValueError(f"{text!r}: give one of {', '.join(SHAPES)}, or six numbers such as 128-352-2-2-2-32768")
        workload = replace(common, shape=text)
        return Point(f"{text}: {workload.weights / 1e6:.1f} M", workload.weights, workload)
    numbers = text.split("x") if axis == "logits" else [text]
    if not all(number.isdigit() and int(number) for number in numbers) or len(numbers) != (
        3 if axis == "logits" else 1
    ):
        wanted = "BATCHxLENGTHxVOCABULARY, such as 8x256x32768" if axis == "logits" else "a whole number above 0"
        raise ValueError(f"{text!r}: give {wanted}")
    values = [int(number) for number in numbers]
    match axis:
        case "length":
            workload = replace(common, row_tokens=values[0])
        case "batch":
            workload = replace(common, batch_size=values[0])
        case "vocabulary":
            workload = replace(common, shape=f"{common.shape}-{values[0]}")
        case "logits":
            batch, length, vocabulary = values
            workload = replace(common, batch_size=batch, row_tokens=length, shape=f"{common.shape}-{vocabulary}")
            return Point(text.replace("x", " × "), batch * length * vocabulary, fitting(workload))
    return Point(f"{values[0]:,}".replace(",", " "), values[0], fitting(workload))


def fitting(workload: Workload) -> Workload:
    """With a longest row that leaves none out."""
    return replace(workload, max_length=max(workload.max_length, workload.row_tokens or 0))
