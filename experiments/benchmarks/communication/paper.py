"""Memory and communication of models too large for the machines this was written on, by the formulas of
docs/scaling.md; prints its tables."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

GB = 1e9
CARDS = (1, 2, 4, 8, 16, 64)
RANK = 16
BF16, FLOAT32 = 2, 4
NF4 = 0.5 + 0.016  # bytes of a 4-bit weight: a scale of 8 bits for 64 of them, and one of 32 bits for 256 scales


@dataclass(frozen=True)
class Llama:
    """A shape. The linear layers of a block are what LoRA and nf4 apply to."""

    name: str
    layers: int
    width: int
    inner: int
    key_width: int
    vocabulary: int = 128_256

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Of a block: query, output, key, value, and the three of the feed-forward layer."""
        return [(self.width, self.width)] * 2 + [(self.width, self.key_width)] * 2 + [(self.width, self.inner)] * 3

    @property
    def linear(self) -> int:
        return self.layers * sum(a * b for a, b in self.matrices)

    @property
    def embeddings(self) -> int:
        return 2 * self.vocabulary * self.width

    @property
    def weights(self) -> int:
        return self.linear + self.embeddings

    @property
    def adapter(self) -> int:
        return self.layers * sum(RANK * (a + b) for a, b in self.matrices)


MODELS = (Llama("8 B", 32, 4096, 14_336, 1024), Llama("70 B", 80, 8192, 28_672, 1024))
FULL, LORA, QLORA = "all weights", "LoRA", "QLoRA"
ROLES = {"SFT": (1, 0), "DPO": (1, 1), "PPO": (2, 2)}
"""Algorithm → roles that train and roles that do not: policy, critic; reference, reward."""
GATHERS = {"SFT": 2, "DPO": 3, "PPO": 4}
"""Times that a micro-batch gathers a model's weights: forwards and backwards of what trains, and DPO's reference."""
STRATEGIES = (("ddp", FULL), ("fsdp2", FULL), ("fsdp2", LORA), ("fsdp2", QLORA))


def base_bytes(model: Llama, kind: str) -> float:
    """The weights of one model."""
    return model.linear * (NF4 if kind == QLORA else BF16) + model.embeddings * BF16


def held(model: Llama, algorithm: str, kind: str) -> float:
    """Weights, gradients and AdamW's moments of all roles, over all cards."""
    trained, frozen = ROLES[algorithm]
    if kind == FULL:
        return model.weights * BF16 * (4 * trained + frozen)
    return base_bytes(model, kind) + model.adapter * FLOAT32 * (4 * trained + frozen)


def per_card(model: Llama, algorithm: str, strategy: str, kind: str, cards: int) -> float:
    """Sharded evenly, with two blocks gathered at a time; or a copy each."""
    if strategy == "ddp" or cards == 1:
        return held(model, algorithm, kind)
    return held(model, algorithm, kind) / cards + 2 * base_bytes(model, kind) / model.layers


def sent(model: Llama, algorithm: str, strategy: str, kind: str, cards: int, micro_batches: int) -> float:
    """Bytes that a card sends in an optimizer step, by rings, without the rollout."""
    ring = (cards - 1) / cards
    trained, _ = ROLES[algorithm]
    gradients = trained * (model.weights * BF16 if kind == FULL else model.adapter * FLOAT32)
    if strategy == "ddp":
        return 2 * ring * gradients
    return ring * micro_batches * (GATHERS[algorithm] * base_bytes(model, kind) + gradients)


def _head(title: str, cards: tuple[int, ...]) -> str:
    return f"\n| {title} | {' | '.join(map(str, cards))} |\n" + "|---" * (1 + len(cards)) + "|"


def main() -> None:
    """The tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--micro_batches", type=int, default=1, help="of an optimizer step on each card")
    micro_batches = parser.parse_args().micro_batches
    for model in MODELS:
        sizes = f"{model.weights / GB:.2f} B weights; an adapter of rank {RANK}, {model.adapter / 1e6:.0f} M"
        print(f"\n{model.name}: {sizes}")
        print(_head("held, GB per card", CARDS))
        for algorithm in ROLES:
            for strategy, kind in STRATEGIES:
                row = [f"{per_card(model, algorithm, strategy, kind, cards) / GB:.0f}" for cards in CARDS]
                print(f"| {algorithm}, {strategy}, {kind} | " + " | ".join(row) + " |")
        print(_head("sent, GB per card and step", CARDS[1:]))
        for algorithm in ROLES:
            for strategy, kind in STRATEGIES:
                row = [
                    f"{sent(model, algorithm, strategy, kind, cards, micro_batches) / GB:.2f}" for cards in CARDS[1:]
                ]
                print(f"| {algorithm}, {strategy}, {kind} | " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
