"""The commands that README, docs/, the READMEs of experiments and the heads of configs and sweeps have one type."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
EXTENDING = [*sorted((ROOT / "docs").glob("add_a*.md")), ROOT / "docs" / "extending.md"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPERIMENTS = sorted((ROOT / "experiments").rglob("README.md"))
CONFIGS = sorted([*ROOT.glob("configs/*/*.yaml"), *ROOT.glob("sweeps/*.yaml")])
PROGRAM = ["python", "-m", "rlhf_lit"]


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```\n", "", page.read_text(), flags=re.S | re.M)


def spans(page: Path) -> list[str]:
    """What stands between backticks, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.S | re.M)


def commands(text: str) -> list[str]:
    """The commands of a shell text, comments and `&&` taken apart."""
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


def commands_of(page: Path) -> list[str]:
    """What a page asks to be typed, in blocks and in its text."""
    typed = [command for block in blocks(page, "sh") for command in commands(block)]
    return typed + [span for span in spans(page) if span.startswith(("python -m", "rlhf-lit ", "make ", "pip install"))]


def commands_in(config: Path) -> list[str]:
    """The commands of the comment at the head of a config or a sweep."""
    lines = [line.removeprefix("#").strip() for line in config.read_text().splitlines() if line.startswith("#")]
    return [command for command in commands("\n".join(lines)) if command.startswith("python -m rlhf_lit")]


def _where() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for page in [*PAGES, *EXPERIMENTS]:
        if page not in EXTENDING:  # whose commands need the files of their page: test_docs runs them there
            for command in commands_of(page):
                found.setdefault(command, []).append(page)
    for config in CONFIGS:
        for command in commands_in(config):
            found.setdefault(command, []).append(config)
    return found


# Each command → the files that it stands in.
TYPED = _where()


def words_of(command: str) -> list[str] | None:
    """What follows ``python -m rlhf_lit``, or ``rlhf-lit``, in a command; None where it calls something else."""
    words = shlex.split(command)
    if words[0] == "rlhf-lit":
        return words[1:]
    return words[3:] if words[:3] == PROGRAM else None


# Commands of this program that this environment cannot carry out: vLLM has one of its own, which `make vllm` tests.
NOT_RUN = [
    "python -m rlhf_lit evaluate MODEL --prompts.path=FILE --judge=RewardFromModel --judge.path=RUN --samples=64 "
    "--best_of=[1,8,64] --vllm.gpu_memory_utilization=0.6",
    "python -m rlhf_lit fit --config configs/ppo/qwen_0.5b.yaml --config configs/overlays/vllm.yaml",
]
RUN = [command for command in sorted(TYPED) if words_of(command) is not None and command not in NOT_RUN]


# What makes a command long: a sweep's arms, all stages, the 4 bits of large models, a search, many samples.
LONG = ("sweep", "rlhf-lit quickstart", "llama-", "llama_", "--limit_gb", "reports/two")


def _first(command: str) -> bool:
    """Whether it stands on a page, and not at a config's head alone, and is short."""
    long = any(part in command for part in LONG) and "--dry-run" not in command
    return bool({*PAGES} & {*TYPED[command]}) and not long


# Run by `make test`, and by `make soak`.
FIRST = [command for command in RUN if _first(command)]
LATER = [command for command in RUN if not _first(command)]
