"""Shipped configs and sweeps by their short names, through the command line."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rlhf_lit.commands import shipped
from rlhf_lit.commands.configs import HEADINGS

ROOT = Path(__file__).parents[2]
FILES = sorted([*ROOT.glob("configs/*/*.yaml"), *ROOT.glob("sweeps/*.yaml")])


def learning_rate(answer) -> float:
    assert answer.status == 0, answer.err
    return yaml.safe_load(answer.out)["model"]["init_args"]["learning_rate"]


@pytest.mark.parametrize("name", ["dpo/qwen_0.5b", "dpo/qwen_0.5b.yaml", "configs/dpo/qwen_0.5b.yaml"])
def test_a_shipped_config_from_an_empty_folder(command: Callable, name: str) -> None:
    answer = command("fit", "--config", name, f"-c={name}", "--print_config")
    assert (learning_rate(answer), answer.err) == (1e-6, "")


def test_other_commands_that_take_a_config(command: Callable) -> None:
    assert learning_rate(command("validate", "--config=dpo/qwen_0.5b", "--print_config")) == 1e-6
    assert learning_rate(command("memory", "--config=dpo/qwen_0.5b", "--print_config")) == 1e-6
    options = yaml.safe_load(command("evaluate", "m", "--config", "evaluate/quickstart", "--print_config").out)
    assert options["best_of"] == [1, 2, 4]


def test_a_file_of_the_working_folder_comes_first_and_a_short_name_says_so(command: Callable) -> None:
    assert command("configs", "copy", "dpo/qwen_0.5b").out == "dpo/qwen_0.5b.yaml\n"
    own = Path("dpo/qwen_0.5b.yaml")
    own.write_text(own.read_text().replace("1.0e-6", "1.0e-3"))
    short = command("fit", "--config=dpo/qwen_0.5b", "--print_config")
    assert learning_rate(short) == 1e-3
    assert short.err == (
        "note: --config dpo/qwen_0.5b is dpo/qwen_0.5b.yaml of this folder, not the shipped one of that name\n"
    )
    whole = command("fit", "--config=dpo/qwen_0.5b.yaml", "--print_config")
    assert (learning_rate(whole), whole.err) == (1e-3, "")
    # The folder's name before it means the shipped one: no file here has that path.
    assert learning_rate(command("fit", "--config=configs/dpo/qwen_0.5b.yaml", "--print_config")) == 1e-6
    Path("mine.yaml").write_text(own.read_text())
    unknown = command("fit", "--config", "mine", "--print_config")
    assert (learning_rate(unknown), unknown.err) == (1e-3, "")


def test_a_sweep_by_its_name_names_its_configs_from_anywhere(command: Callable) -> None:
    """A grid of one point, copied: the configs in its command are the shipped ones."""
    assert command("configs", "copy", "sweeps/dpo_beta.yaml", "mine.yaml").out == "mine.yaml\n"
    answer = command("sweep", "mine", "--count=1", "--dry-run")
    assert (answer.status, answer.err) == (0, "checking 1 arms\n")
    assert "--config configs/dpo/quickstart.yaml" in answer.out
    assert "--runs=runs/sweeps/mine " in answer.out


def test_a_sweep_goes_on_where_its_configs_moved(command: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another environment holds the same package in another place."""
    from rlhf_lit.sweep.runner import Runner

    monkeypatch.setattr(Runner, "run", lambda self: 0)
    assert command("sweep", "dpo_beta", "--count=1").status == 0
    Path("elsewhere").symlink_to(ROOT)
    monkeypatch.setattr(shipped, "PACKAGE", Path("elsewhere/rlhf_lit").absolute())
    answer = command("sweep", "dpo_beta", "--count=1", "--resume")
    assert (answer.status, answer.err) == (0, "checking 1 arms\n")


@pytest.mark.parametrize(
    ("argv", "complaint"),
    [
        (
            ["fit", "--config=dpo/qwen_05b"],
            "--config dpo/qwen_05b: no such file, and none of that name is shipped; did you mean dpo/qwen_0.5b or",
        ),
        (["evaluate", "m", "--config", "evaluate/quikstart"], "did you mean evaluate/quickstart"),
        (
            ["sweep", "dpo_betta"],
            "sweep dpo_betta: no such file, and none of that name is shipped; did you mean dpo_beta?",
        ),
        (["sweep", "zzz"], "sweep zzz: no such file, and none of that name is shipped; `rlhf-lit configs` lists"),
        (["fit", "--config", "./dpo/qwen_05b"], "--config ./dpo/qwen_05b: no such file\n"),
        (["fit", "--config", "folder"], "--config folder: is a folder\n"),
        (["quickstart", "--overlays", "overlays/lorra"], "--config overlays/lorra: no such file, and none of that"),
        (["configs", "copy", "sft/quikstart"], "configs copy sft/quikstart: no such file, and none of that name is"),
        (["configs", "copy", "dpo_beta", "taken.yaml"], "configs copy dpo_beta: taken.yaml is there already; name"),
        (["configs", "copy", "dpo_beta", "taken.yaml/a.yaml"], "taken.yaml/a.yaml cannot be written: "),
        (["configs", "copy"], "configs: the following arguments are required: NAME"),
        (["configs", "--all"], "configs: unrecognized arguments: --all"),
    ],
)
def test_a_wrong_name_is_one_line(command: Callable, argv: list[str], complaint: str) -> None:
    Path("folder").mkdir()
    Path("taken.yaml").write_text("kept")
    answer = command(*argv)
    assert answer.status == 2
    assert answer.err.startswith("error: ")
    assert complaint in answer.err
    assert answer.err.count("\n") == 1
    assert Path("taken.yaml").read_text() == "kept"
    assert {path.name for path in Path().iterdir()} == {"folder", "taken.yaml"}


def test_a_copy_into_a_folder(command: Callable) -> None:
    Path("folder").mkdir()
    assert command("configs", "copy", "overlays/lora", "folder").out == "folder/lora.yaml\n"
    assert Path("folder/lora.yaml").read_bytes() == (ROOT / "configs/overlays/lora.yaml").read_bytes()


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_says_what_it_is_and_names_nothing_outside_of_the_package(path: Path) -> None:
    line = shipped.summary(path)
    assert 15 <= len(line) <= 130
    assert line[-1].isalnum() or line[-1] in ")?\"'"
    assert path.parent.name in HEADINGS
    values = "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))
    assert not re.search(r"\b(experiments|tests)\.", values)


def test_a_list_that_nobody_reads_to_its_end_is_no_bug() -> None:
    ended, read = os.pipe()
    os.close(ended)
    process = subprocess.run(
        [sys.executable, "-m", "rlhf_lit", "configs"], cwd=ROOT, stdout=read, stderr=subprocess.PIPE, text=True
    )
    os.close(read)
    assert (process.returncode, process.stderr) == (141, "")
