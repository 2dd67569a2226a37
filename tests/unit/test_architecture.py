"""Who may import whom, read from the source: the rooms of the package and the doors between them."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import rlhf_lit

PACKAGE = Path(rlhf_lit.__file__).parent
TEXT = {"torch", "transformers", "peft", "numpy", "bitsandbytes"}

# Room → (rooms and modules of ours it may use, packages from outside).
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "batches": ({"cutting"}, {"torch"}),
    "cutting": (set(), {"torch"}),
    "errors": (set(), set()),
    "heap": (set(), set()),
    "randomness": (set(), {"torch", "numpy"}),
    "runs": ({"errors"}, set()),
    "losses": ({"batches"}, {"torch"}),
    "models": ({"batches", "errors", "losses", "runs"}, TEXT),
    "reference_cache": (
        {"batches", "cutting", "errors", "models"},
        {"torch", "numpy", "peft", "pyarrow", "xxhash", "filelock", "rich"},
    ),
    "rollout": ({"batches", "cutting", "errors", "losses", "models", "randomness"}, TEXT | {"vllm"}),
    "data": (
        {"batches", "errors", "randomness", "runs"},
        {
            "torch",
            "numpy",
            "transformers",
            "tokenizers",
            "datasets",
            "pyarrow",
            "lightning",
            "jinja2",
            "rich",
            "xxhash",
        },
    ),
    "algorithms": (
        {
            "batches",
            "cutting",
            "errors",
            "heap",
            "losses",
            "models",
            "reference_cache",
            "rollout",
            "randomness",
            "runs",
        },
        TEXT | {"lightning", "torchmetrics"},
    ),
}
ALGORITHMS = {"sft", "reward_model", "ppo", "rloo", "grpo", "dpo"}


def imports(file: Path) -> Iterator[str]:
    """Dotted names of every module a file imports, inside functions too; relative ones made absolute."""
    package = [PACKAGE.name, *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (stem, node.module) if part)
            if module == PACKAGE.name:
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def files(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    ours, outside = ALLOWED[room]
    assert files(room)
    for file in files(room):
        for name in imports(file):
            top, *rest = name.split(".")
            if top == PACKAGE.name:
                assert rest[0] == room or rest[0] in ours, f"{file.name} imports {name}"
            else:
                assert top in outside or top in sys.stdlib_module_names, f"{file.name} imports {name}"


def test_no_algorithm_imports_another() -> None:
    for algorithm in ALGORITHMS:
        others = {f"rlhf_lit.algorithms.{other}" for other in ALGORITHMS - {algorithm}}
        assert not others & set(imports(PACKAGE / "algorithms" / f"{algorithm}.py"))


def test_the_package_never_imports_its_experiments_or_peers() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert not {"experiments", "tests", "trl"} & {name.split(".")[0] for name in imports(file)}, file


def calls(name: str) -> set[str]:
    """Files in which an attribute of that name is called."""
    found = set()
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == name:
                found.add(file.relative_to(PACKAGE).as_posix())
    return found


def test_one_room_generates() -> None:
    assert calls("generate") == {"rollout/engine.py", "rollout/vllm_engine.py"}


def test_hyper_parameters_are_never_saved() -> None:
    assert not calls("save_hyperparameters")


def test_no_utils_and_no_swallowed_keywords() -> None:
    for file in PACKAGE.rglob("*.py"):
        assert file.stem != "utils"
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and file.parent.name in ("algorithms", "losses", "rollout"):
                assert node.args.kwarg is None, f"{file}: {node.name} takes **{node.args.kwarg.arg}"
