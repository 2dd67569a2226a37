"""What a run does not use it does not import: the real command line in a fresh interpreter, asked what it holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rlhf_lit.__main__ import main
from rlhf_lit.commands.training import RunCLI

CODE = """
import runpy, sys

words = sys.argv[1:]

def held(*argv):
    sys.argv = ["rlhf_lit", *argv]
    try:
        runpy.run_module("rlhf_lit", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        print("status", stop.code)
    print("held", *sys.modules)

held("--help")
held("fit", *words, "--model.lerning_rate=1")
held("fit", *words)
"""
ROOT = Path(__file__).parents[2]
FIT = [f"--config={ROOT / 'configs' / 'sft' / 'quickstart.yaml'}", "--name=sft", "--trainer.max_steps=1"]


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> list[set[str]]:
    """Modules after ``--help``, a wrong key's line and a run of one step, in one interpreter."""
    place: Path = tmp_path_factory.mktemp("startup")
    environment = {**os.environ, "HOME": str(place), "CUDA_VISIBLE_DEVICES": ""}
    ended = subprocess.run(
        [sys.executable, "-c", CODE, *FIT], cwd=place, env=environment, capture_output=True, text=True, check=True
    )
    assert [line for line in ended.stdout.splitlines() if line.startswith("status")] == [
        "status 0",
        "status 2",
        "status 0",
    ], ended.stderr
    assert list(place.glob("runs/sft/version_0/hf/model.safetensors"))
    return [set(line.split()[1:]) for line in ended.stdout.splitlines() if line.startswith("held")]


def test_help_needs_nothing(held: list[set[str]]) -> None:
    assert not {"torch", "lightning", "transformers", "numpy", "jsonargparse"} & held[0]


def test_a_wrong_key_waits_for_no_rows_and_no_adapters(held: list[set[str]]) -> None:
    assert "lightning" in held[1]
    assert not {"peft", "bitsandbytes", "wandb", "tensorboard", "datasets", "pyarrow"} & held[1]


def test_a_run_makes_its_step_without_loggers_it_has_not(held: list[set[str]]) -> None:
    """peft is there all the same: transformers' schedules bring it."""
    assert {"torch", "pyarrow", "transformers.models.llama.modeling_llama"} <= held[2]
    assert not {"wandb", "tensorboard", "sklearn", "vllm", "datasets", "pandas"} & held[2]


def test_of_the_parsers_that_lightning_has_one_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    make = RunCLI._prepare_subcommand_parser

    def recorded(cli: RunCLI, klass: type, subcommand: str, **options: Any) -> Any:
        made.append(subcommand)
        return make(cli, klass, subcommand, **options)

    monkeypatch.setattr(RunCLI, "_prepare_subcommand_parser", recorded)
    assert main(["validate", "--help"]) == 0
    assert made == ["validate"]
