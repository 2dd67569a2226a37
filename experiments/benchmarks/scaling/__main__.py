"""Seconds of a step and peak memory against length, batch, vocabulary and size, ours and a peer's in turns.

python -m experiments.benchmarks.scaling --axis length

Rows are random tokens of exactly one length, the second half the response. `--axis logits` varies batch, length and
vocabulary together: what holds the logits of a whole batch grows with their product.
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

import torch

from experiments.benchmarks.scaling.axes import AXES, DEFAULTS, NAMES, NOTHING, POINTS, Axis, Point, points
from experiments.benchmarks.scaling.table import Costs, Side, foreseen, table
from experiments.benchmarks.throughput.__main__ import side
from experiments.benchmarks.throughput.workload import Measured, Workload, save_model

PEERS = {"trl": ("trl_peer", "defaults")}


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axis", choices=AXES, required=True)
    parser.add_argument("--task", choices=("sft", "dpo"), default="sft")
    parser.add_argument("--peer", choices=(*PEERS, "none"), default="trl")
    parser.add_argument("--points", nargs="+", help="of the axis: numbers, names of shapes, 8x256x32768 for logits")
    parser.add_argument("--turns", type=int, default=3, help="turns of both sides (3)")
    parser.add_argument("--most-gb", type=float, default=10, help="a peer's point foreseen above this is left out (10)")
    parser.add_argument("--data", default="data/hh_harmless.jsonl.gz", help="preference pairs, for the tokenizer alone")
    parser.add_argument("--folder", default="runs/benchmarks", help="where models and results stand")
    parser.add_argument("--shape", help="hidden-intermediate-layers-heads-kv_heads, and -vocabulary where it is fixed")
    for name in ("batch_size", "row_tokens", "micro_batch_tokens", "steps", "warm_up"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed"), default="32-true")
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    axis, peer, turns, most = given.pop("axis"), given.pop("peer"), given.pop("turns"), given.pop("most_gb")
    texts = given.pop("points", POINTS[axis])
    if varied := {"shape", "batch_size", "row_tokens"} & set(given) - set(DEFAULTS[axis]):
        parser.error(f"--{min(varied).replace('_', '-')} is what --axis {axis} varies: set it by --points")
    common = Workload(pairs=given.pop("data"), **{"steps": 3, "warm_up": 1} | DEFAULTS[axis] | given)
    try:
        found = points(axis, texts, common)
    except ValueError as error:
        parser.error(f"--points: {error}")
    print(f"{described(axis, common, peer)}\n\n{table(NAMES[axis], found, measure(found, peer, turns, most * 1e9))}")


def measure(found: list[Point], peer: str, turns: int, most: float) -> list[Side]:
    """Both sides at all points, in turns, each time a process of its own.

    Args:
        found: the points, the smallest first.
        peer: of ``PEERS``, or none.
        turns: how often.
        most: bytes: the peer isn't run where it is foreseen to need more.
    """
    how = [("ours", ("ours", "plain"))] + ([(peer, PEERS[peer])] if peer != "none" else [])
    base = Workload(**vars(found[0].workload) | NOTHING)
    sides = [Side(name, run(base, *what).peak, [Costs() for _ in found]) for name, what in how]
    for turn in range(turns):
        for index, point in enumerate(found):
            for one, (_, what) in zip(sides, how, strict=True):
                cost = one.costs[index]
                if one.name != "ours" and not turn and too_large(one, found, index, most):
                    cost.why_not = f"not run: needs > {most / 1e9:g} GB by the growth so far"
                if cost.why_not is None:
                    cost.measured.append(run(point.workload, *what))
                    last = cost.measured[-1]
                    words = f"{last.seconds / point.workload.steps:.3g} s a step, {last.peak / 1e9:.2f} GB"
                    print(f"{turn + 1}/{turns} {point.label} {one.name}: {words}", flush=True)
    return sides


def too_large(one: Side, found: list[Point], index: int, most: float) -> bool:
    """Whether the side's peak at this point will be above the limit, judged by the points before it."""
    if not index:
        return False
    if one.costs[index - 1].why_not:
        return True
    sizes = [point.size for point in found[:index]]
    above = [cost.peak - one.base for cost in one.costs[:index]]
    return one.base + foreseen(sizes, above, found[index].size) > most


def run(workload: Workload, module: str, setting: str) -> Measured:
    """One process of one side; our side writes the batches that the peer reads."""
    Path(workload.folder).mkdir(parents=True, exist_ok=True)
    if not Path(workload.model, "config.json").exists():
        save_model(workload)
    return side(module, workload.save(), setting)


def described(axis: Axis, common: Workload, peer: str) -> str:
    """What the table is of."""
    words = [f"{name.replace('_', ' ')} {getattr(common, name)}" for name in DEFAULTS[axis]]
    card = torch.cuda.get_device_name() if common.device == "cuda" else f"{os.cpu_count()} cores, {platform.machine()}"
    against = f", {peer} {version(peer)} at its defaults" if peer != "none" else ""
    return (
        f"{common.task} by {axis}: {', '.join(words)}; {common.precision}, {common.steps} steps; {card}; torch "
        f"{torch.__version__}, transformers {version('transformers')}{against}"
    )


if __name__ == "__main__":
    main()
