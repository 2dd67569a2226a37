"""Adapter folders, ours and those of other tools: what is loaded, and what is refused by name."""

import shutil
from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from rlhf_lit.algorithms import SFT
from rlhf_lit.errors import UserError
from rlhf_lit.models.adapters import base_of_adapter
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.saving import save_hf

SEQUENCES = tiny.sequences(tiny.RAGGED)


def logprobs(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return token_logprobs(model, SEQUENCES)


# --- a base that has moved -------------------------------------------------------------------------------------------


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """An adapter whose base went from ``here`` to ``there``; ``other`` has other weights."""
    here = tiny.save_model(tmp_path / "here")
    tiny.save_model(tmp_path / "other", seed=1)
    module = tiny.build(SFT(Base(name=here, lora=LoRA(rank=4))))
    tiny.disturb(module, 0.05)
    save_hf(module, tmp_path / "hf")
    torch.save(logprobs(module.roles.policy), tmp_path / "expected.pt")
    shutil.move(here, tmp_path / "there")
    return tmp_path


@pytest.mark.parametrize("file", ["base.json", "adapter_config.json"])
def test_a_base_that_is_gone_names_the_file_that_said_where_it_was(moved: Path, file: str) -> None:
    if file == "adapter_config.json":
        (moved / "hf" / "base.json").unlink()
    with pytest.raises(UserError, match=rf"hf/{file} says it was \(.*here: no such model folder\).*base\.adapter_base"):
        load_causal_lm(Base(name=str(moved / "hf")))


def test_adapter_base_says_where_it_is_now(moved: Path) -> None:
    model = load_causal_lm(Base(name=str(moved / "hf"), adapter_base=str(moved / "there")))
    assert logprobs(model).equal(torch.load(moved / "expected.pt"))


def test_adapter_base_must_be_the_same_base_and_there(moved: Path) -> None:
    with pytest.raises(UserError, match=r"was trained on a base with name .*here, and this one has .*other"):
        load_causal_lm(Base(name=str(moved / "hf"), adapter_base=str(moved / "other")))
    with pytest.raises(UserError, match=r"base\.adapter_base: .*nowhere: no such model folder"):
        load_causal_lm(Base(name=str(moved / "hf"), adapter_base=str(moved / "nowhere")))
    with pytest.raises(UserError, match=r"base\.adapter_base: .* holds a whole model"):
        load_causal_lm(Base(name=str(moved / "there"), adapter_base=str(moved / "there")))


def test_the_base_is_of_the_revision_that_the_adapter_names(moved: Path) -> None:
    """The config's revision is that of what it names: the adapter's repository, or the base under a folder of ours."""
    adapter = {"base_model_name_or_path": "org/base", "revision": None}
    assert base_of_adapter(Base(name="org/adapter", revision="v2"), adapter).revision is None
    assert base_of_adapter(Base(name="org/adapter", revision="v2"), {**adapter, "revision": "v1"}).revision == "v1"
    assert base_of_adapter(Base(name=str(moved / "hf"), revision="v2"), adapter).revision == "v2"
    assert base_of_adapter(Base(name="org/adapter", revision="v2"), adapter).name == "org/base"
