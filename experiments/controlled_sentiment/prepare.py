"""Openings of stories, and pairs of the model's own continuations that VADER tells apart. See README.md beside this."""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import yaml
from lightning import seed_everything

from experiments.steps import call
from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.data.records import Message
from rlhf_lit.evaluation.sampling import draw
from rlhf_lit.models.base import Base
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.sentiment import vader

HERE = Path(__file__).parent


def beginnings(text: str, words: int, sentences: int) -> Iterator[tuple[str, str]]:
    """Of each paragraph the opening, so many words, and how it goes on to the end of its first sentences."""
    for part in text.split("\n\n"):
        found = part.split()
        stops = [i for i, word in enumerate(found) if word.rstrip('"').endswith((".", "!", "?")) and i > words]
        if part.isascii() and len(stops) >= sentences:
            yield " ".join(found[:words]), " ".join(found[words : stops[sentences - 1] + 1])


def pairs(prompts: Sequence[str], answers: Sequence[Sequence[str]]) -> Iterator[dict[str, str]]:
    """Every two continuations of an opening of which one is more cheerful, without noise (Rafailov et al. 2023, §6)."""
    for prompt, texts in zip(prompts, answers, strict=True):
        scored = list(zip(vader([prompt] * len(texts), list(texts), [{} for _ in texts]), texts, strict=True))
        for one, other in itertools.combinations(scored, 2):
            if one[0] != other[0]:
                (_, chosen), (_, rejected) = (one, other) if one[0] > other[0] else (other, one)
                yield {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def main() -> None:
    """Write openings, train the SFT model on real continuations of them, and let it write the pairs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, default=Path("data/tinystories.txt"), help="stories, one after another")
    parser.add_argument("--sft", type=Path, default=HERE / "sft.yaml", help="configuration of the SFT run")
    parser.add_argument("--to", type=Path, default=Path("data/sentiment"))
    parser.add_argument("--words", type=int, default=5, help="of an opening (5)")
    parser.add_argument("--sentences", type=int, default=2, help="of a continuation (2)")
    parser.add_argument("--held-out", type=int, default=256, help="openings that no run learns from (256)")
    parser.add_argument(
        "--samples", type=int, default=8, help="continuations of an opening, paired with each other (8)"
    )
    parser.add_argument("--tokens", type=int, default=48, help="longest continuation (48)")
    given = parser.parse_args()
    stories = list(beginnings(given.text.read_text(encoding="utf-8"), given.words, given.sentences))
    prompts = list(dict.fromkeys(opening for opening, _ in stories))
    splits = {"train": prompts[: -given.held_out], "held_out": prompts[-given.held_out :]}
    for split, own in splits.items():
        rows = [{"prompt": opening, "completion": rest} for opening, rest in stories if opening in set(own)]
        write(given.to / f"stories_{split}.jsonl", rows)
        write(given.to / f"openings_{split}.jsonl", [{"prompt": prompt} for prompt in own])
    run = str(yaml.safe_load(given.sft.read_text())["name"])
    if not list(Path("runs", run).glob("version_*/hf")):
        call("fit", "--config", str(given.sft))
    seed_everything(0, verbose=False)
    module = SFT(Base(name=f"runs/{run}"), sampling=Sampling(max_new_tokens=given.tokens, rows_at_once=512))
    module.configure_model()
    for stream, (split, own) in enumerate(splits.items()):
        conversations = [[Message("user", prompt)] for prompt in own]
        _, texts = draw(module, conversations, given.samples, stream, template="none")
        rows = list(pairs(own, texts))
        random.Random(0).shuffle(rows)  # so that the first of them are pairs of many openings
        write(given.to / f"pairs_{split}.jsonl", rows)


def write(file: Path, rows: Sequence[dict[str, str]]) -> None:
    """As JSON Lines."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    print(f"{len(rows)} rows in {file}")


if __name__ == "__main__":
    main()
