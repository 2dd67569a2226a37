"""Run folders and what a name on the command line means."""

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from rlhf_lit.errors import UserError
from rlhf_lit.runs import new_run, newest_checkpoint, resolve_checkpoint, resolve_model, versions


def make_model(folder: Path, file: str = "config.json") -> Path:
    folder.mkdir(parents=True)
    (folder / file).write_text("{}")
    return folder


def make_checkpoint(run: Path, name: str, when: int = 0) -> Path:
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    path = run / "checkpoints" / name
    torch.save({"global_step": 1}, path)
    os.utime(path, (when, when))
    return path


def test_versions_count_up_and_sort_as_numbers(tmp_path):
    made = [new_run(tmp_path, "sft") for _ in range(11)]
    assert [run.name for run in made] == [f"version_{n}" for n in range(11)]
    assert next(versions(tmp_path / "sft")).name == "version_10"
    assert new_run(tmp_path, "sft").name == "version_11"


def test_a_deleted_version_is_not_reused(tmp_path):
    first, second = new_run(tmp_path, "sft"), new_run(tmp_path, "sft")
    first.rmdir()
    assert new_run(tmp_path, "sft").name == "version_2"
    assert second.is_dir()


def test_two_processes_never_share_a_folder(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: new_run(tmp_path, "sft"), range(64)))
    assert len(set(made)) == 64


@pytest.mark.parametrize("name", ["", "../x", "/x", "a//b", "a/../b", "a b", ".hidden", "a/"])
def test_bad_run_names(tmp_path, name):
    with pytest.raises(UserError, match="no run name"):
        new_run(tmp_path, name)


def test_a_name_may_have_folders(tmp_path):
    assert new_run(tmp_path, "quickstart/sft") == tmp_path / "quickstart" / "sft" / "version_0"


def test_runs_folder_that_is_a_file(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match="cannot make a run folder"):
        new_run(tmp_path / "runs", "sft")


class TestCheckpoints:
    def test_last_is_the_newest_version_that_has_one(self, tmp_path):
        new_run(tmp_path, "sft")
        wanted = make_checkpoint(new_run(tmp_path, "sft"), "step_2.ckpt")
        new_run(tmp_path, "sft")
        assert resolve_checkpoint("last", tmp_path, "sft") == wanted

    def test_last_follows_the_link(self, tmp_path):
        make_checkpoint(tmp_path, "step_9.ckpt", when=9)
        wanted = make_checkpoint(tmp_path, "step_2.ckpt", when=2)
        (tmp_path / "checkpoints" / "last.ckpt").symlink_to("step_2.ckpt")
        assert newest_checkpoint(tmp_path) == wanted

    def test_a_dangling_link_falls_back_to_the_youngest_file(self, tmp_path):
        make_checkpoint(tmp_path, "step_2.ckpt", when=2)
        wanted = make_checkpoint(tmp_path, "step_4.ckpt", when=4)
        (tmp_path / "checkpoints" / "last.ckpt").symlink_to("step_3.ckpt")
        assert newest_checkpoint(tmp_path) == wanted

    def test_a_truncated_file_is_passed_over(self, tmp_path):
        wanted = make_checkpoint(tmp_path, "step_2.ckpt", when=2)
        cut = make_checkpoint(tmp_path, "step_4.ckpt", when=4)
        cut.write_bytes(cut.read_bytes()[:100])
        assert newest_checkpoint(tmp_path) == wanted

    def test_a_run_folder_means_its_newest_checkpoint(self, tmp_path):
        wanted = make_checkpoint(tmp_path, "step_2.ckpt")
        assert resolve_checkpoint(str(tmp_path), "runs", "sft") == wanted

    def test_a_file_is_itself(self, tmp_path):
        wanted = make_checkpoint(tmp_path, "any.ckpt")
        assert resolve_checkpoint(str(wanted), "runs", "sft") == wanted

    @pytest.mark.parametrize(
        ("given", "complaint"),
        [("last", "has a checkpoint"), ("nope.ckpt", "no such checkpoint"), ("best", "no such checkpoint")],
    )
    def test_none(self, tmp_path, monkeypatch, given, complaint):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(UserError, match=complaint):
            resolve_checkpoint(given, "runs", "sft")

    def test_a_file_that_is_no_checkpoint(self, tmp_path):
        (tmp_path / "x.ckpt").write_text("hello")
        with pytest.raises(UserError, match="not a checkpoint, or cut short"):
            resolve_checkpoint(str(tmp_path / "x.ckpt"), "runs", "sft")


class TestModels:
    @pytest.fixture(autouse=True)
    def _here(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)

    def test_the_newest_version_with_a_model(self):
        make_model(Path("runs/sft/version_2/hf"))
        make_model(Path("runs/sft/version_10/hf"))
        Path("runs/sft/version_11").mkdir()
        assert resolve_model("runs/sft") == "runs/sft/version_10/hf"

    def test_a_run_folder(self):
        make_model(Path("runs/sft/version_0/hf"), "adapter_config.json")
        assert resolve_model("runs/sft/version_0") == "runs/sft/version_0/hf"

    @pytest.mark.parametrize("file", ["config.json", "adapter_config.json"])
    def test_a_model_folder_is_itself(self, file):
        make_model(Path("mine"), file)
        assert resolve_model("mine") == "mine"

    @pytest.mark.parametrize("name", ["playground", "gpt2", "Qwen/Qwen2.5-0.5B-Instruct"])
    def test_other_names_pass(self, name):
        assert resolve_model(name) == name

    @pytest.mark.parametrize("name", ["runs/sft", "./gpt2", "/no/where", "../x", "~/nothing", "a/b/c", "here/model"])
    def test_a_path_that_does_not_exist(self, name):
        Path("here").mkdir()
        with pytest.raises(UserError, match="no such model folder"):
            resolve_model(name)

    def test_a_folder_without_a_model(self):
        Path("runs/sft/version_0/checkpoints").mkdir(parents=True)
        with pytest.raises(UserError, match="no model in this folder"):
            resolve_model("runs/sft")

    def test_a_file(self):
        Path("model.safetensors").write_text("")
        with pytest.raises(UserError, match="is a file"):
            resolve_model("model.safetensors")

    def test_nothing(self):
        with pytest.raises(UserError, match="empty"):
            resolve_model(" ")


def test_a_run_name_as_checkpoint_means_its_newest_version_that_has_one(tmp_path):
    make_checkpoint(tmp_path / "sft" / "version_0", "a.ckpt")
    wanted = make_checkpoint(tmp_path / "sft" / "version_1", "b.ckpt")
    new_run(tmp_path, "sft")
    assert resolve_checkpoint(str(tmp_path / "sft"), "runs", "sft") == wanted


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(UserError, match="not a checkpoint"):
        resolve_checkpoint(str(tmp_path / "data"), "runs", "sft")
