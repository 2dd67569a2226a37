"""Raw rows from a hub data set, a local file (every value with the type its file gave it) or the built-in world."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlhf_lit import playground
from rlhf_lit.errors import UserError
from rlhf_lit.playground import Wanted, World
from rlhf_lit.runs import PLAYGROUND

ColumnName = str | dict[str, Any] | None
"""A column of a file, or a template over several; a verdict's meaning; null of a verdict that is none."""
EXTENSIONS = (".json", ".jsonl", ".ndjson", ".csv", ".parquet", ".txt")


@dataclass
class Source:
    """Where rows come from.

    Args:
        path: a data set's name on the hub, a folder that `datasets` can load, or a local .json, .jsonl, .csv, .parquet
            or .txt file, which may be compressed (.gz). A .txt file has one row per non-empty line. `playground` is
            the built-in world.
        split: split of a hub data set, slices such as `train[:100]` allowed; of the built-in world `train` or
            `held_out`. A local file has only `train`.
        name: configuration of a hub data set.
        columns: our name for a column → the file's name, e.g. `{prompt: question, chosen: response_j}`, or a template
            over several: `{prompt: "{question}\\n{options}"}`. Of two answers `verdict` says which is better.
        limit: read usable rows until there are this many; all of them where it is null.
        world: the built-in world, where the path is `playground`; null is its default make-up.

    Raises:
        UserError: a ``world`` of its own beside another path.
    """

    path: str
    split: str = "train"
    name: str | None = None
    columns: dict[str, ColumnName] = field(default_factory=dict)
    limit: int | None = None
    weight: float = 1.0
    streaming: bool = False
    world: World | None = None

    def __post_init__(self) -> None:
        if self.world is not None and self.path != PLAYGROUND:
            raise UserError(
                f"world: it makes up the rows of the path {PLAYGROUND} alone, not those of {self.path}; set it to null"
            )

    @property
    def label(self) -> str:
        """How messages name it: the file's name, or the hub name with its split."""
        return Path(self.path).name if is_local_file(self.path) else f"{self.path}[{self.split}]"


def is_local_file(path: str) -> bool:
    """Whether ``path`` means a local file (there or not) rather than a hub name or a folder."""
    return Path(path).is_file() or path.removesuffix(".gz").endswith(EXTENSIONS)


def require_one_world(sources: Mapping[str, Source | None]) -> None:
    """Refuse parts of different built-in worlds, whose splits overlap. Raises UserError."""
    parts = {name: source for name, source in sources.items() if source is not None and source.path == PLAYGROUND}
    seeds = {name: (source.world or World()).seed for name, source in parts.items()}
    for (first, one), (name, other) in pairwise(seeds.items()):
        if one != other:
            raise UserError(
                f"data.{name}.world.seed: {other} splits the built-in world otherwise than data.{first}.world.seed: "
                f"{one}, so that prompts of one may be in the other; set both alike"
            )


def rows_of(source: Source, wanted: Wanted) -> list[Any]:
    """All rows of a source, a file's or those of the built-in world.

    Args:
        source: where they come from.
        wanted: what they are to be; the built-in world makes them up, a file has what it has.

    Raises:
        UserError: as ``read_rows`` and ``playground.rows`` say.
    """
    if source.path == PLAYGROUND:
        return list(playground.rows(source.world or World(), wanted, source.split))
    return read_rows(source)


def read_rows(source: Source) -> list[Any]:
    """All rows of a file or a hub data set, as they are there: a dict each, unless a JSON file holds something else
    in a row's place.

    JSON is read by Python's parser, since a columnar reader refuses a whole file for one row of another type; CSV cells
    stay text ("007" and "NA" too).

    Raises:
        UserError: no such file, an extension we cannot read, text that does not parse (with its line number), no row, a
            hub data set that cannot be loaded, or a ``split`` or ``name`` given for a local file.
    """
    if not is_local_file(source.path):
        return _read_hub(source)
    path = Path(source.path).expanduser()
    if not path.exists():
        raise UserError(f"no such file: {source.path}")
    if source.split != "train" or source.name is not None:
        raise UserError(
            f"{source.path} is a local file: it has no split '{source.split}' or configuration '{source.name}'; "
            "use `limit` for its first rows"
        )
    readers: dict[str, Callable[[Path], list[Any]]] = {
        ".json": _read_json,
        ".jsonl": _read_json,
        ".ndjson": _read_json,
        ".csv": _read_csv,
        ".parquet": _read_parquet,
        ".txt": lambda p: [{"text": line} for line in _text(p).splitlines() if line.strip()],
    }
    suffix = Path(path.name.removesuffix(".gz")).suffix
    if suffix not in readers:
        raise UserError(f"{source.path}: cannot read '{suffix}' files; known are {', '.join(readers)}, also with .gz")
    rows = readers[suffix](path)
    if not rows:
        raise UserError(f"{source.path} has no rows")
    return rows


def _text(path: Path) -> str:
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return content.decode("utf-8-sig")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: byte {error.start} cannot be decoded") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def _read_json(path: Path) -> list[Any]:
    """A list of objects, or JSON Lines, whatever the extension says."""
    text = _text(path)
    if text.lstrip().startswith("["):
        try:
            rows: list[Any] = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {error.lineno}: not valid JSON ({error.msg})") from error
        return rows
    rows = []
    # not splitlines(): it also splits at U+2028 and its like, which JSON allows inside a string
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}, line {number}: not valid JSON ({error.msg}); the file must be a list of objects, "
                    "or one object per line"
                ) from error
    return rows


def _read_csv(path: Path) -> list[Any]:
    """Rows by the header's names. A short row has nulls; one with too many cells stays a list, which is no record."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 131072 characters
    table = csv.reader(io.StringIO(_text(path), newline=""))
    try:
        header = next(table, [])
        cells = [row for row in table if row]
    except csv.Error as error:
        raise UserError(f"{path}, line {table.line_num}: not valid CSV ({error})") from error
    return [
        {name: row[i] if i < len(row) else None for i, name in enumerate(header)} if len(row) <= len(header) else row
        for row in cells
    ]


def _read_parquet(path: Path) -> list[Any]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows: list[Any] = pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()
    except (pyarrow.ArrowException, OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a readable Parquet file: {_reason(error)}") from error
    return rows


def _read_hub(source: Source) -> list[Any]:
    from datasets import load_dataset

    try:
        data = load_dataset(source.path, source.name, split=source.split)
    except Exception as error:  # the hub client, fsspec and datasets raise unrelated kinds
        raise UserError(
            f"cannot load '{source.path}' (split '{source.split}'): no such local file, and as a hub data set: "
            f"{_reason(error)}"
        ) from error
    if len(data) == 0:
        raise UserError(f"{source.path}, split '{source.split}', has no rows")
    rows: list[Any] = data.to_list()
    return rows


def _reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@dataclass
class Chunk:
    first: int
    content: list
    done: float

    def rows(self):
        return self.content


class RowFile:
    def __init__(self, rows):
        self.all = rows
        self.fingerprint = json.dumps(rows, default=str)

    def chunks(self, n):
        for i in range(0, len(self.all), n):
            yield Chunk(i, self.all[i : i + n], i / len(self.all))


def open_rows(source, wanted):
    return RowFile(rows_of(source, wanted))
