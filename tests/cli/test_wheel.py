"""The package as a newcomer has it: a wheel, made from the source package, in an empty folder without a checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SOURCES = ("rlhf_lit", "configs", "sweeps", "pyproject.toml", "setup.py", "README.md", "LICENSE")
WORLD = "--world.demonstrations=1000 --world.prompts=200 --world.held_out=80"
CODE = """
import sys, shlex
from pathlib import Path
import rlhf_lit
from rlhf_lit.__main__ import main

assert Path(rlhf_lit.__file__).is_relative_to(sys.path[1]), rlhf_lit.__file__  # sys.path[0] is the working folder
for command in sys.argv[1:]:
    if status := main(shlex.split(command)):
        sys.exit(status)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the source package alone, so that both hold all they should."""
    place = tmp_path_factory.mktemp("build")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, place / "source" / name)
    build = "import sys, setuptools.build_meta as backend; backend.build_sdist(sys.argv[1])"
    packed = [sys.executable, "-c", build, str(place)]
    subprocess.run(packed, cwd=place / "source", check=True, capture_output=True)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, f"--wheel-dir={place}", str(next(place.glob("*.tar.gz")))], check=True, capture_output=True)
    return next(place.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the wheel was installed into."""
    target = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", f"--target={target}", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    return target


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("empty")


@pytest.fixture(scope="module")
def rlhf_lit(installed: Path, empty: Path) -> Callable[..., str]:
    """``rlhf_lit("fit …", "sweep …")``: commands of the wheel, one after another in one process in the empty folder."""

    def call(*commands: str) -> str:
        # The environment's own site-packages may name the checkout, but come after the path.
        environment = {**os.environ, "PYTHONPATH": str(installed), "HOME": str(empty), "CUDA_VISIBLE_DEVICES": ""}
        words = [sys.executable, "-c", CODE, *commands]
        ended = subprocess.run(words, cwd=empty, env=environment, capture_output=True, text=True)
        assert ended.returncode == 0, ended.stderr
        assert str(ROOT / "configs") not in ended.stdout + ended.stderr
        return ended.stdout

    return call


def test_the_wheel_holds_the_package_its_data_and_all_that_is_shipped(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if not name.split("/")[0].endswith(".dist-info")}
    ours = {path for path in (ROOT / "rlhf_lit").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    shipped = {path for kind in ("configs", "sweeps") for path in (ROOT / kind).rglob("*.yaml")}
    assert held == {path.relative_to(ROOT).as_posix() for path in ours} | {
        f"rlhf_lit/{path.relative_to(ROOT).as_posix()}" for path in shipped
    }


def test_names_and_a_copy(rlhf_lit: Callable[..., str], empty: Path) -> None:
    listed = rlhf_lit("configs")
    for path in (ROOT / "configs").rglob("*.yaml"):
        assert f"\n  {path.relative_to(ROOT / 'configs').with_suffix('')}  " in listed
    assert rlhf_lit("configs copy dpo/qwen_0.5b copies/mine.yaml") == "copies/mine.yaml\n"
    assert (empty / "copies" / "mine.yaml").read_bytes() == (ROOT / "configs/dpo/qwen_0.5b.yaml").read_bytes()


def test_training_and_a_sweep_from_short_names(rlhf_lit: Callable[..., str], empty: Path) -> None:
    """One run and the arms of a sweep: configs, overlays, and the configs that a sweep file itself names."""
    few = WORLD.replace("--world", "--data.train.world")
    said = rlhf_lit(
        f"fit --config sft/quickstart --config=overlays/debug.yaml {few}",
        "sweep dpo_beta --count=2 --dry-run",
    ).splitlines()
    assert any("model runs/quickstart/sft/version_0/hf" in line for line in said)
    record = yaml.safe_load((empty / "runs/quickstart/sft/version_0/config.yaml").read_text())
    assert record["trainer"]["max_steps"] == 2
    assert record["model"]["init_args"]["learning_rate"] == 0.003
    arms = [line for line in said if "--runs=runs/sweeps/dpo_beta" in line]
    assert len(arms) == 2
    assert all("--config configs/dpo/quickstart.yaml --config configs/overlays/wandb.yaml" in arm for arm in arms)


@pytest.mark.soak
def test_the_quickstart_and_an_arm_of_a_sweep(rlhf_lit: Callable[..., str], empty: Path) -> None:
    """All four stages, the scoreboard, and what the README has typed after them."""
    (empty / "few.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 32, "limit_val_batches": 1}}))
    said = rlhf_lit(
        f"quickstart --overlays overlays/16gb few {WORLD}",
        "sweep dpo_beta --count=1",
        "evaluate runs/quickstart/dpo --config evaluate/quickstart --prompts.limit=4",
    )
    assert "held-out pairs" in said
    assert "1 of 1 arms finished" in said
    assert list((empty / "runs/evaluate").glob("*/evaluation.json"))
    assert (empty / "runs/quickstart/scoreboard.json").is_file()
