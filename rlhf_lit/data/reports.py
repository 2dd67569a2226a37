"""What became of a file's rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN_ROWS = 5


@dataclass
class RowReport:
    """What became of a file's rows.

    Attributes:
        file: how messages name the file.
        total: rows looked at.
        used: rows kept.
        counts: skipped rows by reason.
        first_rows: the first few row numbers of each reason.
        unused: columns with text in them (or that may judge an answer) which had no part in any row.
        notes: lines about how the file was read.
        unused_are: what the columns of ``unused`` are called.
        moved: rows whose prompt's own tokens are not a prefix of the row's.
        unsupervised: answers that should have been supervised and are not.
        first_bad: number of the first row that is not used though it should be, and why; a tie is none.
    """

    file: str
    total: int = 0
    used: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    first_rows: dict[str, list[int]] = field(default_factory=dict)
    unused: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    unused_are: str = "columns that were not used"
    moved: int = 0
    unsupervised: int = 0
    first_bad: tuple[int, str] | None = None

    def skip(self, reason: str, row: int) -> None:
        """Count a row that is not used."""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        shown = self.first_rows.setdefault(reason, [])
        if len(shown) < SHOWN_ROWS:
            shown.append(row)

    def drop(self, reason: str, row: int) -> None:
        """Count a row that had been kept, and falls out later (too long, no supervised token)."""
        self.used -= 1
        self.skip(reason, row)

    def as_json(self) -> dict[str, Any]:
        """What :meth:`from_json` makes the report of."""
        return {**asdict(self), "unused": sorted(self.unused)}

    @classmethod
    def from_json(cls, values: dict[str, Any], file: str) -> RowReport:
        """The report that :meth:`as_json` gave, of a file that may have another name now."""
        first_bad = values["first_bad"]
        return cls(
            **{
                **values,
                "file": file,
                "unused": set(values["unused"]),
                "first_bad": None if first_bad is None else (first_bad[0], first_bad[1]),
            }
        )

    def summary(self) -> str:
        """One line, such as ``test.jsonl.gz: 2303 of 2312 rows used; skipped 4 empty chosen (rows 86, 516, …)``."""
        line = f"{self.file}: {self.used} of {self.total} rows used"
        reasons = []
        for reason, count in self.counts.items():
            shown = self.first_rows[reason]
            numbers = ", ".join(map(str, shown)) + (", …" if count > len(shown) else "")
            reasons.append(f"{count} {reason} ({'row' if count == 1 else 'rows'} {numbers})")
        return line + (f"; skipped {', '.join(reasons)}" if reasons else "")

    def remarks(self) -> list[str]:
        """Further lines, once a file: how it was read, and ``rows.jsonl: columns that were not used: context``."""
        lines = [f"{self.file}: {note}" for note in self.notes]
        if self.unused:
            lines.append(f"{self.file}: {self.unused_are}: {', '.join(sorted(self.unused))}")
        if self.moved:
            lines.append(
                f"{self.file}: in {self.moved} rows the prompt's own tokens are not a prefix of the row's; the "
                "response starts at the common prefix"
            )
        if self.unsupervised:
            lines.append(
                f"{self.file}: answers not supervised: {self.unsupervised}, since the chat template writes them "
                "otherwise once others follow"
            )
        return lines
