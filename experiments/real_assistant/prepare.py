"""The rows of the experiment: checkable instructions and pairs, for training and held out. See the README beside it."""

from __future__ import annotations

import argparse
import gzip
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from experiments.real_assistant.instructions import compose, within_reach

TASK_WORDS = 12  # of the longest task that an instruction is added to
HELD_OUT = 200  # pairs of each kind
PAIR_CHARACTERS = 400  # of the longest answer of a pair; its prompt may have as many


def tasks(rows: Iterable[dict[str, Any]]) -> list[str]:
    """Short requests that need nothing beside them, each once."""
    short = (row["instruction"].strip() for row in rows if not row["input"])
    return list(dict.fromkeys(task for task in short if len(task.split()) <= TASK_WORDS and task.isascii()))


def polite_pairs(rows: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """Prompt, polite and impolite answer (Raschka's book), of a length that a laptop trains on."""
    found = []
    for row in rows:
        prompt = "\n".join(part for part in (row["instruction"], row["input"]) if part)
        pair = {"prompt": prompt, "chosen": row["chosen"], "rejected": row["rejected"]}
        if pair["chosen"] != pair["rejected"] and all(0 < len(text) <= PAIR_CHARACTERS for text in pair.values()):
            found.append(pair)
    return found


def demo_pairs(rows: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """LLaMA-Factory's demonstration pairs of one turn whose texts are not four times as long."""
    found = []
    for row in rows:
        if len(row["conversations"]) == 1:
            pair = {
                "prompt": row["conversations"][0]["value"],
                "chosen": row["chosen"]["value"],
                "rejected": row["rejected"]["value"],
            }
            if all(0 < len(text) <= 4 * PAIR_CHARACTERS for text in pair.values()):
                found.append(pair)
    return found


def dialogues(rows: Iterable[dict[str, Any]]) -> list[dict[str, str]]:
    """HH's pairs whose dialogues, answer included, are short; the loader takes them apart and skips broken ones."""
    return [
        {"chosen": row["chosen"], "rejected": row["rejected"]}
        for row in rows
        if row["chosen"] != row["rejected"] and max(len(row["chosen"]), len(row["rejected"])) <= 2 * PAIR_CHARACTERS
    ]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Rows as JSON lines; says how many."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")
    print(f"{path}: {len(lines)} rows", flush=True)


def prepare(data: Path, to: Path) -> None:
    """Write the files that the stages read.

    Args:
        data: folder with `llamafactory_demo`, `ifeval`, `rasbt_llm_book` and `hh_harmless_test`, as their projects
            published them.
        to: folder of what is written.
    """
    alpaca = json.loads((data / "llamafactory_demo/alpaca_en_demo.json").read_text(encoding="utf-8"))
    write(to / "instructions.jsonl", compose(tasks(alpaca), seed=0))
    ifeval = [json.loads(line) for line in (data / "ifeval/input_data.jsonl").open(encoding="utf-8")]
    write(to / "ifeval_within_reach.jsonl", (row for row in ifeval if within_reach(row)))
    polite = polite_pairs(json.loads((data / "rasbt_llm_book/instruction-data-with-preference.json").read_text()))
    with gzip.open(data / "hh_harmless_test/test.jsonl.gz", "rt", encoding="utf-8") as file:
        harmless = dialogues(json.loads(line) for line in file)
    demo = demo_pairs(json.loads((data / "llamafactory_demo/dpo_en_demo.json").read_text(encoding="utf-8")))
    for rows in (polite, harmless):
        random.Random(0).shuffle(rows)
    write(to / "polite_held_out.jsonl", polite[:HELD_OUT])
    write(to / "polite_train.jsonl", polite[HELD_OUT:])
    write(to / "hh_held_out.jsonl", harmless[:HELD_OUT])
    write(to / "hh_train.jsonl", harmless[HELD_OUT : 3 * HELD_OUT])
    write(to / "demo_held_out.jsonl", demo)


def main() -> None:
    """Prepare the rows alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the public files (data)")
    parser.add_argument("--to", type=Path, default=Path("runs/real_assistant/rows"))
    given = parser.parse_args()
    prepare(given.data, given.to)


if __name__ == "__main__":
    main()
