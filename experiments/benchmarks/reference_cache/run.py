"""What the cache of reference log-probs costs where nothing is computed. See README.md beside this.

Times are of the processor (one core), not of the clock, so that other processes do not enter them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from rlhf_lit.batches import Sequences
from rlhf_lit.reference_cache.identity import identify
from rlhf_lit.reference_cache.store import ReferenceCache, Row

BATCH = 64


@contextmanager
def timed(what: str, unit: str, amount: float) -> Iterator[None]:
    """Print the processor's time of a block, per unit."""
    start = time.process_time()
    yield
    seconds = time.process_time() - start
    print(f"{what}: {seconds:.2f} s, {seconds / amount * 1e6:.1f} µs per {unit}")


def constant(sequences: Sequences) -> Tensor:
    """Log-probs that cost nothing."""
    return -sequences.mask.float()


def measure(rows: int, tokens: int, response: int) -> None:
    """Measure with so many rows, of so many tokens, of which so many are the response's."""
    torch.set_num_threads(1)
    config = LlamaConfig(hidden_size=1024, intermediate_size=4096, num_hidden_layers=12, num_attention_heads=16)
    model = LlamaForCausalLM(config)
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    identify(LlamaForCausalLM(LlamaConfig(num_hidden_layers=0, hidden_size=64)))  # imports what it needs
    with timed(f"identify {size / 1e9:.2f} GB of weights", "MB", size / 1e6):
        identity = identify(model)
    generator = torch.Generator().manual_seed(0)
    mask = [False] * (tokens - response) + [True] * response
    ids = torch.randint(0, 32_000, (rows, tokens), generator=generator)
    data: list[Row] = [(row.tolist(), mask) for row in ids]
    with tempfile.TemporaryDirectory() as folder:
        cache = ReferenceCache(folder, identity)
        with timed(f"build {rows} rows of {tokens} tokens", "row", rows):
            cache.build(data, constant, 64 * tokens)
        print(f"on disk: {cache.size / (rows * response):.3f} bytes per response token")
        with timed("find that nothing is missing", "row", rows):
            cache.missing(data)
        tracemalloc.start()
        opened = ReferenceCache(folder, identity)
        opened.missing([])
        print(f"index: {tracemalloc.get_traced_memory()[0] / rows:.0f} bytes per row in memory")
        tracemalloc.stop()
        with timed("open and check", "MB", cache.size / 1e6):
            ReferenceCache(folder, identity).missing([])
        masks = torch.tensor([mask] * BATCH)
        batches = [Sequences(part, torch.full((len(part),), tokens), masks[: len(part)]) for part in ids.split(BATCH)]
        with timed(f"read batches of {BATCH}", "row", rows):
            for batch in batches:
                cache.read(batch)


def main() -> None:
    """Measure what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--response", type=int, default=256)
    arguments = parser.parse_args()
    measure(arguments.rows, arguments.tokens, arguments.response)


if __name__ == "__main__":
    main()
