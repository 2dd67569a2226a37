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
from dataclasses import dataclass
from importlib.metadata import distributions, version
from pathlib import Path

import torch

from experiments.benchmarks.throughput.workload import SHAPES, TASKS, Measured, Workload, save_model

HERE = "experiments.benchmarks.throughput"
# Our settings against the peer's: ``ours`` and ``trl_peer`` say what they are. Each side runs once a turn in each.
TURNS = {
    "sft": (("plain", "defaults"), ("plain", "grouped")),
    "reward": (("plain", "defaults"), ("plain", "grouped")),
    "dpo": (("plain", "defaults"), ("plain", "grouped"), ("cached", "defaults"), ("cached", "grouped")),
    "ppo": (("plain", "plain"), ("trunk", "plain")),
    "generate": (("plain", "plain"), ("samples", "samples")),
}
OTHERS = {  # than a workload's own defaults
    "ppo": {"batch_size": 16, "max_length": 128, "steps": 3, "warm_up": 1},  # rollouts of 64 episodes
    "generate": {"batch_size": 64, "max_length": 128, "steps": 3, "warm_up": 1},
}
PEERS = {"ppo": "trl_ppo_peer", "generate": "trl_generate_peer"}
# On a GPU: larger batches, and the peer's fastest settings alone.
GPU_TURNS = {
    "sft": (("plain", "grouped"), ("plain", "liger")),
    "reward": (("plain", "grouped"),),
    "dpo": (("plain", "grouped"), ("plain", "liger")),
}
GPU = {"batch_size": 32, "micro_batch_tokens": 16_384}
GPU_OTHERS = {"dpo": {"batch_size": 16}, "reward": {"batch_size": 16}}
PEAKS = {"H100": 989e12, "H200": 989e12}  # dense bf16 products of the SXM parts by NVIDIA's datasheets, FLOP/s


class Failed(Exception):
    """A side's process ended in an error."""


@dataclass(frozen=True)
class Pair:
    """One turn of both sides."""

    ours: Measured
    peer: Measured

    @property
    def speed(self) -> float:
        """What we do in the time in which the peer does one of it."""
        return self.ours.rate / self.peer.rate

    @property
    def memory(self) -> float:
        """Our peak by the peer's."""
        return self.ours.peak / self.peer.peak


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--peer", choices=("trl",), default="trl")
    parser.add_argument("--pairs", type=int, default=5, help="turns of both sides (5)")
    parser.add_argument("--data", default="data/hh_harmless.jsonl.gz", help="a file of preference pairs")
    parser.add_argument("--folder", default="runs/benchmarks", help="where model and results stand")
    parser.add_argument("--shape", choices=tuple(SHAPES), default="7m")
    parser.add_argument(
        "--peer-path",
        help="a folder of `pip install --no-deps --target`, for another version of the peer: PPO needs 1.12.0",
    )
    for name in ("steps", "warm_up", "batch_size", "max_length", "micro_batch_tokens", "peer_rows"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    parser.add_argument("--qlora", action="store_true", help="SFT of adapters on a base in 4 bits")
    parser.add_argument("--settings", nargs="+", metavar="OURS:PEERS", help="such as plain:grouped, for the usual ones")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    peer, turns, path = given.pop("peer"), given.pop("pairs"), given.pop("peer_path", None)
    task, on_gpu, chosen = given["task"], given["device"] == "cuda", given.pop("settings", None)
    usual = OTHERS.get(task, {}) | (GPU | GPU_OTHERS.get(task, {}) if on_gpu else {})
    settings = GPU_TURNS.get(task, TURNS[task]) if on_gpu else TURNS[task]
    if chosen:
        settings = tuple((own, other) for own, _, other in (pair.partition(":") for pair in chosen))
    workload = Workload(pairs=given.pop("data"), **usual | given)
    Path(workload.folder).mkdir(parents=True, exist_ok=True)
    save_model(workload)
    file = workload.save()
    module = PEERS.get(workload.task, "trl_peer")
    found: dict[tuple[str, str], list[Pair]] = {pair: [] for pair in settings}
    for own in dict.fromkeys(own for own, _ in found):
        if not on_gpu or own == "cached":  # a GPU's peak holds nothing of the reading of a file
            side("ours", file, own)  # fills the caches
    for turn in range(turns):
        measured: dict[tuple[str, str], Measured] = {}  # what stands in two pairs is measured once
        for (own, other), pairs in list(found.items()):
            try:
                for key, where in ((("ours", own), None), ((module, other), path)):
                    if key not in measured:
                        measured[key] = side(key[0], file, key[1], where)
            except Failed as error:
                print(f"{own} against {other} is left out: {error}", flush=True)
                del found[own, other]
                continue
            pairs.append(Pair(measured["ours", own], measured[module, other]))
            ratios = f"{pairs[-1].speed:.2f} ×, memory {pairs[-1].memory:.2f} ×"
            print(f"{turn + 1}/{turns} {own} against {other}: {ratios}", flush=True)
    if not found:
        raise SystemExit("nothing was measured")
    print(table(workload, peer, installed(peer, path), found))


def side(module: str, file: Path, setting: str, path: str | None = None) -> Measured:
    """One process of one side."""
    result = file.with_name("measured.json")
    found = [path] if path else []
    found += [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    done = subprocess.run(
        [sys.executable, "-m", f"{HERE}.{module}", str(file), str(result), setting],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(found)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        log = file.with_name(f"{module}_{setting}.log")
        log.write_text(done.stderr)
        raise Failed(f"{module}: {done.stderr.strip().rpartition(chr(10))[2]} ({log})")
    return Measured(**json.loads(result.read_text()))


def installed(peer: str, path: str | None) -> str:
    """The peer's version."""
    if path is None:
        return version(peer)
    return next(one.version for one in distributions(path=[path]) if one.name == peer)


def table(workload: Workload, peer: str, release: str, found: dict[tuple[str, str], list[Pair]]) -> str:
    """Medians over the turns, and the spread of the ratios."""
    unit = {"ppo": "episodes", "generate": "new tokens"}.get(workload.task, "tokens")
    amount = next(iter(found.values()))[0].ours.amount
    card = (
        torch.cuda.get_device_name() if workload.device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    )
    peak_rate = next((rate for name, rate in PEAKS.items() if name in card), None)
    shares: list[str] = []
    head = [
        f"{workload.task}, {workload.shape}, {workload.precision}, batches of {workload.batch_size}, "
        f"{amount / workload.steps:.0f} {unit} a step, {workload.steps} steps; {card}; torch {torch.__version__}, "
        f"{peer} {release}, transformers {version('transformers')}",
        "",
        f"| ours | {peer} | ours, {unit}/s | {peer}, {unit}/s | faster: median (least–most) | ours, GB | {peer}, GB | "
        "memory | largest difference of a step's loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for (own, other), pairs in found.items():
        ours, theirs = ([getattr(pair, name) for pair in pairs] for name in ("ours", "peer"))
        speeds = [pair.speed for pair in pairs]
        rate = [statistics.median(one.rate for one in of) for of in (ours, theirs)]
        peak = [statistics.median(one.peak for one in of) / 1e9 for of in (ours, theirs)]
        compared = [pair for pair in pairs if pair.peer.losses]
        apart = [abs(a - b) / abs(b) for p in compared for a, b in zip(p.ours.losses, p.peer.losses, strict=True)]
        head.append(
            f"| {own} | {other} | {rate[0]:.3g} | {rate[1]:.3g} | {statistics.median(speeds):.2f} "
            f"({min(speeds):.2f}–{max(speeds):.2f}) | {peak[0]:.2f} | {peak[1]:.2f} | "
            f"{statistics.median(pair.memory for pair in pairs):.2f} | {f'{max(apart):.1e}' if apart else '–'} |"
        )
        if peak_rate and workload.products_per_token:
            shares.append(
                f"{own}, {other}: {' and '.join(f'{of * workload.products_per_token / peak_rate:.1%}' for of in rate)} "
                f"of {peak_rate / 1e12:.0f} TFLOP/s, at {workload.products_per_token / 1e9:.2f} GFLOP a token"
            )
    return "\n".join([*head, "", *shares])


if __name__ == "__main__":
    main()
