"""Raw rows from a hub data set, local files (every value with the type its file gave it) or the built-in world."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from rlhf_lit import playground
from rlhf_lit.data import folders, reasoning_gym
from rlhf_lit.data.formats import READERS, kind_of, reason
from rlhf_lit.data.reasoning_gym import is_reasoning_gym
from rlhf_lit.data.row_files import Chunk, DatasetRows, LocalRows, MemoryRows, RowFile, StreamedRows
from rlhf_lit.errors import UserError
from rlhf_lit.playground import Wanted, World
from rlhf_lit.runs import PLAYGROUND

__all__ = [
    "Chunk",
    "ColumnName",
    "RowFile",
    "Source",
    "check_sources",
    "is_local_file",
    "open_rows",
    "place_of",
    "read_rows",
    "rows_of",
]

CHUNK = 1000  # rows that are parsed at a time

ColumnName = str | dict[str, str | int | bool] | None
"""A column of a file, or a template over several; a verdict's meaning; null of a verdict that is none."""


@dataclass
class Source:
    """Where rows come from.

    Args:
        path: a data set's name on the hub; a .json, .jsonl, .ndjson, .csv, .tsv, .parquet, .arrow or .txt file, which
            may be compressed (.gz, .zst); a folder of such files, or what `save_to_disk` of `datasets` wrote. A .txt
            file has one row per non-empty line. `reasoning-gym:TASK` is a task of that package, with options as in
            `reasoning-gym:leg_counting?size=1000&seed=1`. `playground` is the built-in world.
        split: split of a hub data set, slices such as `train[:100]` allowed; of a folder, whose files say it by their
            names; of the built-in world `train` or `held_out`. A local file has only `train`. null is no split: of a
            folder, all files in the order of their names.
        name: configuration of a hub data set.
        columns: our name for a column → the file's name, e.g. `{prompt: question, chosen: response_j}`, or a template
            over several: `{prompt: "{question}\\n{options}"}`. Of two answers `verdict` says which is better; `rows` is
            where rows are lists inside of what the file has, e.g. `{rows: data.examples}`.
        limit: read usable rows until there are this many; all of them where it is null.
        world: the built-in world, where the path is `playground`; null is its default make-up.
        weight: share of a mixture of training rows, in proportion to those of the others.
        streaming: of training rows: read as training goes on; nothing is written to disk. With a `limit`, of any rows:
            no more of a hub data set is fetched than it needs, and these rows are kept like others.
        delimiter: between the cells of a .csv or .tsv file; null is a comma or a tab.

    Raises:
        UserError: a ``world`` of its own beside another path, a limit below 1, a weight that is no share, or a
            delimiter that is not one character.
    """

    path: str
    split: str | None = "train"
    name: str | None = None
    columns: dict[str, ColumnName] = field(default_factory=dict)
    limit: int | None = None
    world: World | None = None
    weight: float = 1.0
    streaming: bool = False
    delimiter: str | None = None

    def __post_init__(self) -> None:
        if self.world is not None and self.path != PLAYGROUND:
            raise UserError(
                f"world: it makes up the rows of the path {PLAYGROUND} alone, not those of {self.path}; set it to null"
            )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"{self.path}: limit must be at least 1, not {self.limit}")
        if not (self.weight > 0 and math.isfinite(self.weight)):
            raise UserError(f"{self.path}: weight must be above 0, not {self.weight}")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '\r\n"'):
            raise UserError(f'{self.path}: delimiter must be one character, not {self.delimiter!r} (a tab is "\\t")')

    @property
    def is_stream(self) -> bool:
        """Whether its rows have no number beforehand; with a limit they are a file like any other."""
        return self.streaming and self.limit is None

    @property
    def label(self) -> str:
        """How messages name it: the file's name, or the hub name with its split."""
        if is_local_file(self.path):
            return Path(self.path).name
        if is_reasoning_gym(self.path):
            return self.path
        return self.path if self.split is None else f"{self.path}[{self.split}]"


def is_local_file(path: str) -> bool:
    """Whether ``path`` means a local file (there or not) rather than a hub name or a folder."""
    file = Path(path).expanduser()
    return file.is_file() or (kind_of(path) in READERS and not file.is_dir())


def _require_one_world(sources: Mapping[str, Sequence[Source]]) -> None:
    """Refuse parts of different built-in worlds, whose splits overlap. Raises UserError."""
    parts = [(name, source) for name, some in sources.items() for source in some if source.path == PLAYGROUND]
    seeds = [(name, (source.world or World()).seed) for name, source in parts]
    for (first, one), (name, other) in pairwise(seeds):
        if one != other:
            raise UserError(
                f"data.{name}.world.seed: {other} splits the built-in world otherwise than data.{first}.world.seed: "
                f"{one}, so that prompts of one may be in the other; set both alike"
            )


def check_sources(sources: Mapping[str, Sequence[Source]], held_out: float) -> None:
    """Refuse sources that do not go together.

    Args:
        sources: by split, several of a mixture.
        held_out: fraction of the training rows that validation gets.

    Raises:
        UserError: different built-in worlds, a mixture or a split of streams, or a stream or weight beside training.
    """
    _require_one_world(sources)
    for name, some in sources.items():
        streamed = any(source.is_stream for source in some)
        if name == "train":
            if streamed and len(some) > 1:
                raise UserError("data.train: a mixture cannot be streamed; leave streaming out, or set limits")
            if streamed and held_out:
                raise UserError("data.validation_fraction: rows that are streamed cannot be split; set data.validation")
        elif streamed:
            raise UserError(
                f"data.{name}.streaming: training rows alone are read as training goes on; leave it out, or set a limit"
            )
        elif any(source.weight != 1 for source in some):
            raise UserError(f"data.{name}.weight: training rows alone are mixed; leave it out")


def place_of(split: str, source: Source, among: Sequence[Source]) -> str:
    """How messages name a source's part of a split; of a mixture with the file's name, numbered where two share it."""
    if len(among) < 2:
        return split
    same = sum(other.label == source.label for other in among)
    number = next(i for i, other in enumerate(among, 1) if other is source)
    return f"{split} ({source.label})" if same == 1 else f"{split} ({number}: {source.label})"


def open_rows(source: Source, wanted: Wanted) -> RowFile:
    """The rows of a source, to be read in chunks: a file's, a data set's or those of the built-in world.

    JSON is read by Python's parser, since a columnar reader refuses a whole file for one row of another type; CSV cells
    stay text ("007" and "NA" too).

    Args:
        source: where they come from.
        wanted: what they are to be; the built-in world makes them up, a file has what it has.

    Raises:
        UserError: as ``playground.rows`` says; no such file, a folder with a file of another kind, a data set that
            cannot be loaded, or a ``split``, ``name`` or ``delimiter`` that does not go with the path.
    """
    if source.path == PLAYGROUND:
        rows = playground.rows(source.world or World(), wanted, source.split or "train")
        return MemoryRows(source.label, list(rows))
    return _open(source)


def rows_of(source: Source, wanted: Wanted) -> list[Any]:
    """All rows of a source at once.

    Raises:
        UserError: as ``open_rows`` says, and what reading the rows raises: text that does not parse (with its line), or
            no row.
    """
    return _all_rows(open_rows(source, wanted))


def read_rows(source: Source, most: int | None = None) -> list[Any]:
    """As ``rows_of``, for what cannot come from the built-in world; no more than ``most`` rows are read."""
    return _all_rows(_open(source), most)


def _all_rows(file: RowFile, most: int | None = None) -> list[Any]:
    chunks = file.chunks(CHUNK if most is None else min(CHUNK, most))
    return list(islice((row for chunk in chunks for row in chunk.rows()), most))


def _open(source: Source) -> RowFile:
    rows_at = source.columns.get("rows")
    if rows_at is not None and not isinstance(rows_at, str):
        raise UserError(f"{source.path}: columns.rows must be the path of a list, such as data.examples")
    if is_reasoning_gym(source.path):
        if source.split not in ("train", None):
            raise UserError(f"{source.path} has no split '{source.split}': another seed gives other rows (?seed=1)")
        return MemoryRows(source.label, reasoning_gym.rows(source.path))
    path = Path(source.path).expanduser()
    if is_local_file(source.path):
        return LocalRows(source.path, [_checked(path, source)], source.delimiter, rows_at)
    if path.is_dir() and source.name is None and not _is_configured(path):
        name, start, stop = folders.part_of(source.split, source.path)
        if any((path / file).is_file() for file in folders.SAVED):
            data = _saved(path, name, source)
            return DatasetRows(source.label, data.select(range(len(data))[start:stop]), rows_at)
        return LocalRows(source.label, folders.files_of(path, name), source.delimiter, rows_at, start, stop)
    if source.delimiter is not None:
        raise UserError(f"{source.path}: delimiter: it is for .csv and .tsv files, which this is not")
    return _of_the_hub(source, rows_at)


def _checked(path: Path, source: Source) -> Path:
    """A local file that is there, with settings that it can have."""
    if not path.exists():
        raise UserError(f"no such file: {source.path}")
    if source.split not in ("train", None) or source.name is not None:
        raise UserError(
            f"{source.path} is a local file: it has no split '{source.split}' or configuration '{source.name}'; "
            "use `limit` for its first rows"
        )
    if source.delimiter is not None and kind_of(path.name) not in (".csv", ".tsv"):
        raise UserError(f"{source.path}: delimiter: it is for .csv and .tsv files, which this is not")
    return path


def _is_configured(folder: Path) -> bool:
    """Whether a folder is a copy of a hub data set that says itself, in its README, which files are what."""
    readme = folder / "README.md"
    return readme.is_file() and "\nconfigs:" in readme.read_text(encoding="utf-8", errors="replace")


def _saved(folder: Path, split: str | None, source: Source) -> Any:
    """A data set that `save_to_disk` wrote.

    Raises:
        UserError: it cannot be loaded, or has no such split.
    """
    from datasets import DatasetDict, load_from_disk

    try:
        data = load_from_disk(str(folder))
    except Exception as error:  # as of the hub's
        raise UserError(f"{source.path} cannot be loaded as what save_to_disk wrote: {reason(error)}") from error
    if isinstance(data, DatasetDict):
        return _one_split(data, split, source)
    if split not in (None, "train", str(data.split)):
        raise UserError(f"{source.path} is one data set without splits: it has no split '{split}'")
    return data


def _one_split(data: Mapping[str, Any], split: str | None, source: Source) -> Any:
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split is None or split not in data:
        raise UserError(f"{source.path} has no split '{split}'; it has {', '.join(data)}")
    return data[split]


def _of_the_hub(source: Source, rows_at: str | None) -> RowFile:
    from datasets import load_dataset, load_dataset_builder

    try:
        if source.streaming:
            builder = load_dataset_builder(source.path, source.name)
            data = builder.as_streaming_dataset(split=source.split)
        else:
            data = load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # the hub client, fsspec and datasets raise unrelated kinds
        raise UserError(
            f"cannot load '{source.path}' (split '{source.split}'): no such local file, and as a hub data set: "
            f"{reason(error)}"
        ) from error
    if source.split is None:
        data = _one_split(data, None, source)
    if not source.streaming:
        return DatasetRows(source.label, data, rows_at)
    files = getattr(builder.config, "data_files", None) or {}
    commits = {str(split): some.origin_metadata for split, some in files.items()}
    known = (data.info.splits or {}).get(str(data.split))
    return StreamedRows(
        source.label,
        data,
        (source.path, source.name, source.split, builder.hash, commits),
        rows_at,
        known.num_examples if known else None,
    )
