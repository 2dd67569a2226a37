"""Tiny models in folders, ragged batches, and the sum of a batch's shares: what tests on real models have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rlhf_lit.algorithms import PPO
from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.algorithms.ppo import Critic
from rlhf_lit.batches import (
    ExperienceBatch,
    PreferenceBatch,
    PromptBatch,
    RankedBatch,
    Sequences,
    SupervisedBatch,
    UnpairedBatch,
)
from rlhf_lit.losses.kl import FixedKL
from rlhf_lit.models.base import Base
from rlhf_lit.models.packing import layout_of
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import RewardFromFunction

Module = TypeVar("Module", bound=Algorithm)
VOCABULARY = 40
BOS, EOS = 1, 2
EVERYTHING = 10_000

SIZES: dict[str, dict[str, Any]] = {
    "llama": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
}
SIZES["qwen2"] = SIZES["mistral"] = {**SIZES["llama"], "num_key_value_heads": 2}
SIZES["gemma2"] = {**SIZES["qwen2"], "head_dim": 8, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
SIZES["granite"] = {**SIZES["qwen2"], "logits_scaling": 3.0, "embedding_multiplier": 2.0}
SIZES["cohere"] = {**SIZES["qwen2"], "logit_scale": 0.25}
SIZES["qwen3"] = SIZES["gemma"] = {**SIZES["qwen2"], "head_dim": 8}
SIZES["mixtral"] = {**SIZES["qwen2"], "num_local_experts": 4, "num_experts_per_tok": 2}
SIZES["opt"] = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES["mamba2"] = {"hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8}
SIZES["falcon_h1"] = {**SIZES["qwen2"], "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
SIZES["recurrent_gemma"] = {**SIZES["llama"], "num_hidden_layers": 3, "num_key_value_heads": 1, "lru_width": 32}
SIZES["llama4_text"] = {**SIZES["qwen3"], "intermediate_size_mlp": 64, "num_local_experts": 2}
SIZES["rwkv"] = {"hidden_size": 32, "attention_hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


def make_tokenizer(pad: str = "<eos>") -> Any:
    """One word per token, w3 … w39; the pad token is EOS unless told otherwise, where asking for pad ids goes wrong."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<bos>", "<eos>", *(f"w{i}" for i in range(3, VOCABULARY))]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>", pad_token=pad
    )


def save_model(folder: Path, kind: str = "llama", seed: int = 0, spread: float = 0.15, **overrides: Any) -> str:
    """A fresh model of one kind, weights of standard deviation ``spread``, with its tokenizer. → the folder's name."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {"vocab_size": VOCABULARY, "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": None}
    config = AutoConfig.for_model(kind, **{**settings, **SIZES[kind], "initializer_range": spread, **overrides})
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def words(generator: torch.Generator, count: int) -> list[int]:
    """Random tokens, none of them special."""
    return torch.randint(3, VOCABULARY, (count,), generator=generator).tolist()


def conversation(generator: torch.Generator, prompt: int, response: int) -> tuple[list[int], list[bool]]:
    """A prompt with an EOS of its own (an earlier turn's) and token 0 inside, and a response closed by EOS."""
    tokens = [BOS, *words(generator, prompt), EOS, 0, *words(generator, response), EOS]
    return tokens, [False] * (prompt + 3) + [True] * (response + 1)


def sequences(sizes: Sequence[tuple[int, int]], seed: int = 0) -> Sequences:
    """Rows of the given (prompt, response) sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = [conversation(generator, *size) for size in sizes]
    return Sequences.pad([tokens for tokens, _ in rows], [mask for _, mask in rows])


RAGGED = [(3, 1), (1, 9), (6, 4), (2, 2), (9, 0), (1, 5), (4, 12)]


def supervised(budget: int = EVERYTHING) -> SupervisedBatch:
    """Seven ragged demonstrations."""
    return SupervisedBatch(sequences(RAGGED), budget)


def preferences(budget: int = EVERYTHING) -> PreferenceBatch:
    """Six ragged pairs, sides of unequal length."""
    generator = torch.Generator().manual_seed(1)
    sides: tuple[list[Any], list[Any]] = ([], [])
    for prompt, chosen, rejected in [(3, 1, 7), (1, 9, 2), (6, 4, 4), (2, 2, 0), (9, 1, 5), (1, 5, 11)]:
        head = [BOS, *words(generator, prompt), EOS]
        for side, size in zip(sides, (chosen, rejected), strict=True):
            side.append(([*head, *words(generator, size), EOS], [False] * len(head) + [True] * (size + 1)))
    padded = [Sequences.pad([t for t, _ in side], [m for _, m in side]) for side in sides]
    margin = torch.tensor([0.3, 0.0, 1.0, -0.2, 0.5, 0.1])
    return PreferenceBatch(padded[0], padded[1], margin, budget)


def rankings(budget: int = EVERYTHING) -> RankedBatch:
    """Four prompts with 3, 4, 2 and 4 ragged answers, with ties and without."""
    generator = torch.Generator().manual_seed(5)
    rows, masks = [], []
    for prompt, answers in [(3, (1, 7, 2)), (1, (9, 2, 5, 0)), (6, (4, 3)), (2, (2, 11, 1, 6))]:
        head = [BOS, *words(generator, prompt), EOS]
        for size in answers:
            rows.append([*head, *words(generator, size), EOS])
            masks.append([False] * len(head) + [True] * (size + 1))
    rank = torch.tensor([2, 0, 1, 0, 1, 1, 2, 1, 0, 3, 2, 1, 0])
    rating = torch.tensor([0.0, 2.0, 1.5, 4.0, 1.0, 1.0, 0.5, -1.0, 3.0, 1.0, 2.0, 2.5, 9.0])
    return RankedBatch(Sequences.pad(rows, masks), torch.tensor([3, 4, 2, 4]), rank, rating, budget)


def unpaired(budget: int = EVERYTHING) -> UnpairedBatch:
    """Twelve ragged responses, some of them good, and each prompt with the response of the row before it."""
    pairs, generator = preferences(budget), torch.Generator().manual_seed(4)
    good = torch.rand(12, generator=generator) < 0.5
    assert 0 < int(good.sum()) < 12
    sides = pairs.sides()
    starts = sides.mask.int().argmax(-1).tolist()
    found = [tokens[:n].tolist() for tokens, n in zip(sides.tokens, sides.lengths.tolist(), strict=True)]
    mixed = [[*row[: starts[i]], *found[i - 1][starts[i - 1] :]] for i, row in enumerate(found)]
    masks = [[False] * start + [True] * (len(row) - start) for row, start in zip(mixed, starts, strict=True)]
    return UnpairedBatch(sides, Sequences.pad(mixed, masks), good, budget)


def prompts(count: int = 8, budget: int = EVERYTHING, seed: int = 2) -> PromptBatch:
    """Prompts of 2 to 9 tokens, some with an EOS inside."""
    generator = torch.Generator().manual_seed(seed)
    rows = [[BOS, *words(generator, 1 + (5 * i) % 8), *([EOS, 5] if i % 3 == 0 else [])] for i in range(count)]
    texts = tuple(f"prompt {i}" for i in range(count))
    index = torch.arange(count)
    padded = Sequences.pad(rows, [[False] * len(row) for row in rows])
    return PromptBatch(padded, index, torch.zeros_like(index), texts, tuple({} for _ in rows), budget)


def repeated(prompts: PromptBatch, samples: int) -> PromptBatch:
    """Each prompt asked several times, as `samples_per_prompt` does."""
    rows = torch.arange(len(prompts)).repeat_interleave(samples)
    return replace(prompts.select(rows), sample=torch.arange(len(rows)) % samples)


def word_count(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A reward that differs from response to response."""
    return [len(response.split()) / 4 + ("w7" in response) for response in responses]


def make_ppo(base: Base, **settings: Any) -> PPO:
    """PPO with a function as the reward and a critic from the policy, unless told otherwise, with its models built."""
    return make_on_policy(PPO, base, **{"critic": Critic(init="policy"), **settings})


def make_on_policy(kind: Callable[..., Module], base: Base, **settings: Any) -> Module:
    """PPO, RLOO or GRPO with a function as the reward, unless told otherwise, with its models built."""
    defaults: dict[str, Any] = {
        "reward": RewardFromFunction(word_count),
        "kl": FixedKL(0.2),
        "sampling": Sampling(max_new_tokens=10),
    }
    return build(kind(base, **{**defaults, **settings}))


def build(module: Module) -> Module:
    """The module with its models, in the mode it trains in."""
    torch.manual_seed(0)  # a new value head and new adapters are drawn from the global generator
    module.configure_model()
    module.set_train_mode()
    return module


def logprobs_of(module: Any, sequences: Sequences) -> Tensor:
    """[rows, time] the policy's log-probs, by a plain softmax over the logits of its own forward; 0 off the mask."""
    with module.roles.acting("policy") as model:
        table = model(sequences.tokens).logits[:, :-1].log_softmax(-1)
    chosen = table.gather(-1, sequences.tokens[:, 1:, None]).squeeze(-1)
    return torch.where(sequences.mask, nn.functional.pad(chosen, (1, 0)), 0.0)


def disturb(module: nn.Module, amount: float, seed: int = 3) -> None:
    """Add noise to every trainable weight, as a few updates would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_((amount * noise).to(parameter.dtype))


class Step:
    """What one optimizer step would see: the summed shares of a batch and the gradient of their loss."""

    def __init__(self, module: Algorithm, batch: Any, cut: bool = True) -> None:
        module.zero_grad()
        self.totals: dict[str, float] = {}
        denominators = module.denominators(batch) | module.router_loss.denominators(batch)
        module.prepare(batch)
        for micro_batch in batch.micro_batches(layout_of(module)) if cut else [batch]:
            for share in module.router_loss.added(module.losses(micro_batch, denominators), denominators):
                share.loss.backward()
                for name, value in {"loss": share.loss.detach(), **share.metrics}.items():
                    self.totals[name] = self.totals.get(name, 0.0) + float(value)
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        assert named
        self.without_gradient = [name for name, p in named.items() if p.grad is None]
        self.gradients = {name: p.grad.detach().clone() for name, p in named.items() if p.grad is not None}
        assert any(gradient.any() for gradient in self.gradients.values())

    @property
    def norm(self) -> float:
        """L2 norm of the whole gradient."""
        return float(torch.stack([g.double().norm() for g in self.gradients.values()]).norm())

    def distance(self, other: Step) -> float:
        """Largest difference between two gradients of one parameter, relative to the whole gradient's norm."""
        assert self.gradients.keys() == other.gradients.keys()
        return max(float((g - other.gradients[name]).abs().max()) for name, g in self.gradients.items()) / self.norm

    def assert_equals(self, other: Step, tolerance: float) -> None:
        """Equal loss, metrics and gradients."""
        assert self.totals.keys() == other.totals.keys()
        for name, value in self.totals.items():
            # Fractions of pairs or tokens are counted in float32, whatever the model's width.
            allowed = tolerance if name == "loss" else max(tolerance, 1e-6)
            assert abs(value - other.totals[name]) <= allowed * max(1.0, abs(value)), name
        assert self.distance(other) <= tolerance


def widen(batch: Any, extra: int, fill: int = EOS) -> Any:
    """The same batch with ``extra`` more columns of padding, filled with an id that also occurs as a real token."""

    def longer(x: Tensor, value: int | bool | float = 0) -> Tensor:
        return nn.functional.pad(x, (0, extra), value=value)

    def padded(s: Sequences) -> Sequences:
        past = torch.arange(s.tokens.shape[1])[None] >= s.lengths[:, None]
        return Sequences(longer(s.tokens.masked_fill(past, fill), fill), s.lengths, longer(s.mask, False))

    if isinstance(batch, RankedBatch):
        return replace(batch, sequences=padded(batch.sequences))
    if isinstance(batch, PreferenceBatch):
        return replace(batch, chosen=padded(batch.chosen), rejected=padded(batch.rejected))
    if isinstance(batch, UnpairedBatch):
        return replace(batch, sequences=padded(batch.sequences), mismatched=padded(batch.mismatched))
    if isinstance(batch, ExperienceBatch):
        rest = {name: longer(column) for name, column in batch.columns().items()}
        return replace(batch, sequences=padded(batch.sequences), **rest)
    return replace(batch, sequences=padded(batch.sequences))
