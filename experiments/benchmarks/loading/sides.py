"""One side's loading of a file, in a process of its own: seconds, and the most memory above its imports.

Ours is the data module's setup. The peer's is what TRL 1.16 does for `SFTTrainer` and `DPOTrainer`: `load_dataset`,
then `Dataset.map` of a function that calls `apply_chat_template` on a row at a time, the prompt and the whole apart;
without TRL's further passes over the rows (their shape, truncation, masks).
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

MODULES = {"prompt": "SFTDataModule", "messages": "SFTDataModule", "pairs": "PreferenceDataModule"}
MAX_LENGTH = 4096


class Memory(threading.Thread):
    """Watches the memory of this process and its children: what is theirs alone, and their share of what is not."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.base = self.now()
        self.peak = self.base

    @staticmethod
    def now() -> int:
        """Bytes, by proportional set sizes."""
        here = psutil.Process()
        total = 0
        for process in (here, *here.children(recursive=True)):
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # it has ended
                continue
        return total

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.25)


def ours(file: str, shape: str, folder: Path, workers: int) -> Any:
    """What loads the file."""
    from transformers import AutoTokenizer

    from rlhf_lit.data import modules
    from rlhf_lit.data.sources import Source

    module = getattr(modules, MODULES[shape])(
        Source(file), workers=workers, cache=str(folder / "cache"), max_length=MAX_LENGTH
    )
    algorithm = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(folder / "tokenizer"))
    module.trainer = SimpleNamespace(lightning_module=algorithm, global_rank=0, world_size=1)

    def load() -> int:
        module.setup("fit")
        next(iter(module.train_dataloader()))
        return len(module.examples["train"])

    return load


def peer(file: str, shape: str, folder: Path, workers: int) -> Any:
    """What loads the file as TRL does."""
    import datasets
    from transformers import AutoTokenizer
    from trl.data_utils import common_prefix_length

    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")

    def tokens(messages: Any, **options: Any) -> list[int]:
        found: list[int] = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=True, **options)[
            "input_ids"
        ]
        return found

    def prompt(row: dict[str, Any]) -> dict[str, Any]:
        before = tokens(row["prompt"], add_generation_prompt=True)
        whole = tokens(row["prompt"] + row["completion"])
        start = common_prefix_length(before, whole)
        return {"input_ids": whole, "completion_mask": [0] * start + [1] * (len(whole) - start)}

    def pairs(row: dict[str, Any]) -> dict[str, Any]:
        before = tokens(row["prompt"], add_generation_prompt=True)
        sides = [tokens(row["prompt"] + row[side]) for side in ("chosen", "rejected")]
        start = min(common_prefix_length(before, side) for side in sides)
        return {"prompt_ids": before[:start], "chosen_ids": sides[0][start:], "rejected_ids": sides[1][start:]}

    def messages(row: dict[str, Any]) -> dict[str, Any]:
        return {"input_ids": tokens(row["messages"])}

    each = {"prompt": prompt, "pairs": pairs, "messages": messages}[shape]

    def load() -> int:
        rows = datasets.load_dataset("json", data_files=file, split="train", cache_dir=str(folder / "peer"))
        mapped = rows.map(each, num_proc=workers if workers > 1 else None)
        return len(mapped)

    return load


def main() -> None:
    """``SIDE FILE SHAPE FOLDER WORKERS``; prints {rows, seconds, peak} as JSON."""
    side, file, shape, folder, workers = sys.argv[1:]
    load = {"ours": ours, "peer": peer}[side](file, shape, Path(folder), int(workers))
    memory = Memory()
    memory.start()
    started = time.perf_counter()
    rows = load()
    seconds = time.perf_counter() - started
    print(json.dumps({"rows": rows, "seconds": seconds, "peak": max(memory.peak, memory.now()) - memory.base}))


if __name__ == "__main__":
    main()
