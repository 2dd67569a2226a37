"""The tokenised store: records in, token lists out, made in parallel, kept in a file found by content."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from rlhf_lit.errors import UserError
from rlhf_lit.files import atomic

# Part of a file's key: raise it when the same text would give other tokens.
TOKENISATION_VERSION = 2

Encode = Callable[[Any], dict[str, Any] | str]
"""A record's tokens (plain lists), or in a few words why it has none."""


def tokenise(
    records: Sequence[Any], encode: Encode, settings: Sequence[object], name: str, cache: str | None, workers: int
) -> tuple[list[dict[str, Any] | str], str]:
    """The tokens of each record, or why it has none.

    Args:
        records: dataclasses, whose ``row`` and ``source`` have no part in the tokens.
        encode: makes them. A conversation that the chat template refuses (UserError) has none.
        settings: what else tokens depend on, as JSON has it.
        name: of the split, for the progress bar.
        cache: folder of tokenised files; None keeps nothing.
        workers: processes.

    Returns:
        One result per record, and the key of records and settings (hexadecimal).
    """
    import datasets

    digest = xxhash.xxh3_128()
    digest.update(json.dumps([*settings, TOKENISATION_VERSION]).encode())
    for record in records:
        digest.update(json.dumps(_content(record), ensure_ascii=False, default=str).encode())
    key = digest.hexdigest()
    file = Path(cache).expanduser() / f"{key}.arrow" if cache else None
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            return [json.loads(tokens) for tokens in datasets.Dataset.from_file(str(file))["tokens"]], key
    mapped = datasets.Dataset.from_dict({"index": list(range(len(records)))}).map(
        lambda row: {"tokens": json.dumps(_tokens_or_reason(encode, records[row["index"]]))},
        num_proc=workers if workers > 1 else None,
        desc=f"Tokenising {name}",
        new_fingerprint=key,
        remove_columns=["index"],
        keep_in_memory=True,
    )
    encoded = mapped["tokens"]
    if file is not None:
        with atomic(file, shared=True) as partial:
            _write_arrow(mapped, partial)
    return [json.loads(tokens) for tokens in encoded], key


def _tokens_or_reason(encode: Encode, record: Any) -> dict[str, Any] | str:
    try:
        return encode(record)
    except UserError as error:
        return str(error)


def _content(record: Any) -> Any:
    """What a record's tokens depend on: everything but the row it came from."""
    return {k: v for k, v in vars(record).items() if k not in ("source", "row")}


def _write_arrow(dataset: Any, file: Path) -> None:
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=str(file), features=dataset.features) as writer:
        writer.write_table(dataset.data.table)
        writer.finalize()
