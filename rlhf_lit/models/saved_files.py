"""The files of a saved model as others are to find them: readable, and without what only told how we loaded it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from rlhf_lit.files import write_json

# What transformers keeps of its own loading in the tokenizer's and the model's configuration.
LOADING = (
    "is_local", "local_files_only", "name_or_path", "_name_or_path", "tokenizer_file", "special_tokens_map_file",
    "_commit_hash", "cache_dir", "device_map", "force_download", "proxies", "token", "trust_remote_code", "_from_auto",
)  # fmt: skip
# Vocabularies in the form that sentencepiece and mistral-common read: transformers loads them, and saves its own alone.
VOCABULARIES = (
    "tokenizer.model", "spm.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model", "tekken.json",
)  # fmt: skip


def forget_loading(folder: Path) -> None:
    """Take out of a saved model's configurations how and from where its parts were loaded here."""
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        settings = json.loads(file.read_text(encoding="utf-8"))
        kept = {key: value for key, value in settings.items() if key not in LOADING}
        if len(kept) < len(settings):
            write_json(file, kept)


def copy_vocabularies(tokenizer: Any, folder: Path) -> None:
    """Put the vocabulary files that the tokenizer came with, and does not save, beside what it saves.

    Args:
        tokenizer: loaded from a folder or from the hub.
        folder: where it was saved to.
    """
    from transformers.utils import cached_file

    for name in VOCABULARIES:
        if (folder / name).exists() or not tokenizer.name_or_path:
            continue
        found = cached_file(
            tokenizer.name_or_path,
            name,
            local_files_only=True,  # what was loaded is in the cache
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if found is not None:
            shutil.copyfile(found, folder / name)


def open_to_readers(folder: Path) -> None:
    """Give every file of a folder the permissions of a file that is simply opened there: safetensors writes its own for
    their owner's eyes alone."""
    probe = folder / ".permissions"
    probe.touch()
    usual = probe.stat().st_mode
    probe.unlink()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink() and file.stat().st_mode != usual:
            file.chmod(usual & 0o7777)
