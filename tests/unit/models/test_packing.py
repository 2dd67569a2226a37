"""The states of packed sequences, common prompts computed once, against those of rows of their own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.packing import hidden_states, layout_of, sequence_states, without_sharing
from rlhf_lit.models.segments import Segments, attention


def pairs(prompts: list[int], chosen: list[int], rejected: list[int]) -> tuple[Sequences, Sequences]:
    """Sides of so many prompt and answer tokens; answers of a pair begin differently."""
    generator = torch.Generator().manual_seed(4)
    sides: tuple[list[Any], list[Any]] = ([], [])
    for prompt, *answers in zip(prompts, chosen, rejected, strict=True):
        head = tiny.words(generator, prompt)
        for side, size, first in zip(sides, answers, (5, 6), strict=True):
            answer = [first, *tiny.words(generator, size)]
            side.append((head + answer, [False] * prompt + [True] * len(answer)))
    padded = [Sequences.pad([t for t, _ in side], [m for _, m in side]) for side in sides]
    return padded[0], padded[1]


RAGGED = pairs([12, 3, 20, 9], [2, 7, 4, 0], [5, 1, 4, 11])


def widths(model: nn.Module, chosen: Sequences, rejected: Sequences) -> tuple[Tensor, list[torch.Size]]:
    """The states, and the shapes of the tokens that went through the body."""
    inner: Any = unwrapped(model)
    shapes: list[torch.Size] = []
    body = getattr(inner, inner.base_model_prefix)
    hook = body.register_forward_pre_hook(
        lambda _, args, given: shapes.append(given["input_ids"].shape), with_kwargs=True
    )
    states = sequence_states(model, chosen.join(rejected))
    hook.remove()
    return states, shapes


def real(states: Tensor, sides: Sequences) -> Tensor:
    """The states of real tokens."""
    return states[torch.arange(states.shape[1])[None] < sides.lengths[:, None]]


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "granite"])
def test_states_and_gradients_are_those_of_the_rows_apart(
    kind: str, lora: LoRA | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tiny.save_model(tmp_path_factory.mktemp(kind), kind)
    model = load_causal_lm(Base(name=folder, lora=lora)).double()
    tiny.disturb(model, 0.05)
    sides = RAGGED[0].join(RAGGED[1])
    states, shapes = widths(model, *RAGGED)
    assert shapes == [(1, 44 + 17 + 25)], "each prompt once, both answers, no padding"
    expected = hidden_states(model, sides.tokens)
    torch.testing.assert_close(real(states, sides), real(expected, sides), rtol=0, atol=1e-12)
    weights = torch.linspace(-1, 1, expected.shape[-1], dtype=torch.float64)
    gradients = []
    for found in (states, expected):
        model.zero_grad()
        (real(found, sides).square() * weights).sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    # The norms' own arithmetic is in float32, whatever the model's.
    for one, other in zip(*gradients, strict=True):
        assert float((one - other).norm()) < 1e-6 * float(other.norm())


def test_scorers_share_too(llama: str) -> None:
    model = load_scorer(Base(name=llama)).double()
    sides = RAGGED[0].join(RAGGED[1])
    states, shapes = widths(model, *RAGGED)
    assert shapes == [(1, 86)]
    torch.testing.assert_close(real(states, sides), real(hidden_states(model, sides.tokens), sides), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("lora", "overrides"),
    [(LoRA(rank=4, dropout=0.1), {}), (None, {"attention_dropout": 0.1}), (None, {"hidden_dropout": 0.1})],
    ids=["adapters", "attention", "elsewhere"],
)
def test_with_active_dropout_prompts_are_computed_apart(
    lora: LoRA | None, overrides: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """They would else have one noise on the prompt. In eval mode there is none."""
    folder = tiny.save_model(tmp_path_factory.mktemp("dropout"), "llama", **overrides)
    model = load_scorer(Base(name=folder, lora=lora))
    model.train()
    attention = "attention_dropout" in overrides
    assert layout_of(model) == ("padded" if attention else "packed")
    assert widths(model, *RAGGED)[1] == [(8, 25) if attention else (1, 86 + 44)]
    model.eval()
    assert layout_of(model) == "shared"
    assert widths(model, *RAGGED)[1] == [(1, 86)]


def test_sharing_can_be_switched_off(llama: str) -> None:
    model = load_causal_lm(Base(name=llama)).double()
    shared, _ = widths(model, *RAGGED)
    with without_sharing():
        assert layout_of(model) == "packed"
        apart, shapes = widths(model, *RAGGED)
    assert shapes == [(1, 86 + 44)]
    sides = RAGGED[0].join(RAGGED[1])
    torch.testing.assert_close(real(shared, sides), real(apart, sides), rtol=0, atol=1e-12)
    assert layout_of(model) == "shared"


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "granite", "cohere", "gemma"])
def test_rows_of_many_lengths_are_packed(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny.save_model(tmp_path_factory.mktemp(kind), kind)
    model = load_causal_lm(Base(name=folder)).double()
    rows = [[7], [3, 9, 4, 4, 8], [5, 5, 6], [2, 9, 8, 7, 6, 5, 4, 3, 2]]
    sequences = Sequences.pad(rows, [[False] * len(row) for row in rows])
    states = sequence_states(model, sequences)
    assert states.shape[:2] == (4, 9)
    for row, found in zip(rows, states, strict=True):
        alone = hidden_states(model, torch.tensor([row]))[0]
        torch.testing.assert_close(found[: len(row)], alone, rtol=0, atol=1e-6)


def test_a_group_of_answers_shares_one_prompt(llama: str) -> None:
    """Rows in any order, two groups, a prompt of another length, and one of a lone token, which nobody shares."""
    model = load_causal_lm(Base(name=llama)).double()
    rows = [
        (2, [4, 4, 9]),
        (3, [8, 1, 2, 3, 5]),
        (2, [4, 4, 6, 6]),
        (3, [8, 1, 2, 7]),
        (1, [4, 4]),
        (2, [4, 4, 1]),
        (1, [4, 8]),
    ]
    sequences = Sequences.pad([t for _, t in rows], [[i >= n for i in range(len(t))] for n, t in rows])
    states, shapes = widths(model, sequences.select(torch.arange(3)), sequences.select(torch.arange(3, 7)))
    assert shapes == [(1, 23 - 2 * 2 - 3)]
    expected = hidden_states(model, sequences.tokens)
    torch.testing.assert_close(real(states, sequences), real(expected, sequences), rtol=0, atol=1e-12)


def test_recomputed_activations_are_those_of_the_sequences_too(llama: str) -> None:
    """Gradient checkpointing runs the layers again in the backward pass, with the segments."""
    gradients = []
    for checkpointing in (False, True):
        model = load_causal_lm(Base(name=llama, gradient_checkpointing=checkpointing)).double().train()
        real(sequence_states(model, RAGGED[0].join(RAGGED[1])), RAGGED[0].join(RAGGED[1])).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_bounds_and_keys_of_segments() -> None:
    """What the kernel of varying lengths is told: a prompt of 3 with 2 answers, and a sequence of its own."""
    segments = Segments.of(torch.tensor([5, 2, 4]), torch.tensor([0, 3, 0]), torch.device("cpu"))
    assert segments.query_bounds.tolist() == [0, 5, 7, 11]
    assert segments.key_bounds.tolist() == [0, 5, 10, 14]
    assert segments.keys is not None
    assert segments.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 8, 9, 10]
    assert Segments.of(torch.tensor([5, 2]), torch.tensor([0, 0]), torch.device("cpu")).keys is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel of varying lengths runs on GPUs")
def test_the_kernel_of_varying_lengths_agrees_with_one_call_a_segment() -> None:
    torch.manual_seed(0)
    segments = Segments.of(torch.tensor([50, 7, 20, 64]), torch.tensor([0, 30, 30, 0]), torch.device("cuda"))
    q, k, v = (torch.randn(1, heads, 141, 64, device="cuda", requires_grad=True) for heads in (8, 2, 2))
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        out, _ = attention(nn.Module(), q.to(dtype), k.to(dtype), v.to(dtype), None, segments)
        found.append([out.float(), *torch.autograd.grad(out.float().square().sum(), (q, k, v))])
    for exact, rounded in zip(*found, strict=True):
        assert float((exact - rounded).norm()) < 0.02 * float(exact.norm())


def test_the_context_limits_each_row_and_not_the_two_answers_together(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tiny.save_model(tmp_path_factory.mktemp("short"), "llama", max_position_embeddings=26)
    model = load_causal_lm(Base(name=folder)).double()
    states, shapes = widths(model, *RAGGED)
    assert shapes == [(1, 86)]
    sides = RAGGED[0].join(RAGGED[1])
    torch.testing.assert_close(real(states, sides), real(hidden_states(model, sides.tokens), sides), rtol=0, atol=1e-12)
    long = pairs([20], [4], [6])
    with pytest.raises(UserError, match=r"a sequence of 27 tokens does not fit the model's context of 26"):
        sequence_states(model, long[0].join(long[1]))


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("gpt2", {}),
        ("falcon", {"alibi": True, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
        ("mistral", {"sliding_window": 5}),
        ("gemma2", {"sliding_window": 5}),
        ("llama", {"attention": "eager"}),
    ],
)
def test_where_the_attention_takes_no_segments_rows_are_padded(
    kind: str, settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    attention = settings.get("attention")
    config = {key: value for key, value in settings.items() if key != "attention"}
    monkeypatch.setitem(tiny.SIZES, "falcon", {})
    folder = tiny.save_model(tmp_path_factory.mktemp(kind), kind, **config)
    base = Base(name=folder)
    model = load_causal_lm(replace(base, attention=attention) if attention else base)
    states, shapes = widths(model, *RAGGED)
    assert shapes[0][0] == 8
    assert states.equal(hidden_states(model, RAGGED[0].join(RAGGED[1]).tokens))
