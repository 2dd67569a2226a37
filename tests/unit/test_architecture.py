"""Who may import whom, read from the source: the rooms of the package and the doors between them."""

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import rlhf_lit

PACKAGE = Path(rlhf_lit.__file__).parent
MODELS = {"torch", "transformers", "peft", "safetensors", "numpy", "bitsandbytes"}
TOOLS = {"evaluation", "export", "memory", "preflight", "report", "sweep", "trainer"}

# The rooms, low to high: room → (rooms and modules of ours that it may import, packages from outside).
GROUND = {"errors", "files", "randomness"}
BATCHES = {*GROUND, "runs", "losses", "batches"}
# The one door to sharding, which itself imports models.anatomy alone: models and rollout may go through it.
SHARDING = "parallel.sharding"
BELOW_ROLLOUT = {*BATCHES, "models", "training", "parallel", "playground", "reference_cache"}
BELOW_TOOLS = {*BELOW_ROLLOUT, "rollout", "data", "algorithms"}
ALLOWED: dict[str, tuple[set[str], set[str]]] = {
    "errors": (set(), set()),
    "files": ({"errors"}, {"yaml"}),
    "randomness": (set(), {"torch", "numpy"}),
    "runs": (GROUND, set()),
    "losses": (set(), {"torch"}),
    "batches": ({"errors", "losses.reductions"}, {"torch"}),
    "models.anatomy": (GROUND, MODELS),
    SHARDING: ({*GROUND, "models.anatomy"}, MODELS),
    "models": ({*BATCHES, "models.anatomy", SHARDING}, MODELS | {"lightning"}),
    "parallel": ({*GROUND, "runs", "models", SHARDING}, {"torch"}),
    "training": ({*BATCHES, "models", "parallel"}, MODELS | {"lightning", "torchmetrics"}),
    "playground": (GROUND, {"transformers", "tokenizers", "torch"}),
    "reference_cache": (
        {*GROUND, "batches", "models"},
        {"torch", "numpy", "peft", "pyarrow", "xxhash", "filelock", "rich"},
    ),
    "rollout": (
        {*BATCHES, "models", SHARDING},
        MODELS
        | {"vllm", "math_verify", "if_verifiable", "langdetect", "nltk", "pysbd", "reasoning_gym", "vaderSentiment"},
    ),
    "data": (
        {*GROUND, "runs", "batches", "playground", "rollout.loop"},
        {
            "torch",
            "filelock",
            "numpy",
            "transformers",
            "tokenizers",
            "datasets",
            "pyarrow",
            "lightning",
            "jinja2",
            "rich",
            "xxhash",
            "reasoning_gym",
        },
    ),
    "algorithms": (BELOW_TOOLS - {"data"}, MODELS | {"lightning", "torchmetrics"}),
    **{tool: (BELOW_TOOLS | TOOLS, set()) for tool in sorted(TOOLS)},
    "commands": (BELOW_TOOLS | TOOLS, set()),
    "__main__": ({"errors"}, set()),
}
ANYTHING = {*TOOLS, "commands"}  # what these import from outside is not held here
LINES = 400


def name_of(file: Path) -> str:
    """Dotted, within the package: ``models.loading``; a folder's own ``__init__`` has the folder's name."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imports(file: Path) -> Iterator[str]:
    """Dotted names of every module a file imports, inside functions too; relative ones made absolute."""
    package = [PACKAGE.name, *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (stem, node.module) if part)
            for alias in node.names:  # a module of a package of ours, or something in a module
                inner = f"{module}.{alias.name}".removeprefix(f"{PACKAGE.name}.")
                yield f"{PACKAGE.name}.{inner}" if inner in files() else module


@cache
def files() -> dict[str, Path]:
    """Every file of the package by its dotted name."""
    return {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def within(module: str, rooms: set[str]) -> bool:
    """Whether a module is one of some rooms, or in one of them."""
    return any(module == room or module.startswith(f"{room}.") for room in rooms)


def room_of(module: str) -> str:
    """Where a module stands in the table: by itself, or with its folder."""
    return module if module in ALLOWED else module.split(".")[0]


@pytest.mark.parametrize("room", ALLOWED)
def test_a_room_imports_only_what_it_may(room: str) -> None:
    ours, outside = ALLOWED[room]
    own = {module: file for module, file in files().items() if room_of(module) == room}
    assert own
    wrong = []
    for module, file in own.items():
        for name in imports(file):
            top, *rest = name.split(".")
            inner = ".".join(rest)
            if top == PACKAGE.name:
                fine = not inner or room_of(inner) == room or within(inner, ours)
            else:
                fine = room in ANYTHING or top in outside or top in sys.stdlib_module_names
            if not fine:
                wrong.append(f"{module} imports {name}")
    assert not wrong


def test_every_room_is_in_the_table() -> None:
    assert {room_of(module) for module in files()} - set(ALLOWED) == {"__init__"}


def graph() -> dict[str, set[str]]:
    """Which files import which, by dotted names."""
    prefix = f"{PACKAGE.name}."
    return {
        module: {name.removeprefix(prefix) for name in imports(file) if name.removeprefix(prefix) in files()} - {module}
        for module, file in files().items()
    }


def circles(edges: dict[str, set[str]]) -> list[set[str]]:
    """Sets of nodes, each of which reaches all others of its set."""
    reached = {}
    for start in edges:
        seen, left = set(), [start]
        while left:
            for following in edges[left.pop()] - seen:
                seen.add(following)
                left.append(following)
        reached[start] = seen
    found = [{node, *(other for other in reached[node] if node in reached[other])} for node in edges]
    return [one for i, one in enumerate(found) if len(one) > 1 and one not in found[:i]]


def test_no_circle_between_files() -> None:
    assert not circles(graph())


def test_no_circle_between_the_tools_folders() -> None:
    rooms = TOOLS | {"commands"}
    edges: dict[str, set[str]] = {room: set() for room in rooms}
    for module, others in graph().items():
        own = room_of(module)
        if own in rooms:
            edges[own] |= {room_of(other) for other in others} & (rooms - {own})
    assert not circles(edges)


def test_a_circle_would_be_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == [{"b", "c"}]


def test_the_root_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_files_can_be_read_at_a_sitting() -> None:
    lines = {module: len(file.read_text().splitlines()) for module, file in files().items()}
    limits = {"algorithms": 260, "algorithms.algorithm": 220}
    long = {
        module: count
        for module, count in lines.items()
        if count > limits.get(module, limits.get(module.split(".")[0], LINES + 1) - 1)
    }
    assert not long


def test_no_algorithm_imports_another() -> None:
    """What they share is in the files that define no algorithm one trains with."""
    shared = {"__init__", "algorithm", "policy", "offline", "on_policy"}
    names = {file.stem for file in (PACKAGE / "algorithms").glob("*.py")} - shared
    assert {"sft", "reward_model", "dpo", "kto", "ppo", "rloo", "grpo"} <= names
    for name in names:
        others = {f"algorithms.{other}" for other in names - {name}}
        assert not others & graph()[f"algorithms.{name}"]


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


def test_one_place_prints() -> None:
    """So that nothing a row or a model says acts on a terminal: the others say, tell and hand over."""
    printing = {
        file.relative_to(PACKAGE).as_posix()
        for file in PACKAGE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write", "sys.stdout.writelines")
    }
    assert printing == {"errors.py", "__main__.py"}


def test_one_room_generates() -> None:
    assert calls("generate") == {"rollout/engine.py", "rollout/vllm_engine.py"}


def test_hyper_parameters_are_never_saved() -> None:
    assert not calls("save_hyperparameters")


def test_no_utils() -> None:
    assert not [module for module in files() if "utils" in module.split(".")]


def hands_on(function: ast.FunctionDef) -> bool:
    """Whether ``**keywords`` of an ``__init__`` go to ``super().__init__`` as they are.

    jsonargparse then finds the parent's parameters, with their types; a key that nobody has is still refused.
    """
    assert function.args.kwarg is not None
    return function.name == "__init__" and any(
        isinstance(node, ast.Call)
        and ast.unparse(node.func) == "super().__init__"
        and any(word.arg is None and ast.unparse(word.value) == function.args.kwarg.arg for word in node.keywords)
        for node in ast.walk(function)
    )


@pytest.mark.parametrize("room", ["algorithms", "losses", "rollout", "data"])
def test_no_swallowed_keywords(room: str) -> None:
    for file in (PACKAGE / room).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None:
                assert hands_on(node), f"{file}: {node.name} takes **{node.args.kwarg.arg}"


def test_keywords_that_are_swallowed_would_be_found() -> None:
    def function(body: str) -> ast.FunctionDef:
        node = ast.parse(f"class A:\n    def __init__(self, a, **keywords):\n        {body}").body[0].body[0]  # type: ignore[attr-defined]
        assert isinstance(node, ast.FunctionDef)
        return node

    assert hands_on(function("super().__init__(a, **keywords)"))
    assert not hands_on(function("super().__init__(a)"))
    assert not hands_on(function("self.rest = keywords"))
