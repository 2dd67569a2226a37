"""A run's ``metrics.csv``, by column."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rlhf_lit.errors import UserError
from rlhf_lit.evaluation.estimates import Array


@dataclass(frozen=True)
class Series:
    """A metric as it was logged.

    Attributes:
        steps: optimizer steps.
        values: as many.
    """

    steps: Array
    values: Array


def read_metrics(file: Path) -> dict[str, Series]:
    """Every column that has a number, in the file's order; `step` and `epoch` are no metrics.

    Raises:
        UserError: no such file, no rows, or a row that was cut short or is not made of numbers.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError("it has no metrics.csv") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"metrics.csv cannot be read ({error})") from error
    header, *rows = csv.reader(text.splitlines()) if text.strip() else [[]]
    if not rows or "step" not in header:
        raise UserError("metrics.csv has no rows")
    if not text.endswith("\n"):
        raise UserError(f"metrics.csv is torn: row {len(rows)} does not end")
    found: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in header}
    for number, row in enumerate(rows, 1):
        if len(row) != len(header):
            raise UserError(f"metrics.csv is torn: row {number} has {len(row)} of {len(header)} cells")
        cells = dict(zip(header, row, strict=True))
        try:
            step = int(cells["step"])
            for name, cell in cells.items():
                if cell and name not in ("step", "epoch"):
                    found[name][0].append(step)
                    found[name][1].append(float(cell))
        except ValueError as error:
            raise UserError(f"metrics.csv is torn: row {number}: {error}") from error
    return {
        name: Series(np.array(steps, dtype=float), np.array(values)) for name, (steps, values) in found.items() if steps
    }
