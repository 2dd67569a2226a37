"""``export --push_to_hub`` by the hub's real client, against a stand-in of the hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import hub_stand_in
import pytest
import tiny
from hub_stand_in import Hub

from rlhf_lit.__main__ import main
from rlhf_lit.algorithms import SFT
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.saving import save_hf


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a LoRA run."""
    place = tmp_path_factory.mktemp("pushed")
    module = tiny.build(SFT(Base(name=tiny.save_model(place / "base"), lora=LoRA(rank=4))))
    tiny.disturb(module, 0.05)
    save_hf(module, place / "run" / "hf")
    return place / "run"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The stand-in, reached by the client in this process."""
    with hub_stand_in.reached(monkeypatch) as running:
        yield running


@pytest.mark.parametrize("option", ["--push_to_hub", "--push-to-hub"])
def test_the_folder_arrives_whole(
    run: Path, tmp_path: Path, server: Hub, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    assert main(["export", str(run), "--merge", f"--to={folder}", f"{option}=me/mine"]) == 0
    assert f"uploaded to {server.address}/me/mine/commit/" in capsys.readouterr().out
    assert server.files == {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= set(server.files)
    assert server.large  # the weights went the way of large files
    assert [(one["name"], one["organization"], one["visibility"]) for one in server.created] == [
        ("mine", "me", "private")
    ]
    assert 'name = "me/mine"' in server.files["README.md"].decode()


REFUSALS = {
    "a token that the hub does not know": ({"/whoami-v2": (401, "Invalid user token.")}, "did not let us in", False),
    "a hub that is down": ({"/whoami-v2": (503, "down for maintenance")}, "did not let us in", False),
    "someone else's name": ({"/repos/create": (403, "You don't have the rights")}, "403", True),
    "a commit at the same time": ({"/commit/main": (409, "The branch has moved")}, "409", True),
    "a card that is refused": ({"/validate-yaml": (400, "license: unknown")}, "README.md. - license: unknown", True),
    "a store that breaks off": ({"/verify": (500, "no room left")}, "500", True),
    "a hub that breaks": ({"/preupload/main": (502, "bad gateway")}, "502", True),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_a_refusal_is_one_line_and_the_folder_is_kept(
    run: Path, tmp_path: Path, server: Hub, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    refuse, words, written = REFUSALS[case]
    server.refuse = refuse
    folder = tmp_path / "out"
    assert main(["export", str(run), f"--to={folder}", "--push_to_hub=me/mine"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --push_to_hub me/mine: ")
    assert (err.count("\n"), words in err) == (1, True), err
    assert folder.exists() == written
    if written:
        assert "the export is whole in" in err
        assert json.loads((folder / "adapter_config.json").read_text())["r"] == 4
    assert not server.files


@pytest.mark.parametrize("gone", ["before", "meanwhile"])
def test_a_hub_that_cannot_be_reached(
    run: Path,
    tmp_path: Path,
    server: Hub,
    gone: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from huggingface_hub import HfApi

    if gone == "meanwhile":
        monkeypatch.setattr(HfApi, "whoami", lambda self: {"name": "me"})
    server.shutdown()
    server.server_close()  # the port answers nobody now
    folder = tmp_path / "out"
    assert main(["export", str(run), f"--to={folder}", "--push_to_hub=me/mine"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: --push_to_hub me/mine: ")
    assert (err.count("\n"), folder.exists()) == (1, gone == "meanwhile"), err


def test_without_a_token_nothing_is_done(
    run: Path, tmp_path: Path, server: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(tmp_path / "none either"))
    assert main(["export", str(run), f"--to={tmp_path / 'out'}", "--push_to_hub=me/mine"]) == 2
    assert "no token; run 'hf auth login', or set HF_TOKEN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert not [one for one in server.asked if "agent" not in one]
