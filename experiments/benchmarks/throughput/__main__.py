"""Ours against a peer, in turns, on the same weights and the same batches. See ../RESULTS.md.

python -m experiments.benchmarks.throughput --task sft --peer trl
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path

import torch

from experiments.benchmarks.throughput.workload import SHAPES, TASKS, Measured, Workload, save_model

HERE = "experiments.benchmarks.throughput"
SETTINGS = {"trl": ("defaults", "plain")}


@dataclass(frozen=True)
class Pair:
    """One turn of both sides."""

    ours: Measured
    peer: Measured

    @property
    def speed(self) -> float:
        """How often our steps go into the peer's time."""
        return self.peer.seconds / self.ours.seconds

    @property
    def memory(self) -> float:
        """Our peak by the peer's."""
        return self.ours.peak / self.peer.peak


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--peer", choices=tuple(SETTINGS), default="trl")
    parser.add_argument("--pairs", type=int, default=5, help="turns of both sides (5)")
    parser.add_argument("--data", default="data/hh_harmless.jsonl.gz", help="a file of preference pairs")
    parser.add_argument("--folder", default="runs/benchmarks", help="where model and results stand")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="7m")
    parser.add_argument("--peer-python", default=sys.executable, help="the peer's interpreter, if it is another one")
    defaults = {field.name: field.default for field in fields(Workload)}
    for name in ("steps", "batch_size", "max_length", "micro_batch_tokens"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=defaults[name])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    given = vars(parser.parse_args())
    peer, turns, python = given.pop("peer"), given.pop("pairs"), given.pop("peer_python")
    workload = Workload(pairs=given.pop("data"), **given)
    Path(workload.folder).mkdir(parents=True, exist_ok=True)
    if not Path(workload.model, "config.json").exists():
        save_model(workload)
    file = workload.save()
    side(sys.executable, "ours", file)  # writes the peer's batches; its time includes no cache
    found: dict[str, list[Pair]] = {setting: [] for setting in SETTINGS[peer]}
    for turn in range(turns):
        for setting, pairs in found.items():
            ours = side(sys.executable, "ours", file)
            theirs = side(python, f"{peer}_peer", file, setting)
            pairs.append(Pair(ours, theirs))
            print(f"{turn + 1}/{turns} {setting}: {pairs[-1].speed:.2f} ×, memory {pairs[-1].memory:.2f} ×", flush=True)
    print(table(workload, peer, found))


def side(python: str, name: str, file: Path, *words: str) -> Measured:
    """One process of one side."""
    result = file.with_name("measured.json")
    done = subprocess.run(
        [python, "-m", f"{HERE}.{name}", str(file), str(result), *words],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr.strip().rpartition(chr(10))[2]}")
    return Measured(**json.loads(result.read_text()))


def table(workload: Workload, peer: str, found: dict[str, list[Pair]]) -> str:
    """Medians over the turns, and the spread of the ratios."""
    tokens = workload.timed_tokens()
    card = (
        torch.cuda.get_device_name() if workload.device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    )
    head = [
        f"{workload.task}, {workload.shape}, {workload.precision}, batches of {workload.batch_size}, "
        f"{tokens / workload.steps:.0f} real tokens a step, {workload.steps} steps; {card}; torch {torch.__version__}, "
        f"{peer} {version(peer)}, transformers {version('transformers')}",
        "",
        f"| against | ours, tokens/s | {peer}, tokens/s | faster: median (least–most) | ours, GB | {peer}, GB | "
        "memory | largest difference of a step's loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for setting, pairs in found.items():
        ours, theirs = ([getattr(pair, name) for pair in pairs] for name in ("ours", "peer"))
        speeds = [pair.speed for pair in pairs]
        rate = [statistics.median(tokens / one.seconds for one in of) for of in (ours, theirs)]
        peak = [statistics.median(one.peak for one in of) / 1e9 for of in (ours, theirs)]
        apart = max(
            abs(a - b) / abs(b) for pair in pairs for a, b in zip(pair.ours.losses, pair.peer.losses, strict=True)
        )
        head.append(
            f"| {peer}, {setting} | {rate[0]:.0f} | {rate[1]:.0f} | {statistics.median(speeds):.2f} "
            f"({min(speeds):.2f}–{max(speeds):.2f}) | {peak[0]:.2f} | {peak[1]:.2f} | "
            f"{statistics.median(pair.memory for pair in pairs):.2f} | {apart:.1e} |"
        )
    return "\n".join(head)


if __name__ == "__main__":
    main()
