"""Seconds until ``fit`` answers or makes its first step, against importing what it stands on.

    python -m experiments.benchmarks.startup            (from the repository's root; --repeats N, default 5)

Each line is a fresh interpreter, from its start until what is named has happened: after one that is not counted, which
fills the caches of files and of tokens, the median of N, taken in turns. The floor is importing lightning and
transformers. transformers loads lazily, so that its part of the floor is a small one: the line below it adds the model
class of the run and ``datasets``, which the run's first rows are read through.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

ROOT = Path(__file__).parents[2]
NOTE = "STARTUP_NOTE"  # names the file that a child writes its last moment to
FLOOR = "import lightning, transformers"
HERE = "experiments.benchmarks.startup"
RUN = ["fit", "--config=configs/sft/quickstart.yaml", "--trainer.limit_val_batches=0"]
CHILD = f"""
import atexit, sys
def note():
    import os, time
    with open(os.environ["{NOTE}"], "w") as file:
        file.write(f"{{time.time()}} {{len(sys.modules)}}")
atexit.register(note)
"""


class FirstStep(Callback):
    """Ends the process, at once, when the first optimizer step is made."""

    def on_train_batch_end(self, *args: Any) -> None:
        Path(os.environ[NOTE]).write_text(f"{time.time()} {len(sys.modules)}")
        os._exit(0)


def ours(*argv: str) -> str:
    """Code that runs our command line as ``python -m rlhf_lit`` does."""
    return f"import runpy; sys.argv = {['rlhf_lit', *argv]!r}; runpy.run_module('rlhf_lit', None, '__main__', True)"


def measure(code: str, folder: str) -> tuple[float, int]:
    """Seconds from starting an interpreter on ``code`` to its end or its first step, and the modules it held then.

    Raises:
        RuntimeError: it ended otherwise than by 0, or 2 for the wrong key.
    """
    note = Path(folder) / "note"
    note.unlink(missing_ok=True)
    began = time.time()
    ended = subprocess.run(
        [sys.executable, "-c", CHILD + code],
        cwd=ROOT,
        env={
            **os.environ,
            NOTE: str(note),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )
    if ended.returncode not in (0, 2):
        raise RuntimeError(f"{code}\n{ended.stderr}")
    at, modules = note.read_text().split()
    return float(at) - began, int(modules)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        step = [f"--runs={folder}/runs", f"--data.cache={folder}/tokens", f"--trainer.callbacks={HERE}.FirstStep"]
        cases = {
            f"`{FLOOR}` (the floor)": FLOOR,
            "the same, `datasets` and the model's class": f"{FLOOR}, datasets; transformers.LlamaForCausalLM",
            "`--help`": ours("--help"),
            "`fit --help`": ours("fit", "--help"),
            "a wrong key's line": ours(*RUN, "--model.lerning_rate=1"),
            "the first step of SFT": ours(*RUN, *step),
            "the same without preflight": ours(*RUN, *step, "--preflight=false"),
        }
        found: dict[str, list[tuple[float, int]]] = {name: [] for name in cases}
        for turn in range(repeats + 1):
            for name, code in cases.items():
                measured = measure(code, folder)
                if turn:
                    found[name].append(measured)
    floor = statistics.median(seconds for seconds, _ in next(iter(found.values())))
    print(f"median of {repeats} (least to most)\n\n| until | s | of the floor | modules |\n|---|---|---|---|")
    for name, runs in found.items():
        times = sorted(seconds for seconds, _ in runs)
        middle = statistics.median(times)
        print(f"| {name} | {middle:.2f} ({times[0]:.2f}-{times[-1]:.2f}) | {middle / floor:.2f} | {runs[-1][1]} |")


if __name__ == "__main__":
    main()
