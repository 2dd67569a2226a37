"""A tiny model in a folder, once per session."""

from pathlib import Path

import pytest
import tiny

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a fresh two-layer Llama with a 40-word tokenizer whose pad token is EOS."""
    return tiny.save_model(tmp_path_factory.mktemp("llama"))
