"""Rows per second from a file to tokens on disk, ours and `datasets.map` as TRL uses it in turns. See ../RESULTS.md.

    python -m experiments.benchmarks.loading                                     both, in three shapes
    python -m experiments.benchmarks.loading --large 1000000 --start             ours alone: time, memory, second start

With one worker the process is held to one core; tokenizers' own threads are off on both sides.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.benchmarks.loading.rows import SHAPES, save_tokenizer, write_rows
from experiments.benchmarks.startup import measure
from experiments.benchmarks.startup import ours as command

HERE = "experiments.benchmarks.loading"
TOKENS = {"prompt": 100, "messages": 150, "pairs": 100}


@dataclass(frozen=True)
class Loaded:
    """What one process measured.

    Attributes:
        rows: that were loaded.
        seconds: they took.
        peak: the most memory above that of the imports, in bytes.
    """

    rows: int
    seconds: float
    peak: int

    @property
    def rate(self) -> float:
        """Rows per second."""
        return self.rows / self.seconds


def load(side: str, file: Path, shape: str, folder: Path, workers: int) -> Loaded:
    """One side's loading in a fresh process.

    Raises:
        RuntimeError: it ended in an error.
    """
    words = [sys.executable, "-m", f"{HERE}.sides", side, str(file), shape, str(folder), str(workers)]
    core = {min(os.sched_getaffinity(0))}
    ended = subprocess.run(
        words,
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "CI": "true"},
        preexec_fn=(lambda: os.sched_setaffinity(0, core)) if workers == 1 else None,
    )
    if ended.returncode:
        raise RuntimeError(ended.stderr)
    return Loaded(**json.loads(ended.stdout.splitlines()[-1]))


def compare(folder: Path, shapes: Sequence[str], count: int, turns: int) -> None:
    """A line for each shape and number of workers."""
    print(
        "| rows | workers | ours, rows/s | peer, rows/s | faster | ours, GB | peer, GB |\n|---|---|---|---|---|---|---|"
    )
    for shape in shapes:
        file = folder / f"{shape}.jsonl"
        write_rows(file, shape, count, TOKENS[shape])
        for workers in (1, 2):
            pairs = []
            for _ in range(turns):
                for kept in ("cache", "peer"):
                    shutil.rmtree(folder / kept, ignore_errors=True)
                pairs.append([load(side, file, shape, folder, workers) for side in ("ours", "peer")])
            ratios = sorted(own.rate / other.rate for own, other in pairs)
            rates = [statistics.median(pair[i].rate for pair in pairs) for i in (0, 1)]
            peaks = [statistics.median(pair[i].peak for pair in pairs) / 1e9 for i in (0, 1)]
            print(
                f"| {shape} | {workers} | {rates[0]:,.0f} | {rates[1]:,.0f} | **{statistics.median(ratios):.2f}** "
                f"({ratios[0]:.2f}–{ratios[-1]:.2f}) | {peaks[0]:.2f} | {peaks[1]:.2f} |",
                flush=True,
            )


def large(folder: Path, count: int, tokens: int, workers: int, start: bool) -> None:
    """A large file of prompts with completions: its first loading, its second, and with ``start`` those of a run."""
    file = folder / "large.jsonl"
    write_rows(file, "prompt", count, tokens)
    print(f"{count:,} rows of {tokens} tokens, {file.stat().st_size / 1e9:.2f} GB, {workers} workers")
    for word in ("first", "second"):
        found = load("ours", file, "prompt", folder, workers)
        print(
            f"{word}: {found.seconds:.1f} s ({found.rate:,.0f} rows/s), "
            f"peak {found.peak / 1e9:.2f} GB above the imports",
            flush=True,
        )
    (stored,) = (folder / "cache").glob("*.arrow")
    print(f"on disk: {stored.stat().st_size / 1e9:.2f} GB")
    if not start:
        return
    run = [
        "fit",
        "--config=configs/sft/quickstart.yaml",
        "--data.validation_fraction=0",
        "--trainer.limit_val_batches=0",
        f"--data.train.path={file}",
        f"--data.max_length={4 * tokens}",
        f"--data.cache={folder}/start",
        f"--runs={folder}/runs",
        "--trainer.callbacks=experiments.benchmarks.startup.FirstStep",
    ]
    for word in ("first", "second"):
        seconds, _ = measure(command(*run), str(folder))
        print(f"{word} start, from the interpreter to the first step: {seconds:.1f} s", flush=True)


def main() -> None:
    """Measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000, help="of each file (20 000)")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=SHAPES, help="of the rows (all)")
    parser.add_argument("--turns", type=int, default=3, help="of both sides (3)")
    parser.add_argument("--large", type=int, help="instead: rows of a large file, loaded by ours alone")
    parser.add_argument("--tokens", type=int, default=100, help="of a row of the large file (100)")
    parser.add_argument("--workers", type=int, default=2, help="for the large file (2)")
    parser.add_argument("--start", action="store_true", help="also how long a run takes to its first step")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_tokenizer(folder / "tokenizer")
        if given.large:
            large(folder, given.large, given.tokens, given.workers, given.start)
        else:
            compare(folder, given.shapes, given.rows, given.turns)


if __name__ == "__main__":
    main()
