"""How each kind of file is read: lazily, a row at a time, so that a file's size is no limit.

A reader gives rows with the types their file gives them, and JSON Lines yet to be parsed. Lines end at newlines alone:
U+2028, U+0085, form feeds and the like are text.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from rlhf_lit.data import json_rows
from rlhf_lit.data.json_rows import Line
from rlhf_lit.errors import UserError

COMPRESSED = (".gz", ".zst")
BATCH = 1000  # rows of a columnar file that are Python objects at a time
BUFFER = 2**20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass
class Reading:
    """A file on its way through a reader.

    Attributes:
        path: of the file.
        delimiter: between the cells of a line; None is its kind's own.
        rows_at: path of the lists that hold the rows inside of what the file has.
        done: the fraction that has been read, from 0 to 1.
    """

    path: Path
    delimiter: str | None = None
    rows_at: str | None = None
    done: Callable[[], float] = float


def kind_of(path: str) -> str:
    """The extension that says how a file is read, in small letters and without what says that it is compressed."""
    return Path(without_compression(path)).suffix.lower()


def without_compression(path: str) -> str:
    """A path without .gz or .zst."""
    stem, extension = os.path.splitext(path)
    return stem if extension.lower() in COMPRESSED else path


def read(reading: Reading) -> Iterator[Any]:
    """The rows of a file, or lines that will be rows.

    Raises:
        UserError: a kind of file that we cannot read, or what the readers of each kind raise: text that does not parse
            (with its line), a compressed file that is torn, one that may not be read.
    """
    kind = kind_of(reading.path.name)
    if kind not in READERS:
        raise UserError(
            f"{reading.path}: cannot read '{kind}' files; known are {', '.join(READERS)}, also with "
            f"{' or '.join(COMPRESSED)}"
        )
    rows = READERS[kind](reading)
    if reading.rows_at is None:
        return rows
    parsed = (row.parse(as_a_row=False) if isinstance(row, Line) else row for row in rows)
    return json_rows.nested(parsed, reading.rows_at, str(reading.path))


@contextmanager
def _opened(reading: Reading) -> Iterator[BinaryIO]:
    """The content of a file, decompressed as it is read.

    Raises:
        UserError: it cannot be read, or is torn.
    """
    path = reading.path
    compression = path.suffix.lower()
    try:
        with path.open("rb") as file:
            size = max(1, os.fstat(file.fileno()).st_size)
            reading.done = lambda: min(1.0, file.tell() / size)
            yield _decompressed(file, compression)
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path} is not a whole gzip file: {error}") from error
    except OSError as error:
        if error.errno is None and compression == ".zst":
            raise UserError(f"{path} is not a whole zstd file: {reason(error)}") from error
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    finally:
        reading.done = lambda: 1.0


def _decompressed(file: BinaryIO, compression: str) -> BinaryIO:
    if compression == ".gz":
        return io.BufferedReader(gzip.GzipFile(fileobj=file), BUFFER)
    if compression == ".zst":
        import pyarrow  # type: ignore[import-untyped]

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), BUFFER)
    return file


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line that is not blank; numbers from 1."""
    for number, line in enumerate(stream, start=1):
        content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
        if content.strip():
            yield number, content


def _text(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: not UTF-8 text (byte {error.start} of the file cannot be decoded)"
        ) from error


def _read_json(reading: Reading) -> Iterator[Any]:
    """A list of rows, or JSON Lines, whatever the extension says."""
    file = str(reading.path)
    with _opened(reading) as stream:
        lines = _lines(stream)
        number, content = next(lines, (0, b""))
        if content.lstrip().startswith(b"["):
            yield from json_rows.array(_text(b"\n" * (number - 1) + content + stream.read(), reading.path), file)
            return
        first = Line(file, number, content)
        if kind_of(file) == ".json" and content.lstrip().startswith(b"{") and not first.is_whole():
            yield _one_object(first, stream.read(), reading)
            return
        if number:
            yield first
        for number, content in lines:
            yield Line(file, number, content)


def _one_object(first: Line, rest: bytes, reading: Reading) -> Any:
    """What a file holds that begins with an object of several lines.

    Raises:
        UserError: it is no object, or nobody said where its rows are.
    """
    try:
        value = json_rows.whole(_text(b"\n" * (first.number - 1) + first.content + rest, reading.path), first.file)
    except UserError:
        if reading.rows_at is None:
            first.parse()  # the complaint about the line says what is looked for
        raise
    if reading.rows_at is None:
        keys = [key for key, inner in value.items() if isinstance(inner, list)]
        raise UserError(
            f"{first.file} holds one object of several lines, not a list of rows; say where in it the rows are, as "
            f"columns: {{rows: {keys[0] if keys else 'KEY'}}}"
        )
    return value


def _read_table(reading: Reading) -> Iterator[Any]:
    """Rows by the header's names; cells stay text ("007" and "NA" too).

    A short row has nulls; one with too many cells stays a list, which is no record. A quote that is never closed, or
    closed by a later row's, is refused: it would swallow the rows between.
    """
    csv.field_size_limit(2**31 - 1)  # the default refuses texts over 131072 characters
    delimiter = reading.delimiter or ("\t" if kind_of(reading.path.name) == ".tsv" else ",")
    begins = 1
    with _opened(reading) as stream:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
        table = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            header = next(table, [])
            _check_header(header, reading.path)
            begins = table.line_num + 1
            for row in table:
                begins = table.line_num + 1
                if len(row) > len(header):
                    yield row
                elif row:
                    yield {name: row[i] if i < len(row) else None for i, name in enumerate(header)}
        except csv.Error as error:
            raise UserError(
                f"{reading.path}, line {begins}: not valid CSV ({_quoting(error, table.line_num)})"
            ) from error
        except UnicodeDecodeError as error:
            raise UserError(
                f"{reading.path}, after line {table.line_num}: not UTF-8 text (a byte cannot be decoded)"
            ) from error


def _quoting(error: csv.Error, line: int) -> str:
    """What is wrong with a row's quotes; the parser stops where the file ends, or at a quote of a later row."""
    if "end of data" in str(error):
        return "a quote that is opened in this row is never closed"
    if "expected after" in str(error):
        return (
            f"text follows a closing quote, in line {line}: a quote of this row is not closed where it should be, or "
            "one inside of a text is not doubled"
        )
    return str(error)


def _check_header(header: list[str], path: Path) -> None:
    """Refuse names that would hide a column. The first may be empty: pandas writes its index so."""
    for place, name in enumerate(header):
        if name in header[:place]:
            raise UserError(f"{path}, line 1: two columns are named '{name}'; rename or remove one of them")
        if not name and place:
            raise UserError(f"{path}, line 1: column {place + 1} has no name")


def _read_text(reading: Reading) -> Iterator[Any]:
    """One row for each line that is not blank."""
    with _opened(reading) as stream:
        for number, content in _lines(stream):
            line = content.removesuffix(b"\n").removesuffix(b"\r")
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{reading.path}, line {number}: not UTF-8 text (its byte {error.start} cannot be decoded)"
                ) from error
            if text.strip():
                yield {"text": text}


def _read_parquet(reading: Reading) -> Iterator[Any]:
    import pyarrow.parquet  # type: ignore[import-untyped]

    with _opened(reading) as stream, _columnar(reading, "Parquet"):
        file = pyarrow.parquet.ParquetFile(_seekable(stream, reading))
        total, count = max(1, file.metadata.num_rows), 0
        reading.done = lambda: count / total
        classes = class_names(file.schema_arrow.metadata)
        for batch in file.iter_batches(batch_size=BATCH):
            for row in batch.to_pylist():
                count += 1
                yield with_names(row, classes)


def _read_arrow(reading: Reading) -> Iterator[Any]:
    """A file of Arrow's IPC format, or a stream, as `datasets` writes."""
    import pyarrow

    with _opened(reading) as stream, _columnar(reading, "Arrow"):
        file = _seekable(stream, reading)
        try:
            whole = pyarrow.ipc.open_file(file)
            batches = (whole.get_batch(i) for i in range(whole.num_record_batches))
        except pyarrow.ArrowInvalid:
            file.seek(0)
            batches = iter(pyarrow.ipc.open_stream(file))
        for batch in batches:
            classes = class_names(batch.schema.metadata)
            for start in range(0, batch.num_rows, BATCH):
                yield from (with_names(row, classes) for row in batch.slice(start, BATCH).to_pylist())


def class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """The columns of an Arrow table whose numbers stand for names, as `datasets` writes a ``ClassLabel``."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {name: one["names"] for name, one in features.items() if one.get("_type") == "ClassLabel"}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def with_names(row: dict[str, Any], classes: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """A row with the names that its numbers stand for: which of `good` and `bad` is 0 is the file's affair."""
    for column, names in classes.items():
        value = row.get(column)
        if isinstance(value, int) and 0 <= value < len(names):
            row[column] = names[value]
    return row


def _seekable(stream: BinaryIO, reading: Reading) -> BinaryIO:
    """What is compressed is held in memory, since columnar files are read from their end."""
    return io.BytesIO(stream.read()) if reading.path.suffix.lower() in COMPRESSED else stream


@contextmanager
def _columnar(reading: Reading, kind: str) -> Iterator[None]:
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"{reading.path} is not a readable {kind} file: {reason(error)}") from error
    except OSError as error:
        if error.errno is not None or isinstance(error, gzip.BadGzipFile):
            raise
        raise UserError(f"{reading.path} is not a readable {kind} file: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first line of the innermost cause."""
    while error.__cause__ is not None:
        error = error.__cause__
    return (str(error).strip() or type(error).__name__).splitlines()[0]


READERS: dict[str, Callable[[Reading], Iterator[Any]]] = {
    ".json": _read_json,
    ".jsonl": _read_json,
    ".ndjson": _read_json,
    ".csv": _read_table,
    ".tsv": _read_table,
    ".parquet": _read_parquet,
    ".arrow": _read_arrow,
    ".txt": _read_text,
}
