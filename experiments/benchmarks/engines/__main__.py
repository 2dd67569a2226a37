"""Sampled tokens per second, vLLM's engine and transformers' in turns, in one process. See docs/rollouts.md.

    make vllm-speed                                              SmolLM2-135M-Instruct on a CPU
    python -m experiments.benchmarks.engines --model FOLDER      another model, where vLLM is installed

Both answer the same questions, and a response ends at the model's own stop token. vLLM's time holds that of its being
given the policy's weights, as before each rollout.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch

from rlhf_lit.batches import Sequences
from rlhf_lit.data.chat import ChatFormat
from rlhf_lit.data.rows import Message
from rlhf_lit.models.anatomy import stop_ids
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm, load_tokenizer
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.randomness import row_keys
from rlhf_lit.rollout.engine import Samples, Sampling, sample
from rlhf_lit.rollout.gap import median_gap
from rlhf_lit.rollout.vllm_engine import VLLM, VLLMEngine

ASKED = ("Name {} kinds of {}.", "What would you do with {} {}, and why?", "Write {} short lines about {}, please.")
THINGS = ("cheese", "birds that cannot fly", "tools in a workshop", "old songs", "rivers in the south of Europe")


@dataclass(frozen=True)
class Turn:
    """What one engine did once.

    Attributes:
        tokens: of the responses.
        seconds: they took.
    """

    tokens: int
    seconds: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=".envs/smollm2", help="a model with a chat template")
    parser.add_argument("--rows", type=int, nargs="+", default=[32, 128], help="responses that are drawn together")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--new-tokens", type=int, default=64, help="longest response (64)")
    parser.add_argument("--turns", type=int, default=3, help="of both engines, after one that is not counted (3)")
    parser.add_argument("--compiled", action="store_true", help="vLLM's CUDA graphs, on a CPU torch.compile")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(
        f"{device}, {torch.get_num_threads()} threads, {given.turns} turns, load {os.getloadavg()[1]:.1f} at the start"
    )
    print("| weights | rows | transformers, tokens/s | vLLM, tokens/s | vLLM by transformers | median gap |")
    print("|---|---|---|---|---|---|", flush=True)
    for dtype in given.dtypes:
        compare(given.model, dtype, given.rows, given.new_tokens, given.turns, not given.compiled, device)
    print(f"load {os.getloadavg()[1]:.1f} at the end")


def compare(
    name: str, dtype: Any, sizes: list[int], new_tokens: int, turns: int, eager: bool, device: torch.device
) -> None:
    """A line for each number of rows."""
    base = Base(name, dtype=dtype)
    model, tokenizer = load_causal_lm(base).to(device).eval(), load_tokenizer(base)
    asked = questions(ChatFormat(tokenizer), max(sizes), device)
    longest = int(asked.lengths.max()) + new_tokens
    vllm = VLLMEngine(VLLM(dtype=dtype, max_length=longest, sleep=0, enforce_eager=eager))
    sampling = Sampling(new_tokens, rows_at_once=max(sizes))
    stops = stop_ids(tokenizer, model)
    for rows in sizes:
        prompts = asked.select(torch.arange(rows))
        engines: tuple[Callable[..., Samples], ...] = (sample, vllm)
        found: tuple[list[Turn], ...] = ([], [])
        gap = 0.0
        for turn, (engine, results) in product(range(turns + 1), zip(engines, found, strict=True)):
            index = torch.arange(rows)
            keys = row_keys(turn, index, torch.zeros_like(index)).to(device)
            drawn, result = timed(partial(engine, model, prompts, keys, sampling, stops))
            if turn:  # the first one starts vLLM
                results.append(result)
            elif engine is vllm:
                with torch.no_grad():
                    gap = median_gap(drawn, token_logprobs(model, drawn.sequences, 1.0))
        ours, theirs = (statistics.median(turn.rate for turn in results) for results in found)
        ratios = [b.rate / a.rate for a, b in zip(*found, strict=True)]
        spread = f"{statistics.median(ratios):.2f} × ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {dtype} | {rows} | {ours:.0f} | {theirs:.0f} | {spread} | {gap:.1g} |", flush=True)
    vllm.close()


def questions(chat: ChatFormat, count: int, device: torch.device) -> Sequences:
    """Prompts of different lengths, no two alike."""
    asked = [ASKED[i % len(ASKED)].format(2 + i, THINGS[i % len(THINGS)]) for i in range(count)]
    rows = [chat.prompt([Message("user", line)]) for line in asked]
    return Sequences.pad(rows, [[False] * len(row) for row in rows]).to(device)


def timed(draw: Callable[[], Samples]) -> tuple[Samples, Turn]:
    """What is drawn, and how long it took."""
    started = time.perf_counter()
    drawn = draw()
    if drawn.sequences.tokens.is_cuda:
        torch.cuda.synchronize()
    return drawn, Turn(int(drawn.sequences.mask.sum()), time.perf_counter() - started)


if __name__ == "__main__":
    main()
