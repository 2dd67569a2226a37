"""``score``: a reward model's score of every answer in a file."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences
from rlhf_lit.commands.training import Parser, quiet_libraries
from rlhf_lit.data.answered import Answered, Kind, Unusable, answered
from rlhf_lit.data.chat import ChatFormat, Encoded
from rlhf_lit.data.formats import without_compression
from rlhf_lit.data.reports import RowReport
from rlhf_lit.data.sources import ColumnName, Source, read_rows
from rlhf_lit.data.truncation import Truncation, truncate_group
from rlhf_lit.errors import UserError, hand_over, say, tell
from rlhf_lit.files import atomic
from rlhf_lit.models.anatomy import context_length
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_scorer, load_tokenizer
from rlhf_lit.models.quantization import Dtype, Quantization
from rlhf_lit.rollout.rewards import score_sequences

WINDOW = 1024  # rows that are sorted by length together
NAMES: dict[Kind, tuple[str, ...]] = {
    "single": ("score",),
    "pair": ("score_chosen", "score_rejected"),
    "list": ("scores",),
}
"""What a line calls its scores."""

Row = Answered | Unusable


@dataclass(frozen=True)
class Scored:
    """The scores of a row's answers, and how long each is in tokens."""

    scores: list[float]
    lengths: list[int]


@dataclass(frozen=True)
class Summary:
    """What the scores of a file come to.

    Attributes:
        rows: how many rows were scored, of how many, and why not the others, in words.
        mean, std: of all scores (population).
        pairs: answers of one prompt of which one is better, by the file.
        accuracy: share of these whose better answer scores higher, strictly; None without pairs.
        length_correlation: Pearson's, of score and length in tokens; None where one of them never varies.
    """

    rows: str
    mean: float
    std: float
    pairs: int
    accuracy: float | None
    length_correlation: float | None

    @classmethod
    def of(cls, report: RowReport, rows: Sequence[Row], scored: Sequence[Scored | Unusable]) -> Summary:
        """Of the rows that were scored.

        Raises:
            UserError: none was.
        """
        whole = [(row, found) for row, found in zip(rows, scored, strict=True) if isinstance(found, Scored)]
        if not whole:
            raise UserError(f"no row was scored: {report.summary()}")
        scores = torch.tensor([score for _, found in whole for score in found.scores], dtype=torch.float64)
        lengths = torch.tensor([length for _, found in whole for length in found.lengths], dtype=torch.float64)
        wins = [win for row, found in whole for win in _wins(row, found.scores)]
        varied = min(float(scores.std(correction=0)), float(lengths.std(correction=0))) > 0
        return cls(
            report.summary(),
            float(scores.mean()),
            float(scores.std(correction=0)),
            len(wins),
            sum(wins) / len(wins) if wins else None,
            float(torch.corrcoef(torch.stack([scores, lengths]))[0, 1]) if varied else None,
        )

    def __str__(self) -> str:
        words = [f"mean {self.mean:.4g}", f"standard deviation {self.std:.4g}"]
        if self.accuracy is not None:
            words.append(f"accuracy {self.accuracy:.4f} on {self.pairs} pairs")
        if self.length_correlation is not None:
            words.append(f"correlation with length {self.length_correlation:.2f}")
        return f"{self.rows}; {', '.join(words)}"


def _wins(row: Row, scores: list[float]) -> list[bool]:
    """Of each two answers that differ in rank, whether the better one scores higher."""
    ranks = row.ranks if isinstance(row, Answered) else None
    if ranks is None:
        return []
    places = range(len(ranks))
    return [scores[i] > scores[j] for i in places for j in places if ranks[i] < ranks[j]]


def score(
    model: str,
    file: str,
    to: str | None = None,
    columns: dict[str, ColumnName] | None = None,
    split: str | None = "train",
    name: str | None = None,
    delimiter: str | None = None,
    limit: int | None = None,
    max_length: int | None = None,
    truncation: Truncation = "keep_end",
    micro_batch_tokens: int = 16384,
    on_bad_row: Literal["null", "skip", "error"] = "null",
    dtype: Dtype = "float32",
    quantization: Quantization | None = None,
    base: str | None = None,
    trust_remote_code: bool = False,
) -> Summary:
    """Score every answer in a file and write the rows with their scores, in the file's order.

    Args:
        model: a RewardModel run, an `hf/` or exported folder, or a hub name of a classifier with one label.
        file: a data file of any known shape, or a hub data set.
        to: the JSON Lines file to write, `-` for standard output; null is the file's name with `.scores.jsonl`, here.
        columns: our name for a column → the file's name.
        split: split of a hub data set or of a folder; null is none.
        name: configuration of a hub data set.
        delimiter: between the cells of a .csv or .tsv file; null is a comma or a tab.
        limit: read only so many of the file's first rows.
        max_length: longest prompt + answer in tokens; null is the model's context.
        truncation: what to do with a row that is longer: keep the start or the end of its prompt, or drop it.
        micro_batch_tokens: padded tokens that go through the device at once. Changes no score beyond rounding.
        on_bad_row: write a row that cannot be scored with null and the reason, leave it out, or stop at the first.
        dtype: of the model's weights.
        quantization: load the model's weights in 4 bits; null is what an adapter was trained on, or full precision.
        base: where the base of an adapter is now; null is where the adapter says that it was.
        trust_remote_code: run model code that comes with the weights.

    Raises:
        UserError: there is nothing to score or to score with, a score is no number, or the place cannot be written to.
    """
    for option, value in (("limit", limit), ("max_length", max_length), ("micro_batch_tokens", micro_batch_tokens)):
        if value is not None and value < 1:
            raise UserError(f"--{option} must be at least 1, not {value}")
    target = _target(file, to)
    source = Source(file, split, name, columns or {}, delimiter=delimiter)
    found = answered(read_rows(source, limit), source)
    kind, rows = found.kind, found.rows
    named = Base(model, dtype=dtype, quantization=quantization, adapter_base=base, trust_remote_code=trust_remote_code)
    scorer = load_scorer(named, trained=True, frozen=True)
    scorer.to("cuda" if torch.cuda.is_available() else "cpu")
    chat = ChatFormat(load_tokenizer(named))
    longest = min(max_length or sys.maxsize, context_length(scorer) or sys.maxsize)
    report = RowReport(source.label, unused=found.unused, notes=found.notes)
    for line in report.remarks():
        say(line)
    scored: list[Scored | Unusable] = []
    for window in _windows(rows):
        encoded = [_encoded(row, chat, longest, truncation) for row in window]
        for row in encoded:
            report.total += 1
            if isinstance(row, Unusable):
                if on_bad_row == "error":
                    raise UserError(f"{source.label}, row {row.row}: {row.reason}; mend it, or leave --on_bad_row out")
                report.skip(row.reason, row.row)
            else:
                report.used += 1
        scored += _scored(window, encoded, scorer, micro_batch_tokens, source.label)
    summary = Summary.of(report, rows, scored)
    lines = [_line(row, found, kind) for row, found in zip(rows, scored, strict=True)]
    keep = [on_bad_row != "skip" or isinstance(found, Scored) for found in scored]
    _write("".join(line for line, kept in zip(lines, keep, strict=True) if kept), target)
    return summary


def _target(file: str, to: str | None) -> Path | None:
    """Where the scores go; None is standard output."""
    if to == "-":
        return None
    stem = without_compression(Path(file).name)
    target = Path(to) if to else Path(f"{Path(stem).stem}.scores.jsonl")
    if target.is_dir():
        raise UserError(f"--to {to}: is a folder; name a file in it")
    if target.exists() and Path(file).exists() and target.samefile(file):
        raise UserError(f"--to {to}: is the file that is to be scored; name another")
    return target


def _windows(rows: Sequence[Row]) -> Any:
    """Slices of the rows, with a bar on a terminal."""
    from rich.console import Console
    from rich.progress import track

    iterator = iter(rows)
    windows = iter(lambda: list(islice(iterator, WINDOW)), [])
    console = Console(stderr=True)
    total = math.ceil(len(rows) / WINDOW)
    return track(windows, "Scoring", total=total, console=console, disable=not console.is_terminal)


def _encoded(row: Row, chat: ChatFormat, longest: int, truncation: Truncation) -> list[Encoded] | Unusable:
    """The tokens of each answer with its prompt, which is cut alike for all of them."""
    if isinstance(row, Unusable):
        return row
    try:
        sides = chat.answers(row.prompt, row.answers, row.tools)
    except UserError as error:  # a chat template that refuses this conversation
        return Unusable(str(error), row.row, row.source)
    if not all(any(side.mask) for side in sides):
        return Unusable("no token of an answer", row.row, row.source)
    fitted = truncate_group(sides, longest, truncation, chat.tokenizer.bos_token_id)
    return Unusable("over-long", row.row, row.source) if fitted is None else fitted


def _scored(
    rows: Sequence[Row], encoded: Sequence[list[Encoded] | Unusable], scorer: nn.Module, budget: int, label: str
) -> list[Scored | Unusable]:
    """The scores of each row's answers.

    Raises:
        UserError: one of them is not finite.
    """
    sides = [side for found in encoded if not isinstance(found, Unusable) for side in found]
    scores = _scores(sides, scorer, budget)
    result: list[Scored | Unusable] = []
    for row, found in zip(rows, encoded, strict=True):
        if isinstance(found, Unusable):
            result.append(found)
            continue
        own = [scores.pop(0) for _ in found]
        if bad := [value for value in own if not math.isfinite(value)]:
            raise UserError(
                f"{label}, row {row.row}: the model's score is {bad[0]}, no finite number; its weights are broken, or "
                "too large for --dtype"
            )
        result.append(Scored(own, [sum(side.mask) for side in found]))
    return result


def _scores(sides: Sequence[Encoded], scorer: nn.Module, budget: int) -> list[float]:
    if not sides:
        return []
    sequences = Sequences.pad([side.tokens for side in sides], [side.mask for side in sides])
    found: Tensor = score_sequences(scorer, sequences.to(next(scorer.parameters()).device), budget)
    return [float(value) for value in found.cpu()]


def _line(row: Row, found: Scored | Unusable, kind: Kind) -> str:
    """A row's number, its own fields and its scores; where a name is taken, the file's becomes ``file_<name>``."""
    names = NAMES[kind]
    values: dict[str, Any] = dict.fromkeys(names)
    if isinstance(found, Unusable):
        values["reason"] = found.reason
    else:
        values = {"scores": found.scores} if kind == "list" else dict(zip(names, found.scores, strict=True))
    taken = {"row", "reason", *names}
    own = {f"file_{key}" if key in taken else key: value for key, value in row.source.items()}
    return json.dumps({"row": row.row, **own, **values}, ensure_ascii=False, default=str) + "\n"


def _write(text: str, target: Path | None) -> None:
    """All lines at once: a file is whole, or as it was."""
    if target is None:
        hand_over(text, end="")
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with atomic(target) as partial:
            partial.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--to {target}: cannot be written: {error.strerror or error}") from error


def main(argv: list[str]) -> int:
    """Run ``score``."""
    parser = Parser(
        prog="rlhf-lit score", description="A reward model's score of every answer in a file.", allow_abbrev=False
    )
    parser.add_function_arguments(score, as_positional=True)
    arguments = parser.instantiate_classes(parser.parse_args(argv))
    quiet_libraries()
    summary = score(**arguments.as_dict())
    to_stdout = arguments.to == "-"
    target = "" if to_stdout else f"; written to {_target(arguments.file, arguments.to)}"
    (say if to_stdout else tell)(f"{summary}{target}")
    return 0
