"""Rotary frequencies that depend on the longest position of a call: each sequence gets those of a row of its own."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from rlhf_lit.algorithms import DPO, SFT
from rlhf_lit.batches import PreferenceBatch, PromptBatch, Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.models.anatomy import stop_ids
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.packing import hidden_states, layout_of, sequence_states, without_sharing
from rlhf_lit.models.rope import first_context, leaves_room
from rlhf_lit.rollout.engine import Sampling, sample
from rlhf_lit.rollout.vllm_engine import VLLM, VLLMEngine

FIRST = 16  # tokens of the context that the tiny models say they were first trained on
SHORT, LONG = [1.0, 1.0, 1.1, 1.2], [1.0, 2.0, 4.0, 7.0]
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": SHORT,
    "long_factor": LONG,
    "original_max_position_embeddings": FIRST,
    "short_mscale": 1.1,
    "long_mscale": 1.3,
}
SMALL: dict[str, Any] = {**tiny.SIZES["llama"], "num_key_value_heads": 2, "max_position_embeddings": 128}
KINDS: dict[str, dict[str, Any]] = {
    "phi3": SMALL | {"original_max_position_embeddings": FIRST, "rope_parameters": LONGROPE},
    "phimoe": SMALL | {"original_max_position_embeddings": FIRST, "rope_parameters": LONGROPE, "num_local_experts": 4},
    "llama": SMALL | {"rope_parameters": LONGROPE},
    "gemma3_text": SMALL
    | {
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            "full_attention": LONGROPE,
            "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        },
    },
}


@pytest.fixture(params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(tiny.SIZES, request.param, KINDS[request.param])
    return tiny.save_model(tmp_path, request.param)


def on_both_sides() -> Sequences:
    """Rows below and beyond the first context, exactly as long and one longer; a prompt with answers on both sides."""
    generator = torch.Generator().manual_seed(0)
    prompt = tiny.words(generator, 10)
    sizes = [(3, 2), (10, 4), (10, 20), (10, 6), (10, 7), (12, 30), (1, 3), (10, 25)]
    rows = [(prompt if n == 10 else tiny.words(generator, n)) + tiny.words(generator, answer) for n, answer in sizes]
    assert {FIRST, FIRST + 1} <= {len(row) for row in rows}
    return Sequences.pad(rows, [[False] * n + [True] * answer for n, answer in sizes])


def alone(model: Any, sequences: Sequences) -> Tensor:
    """[tokens, width] of each row by itself, in the model's own plain forward."""
    body = getattr(model, model.base_model_prefix)
    rows = zip(sequences.tokens, sequences.lengths.tolist(), strict=True)
    return torch.cat([body(row[None, :n], use_cache=False).last_hidden_state[0] for row, n in rows])


def inside(states: Tensor, sequences: Sequences) -> Tensor:
    return states[torch.arange(states.shape[1]) < sequences.lengths[:, None]]


@pytest.mark.parametrize("attention", [None, "eager"])
def test_states_and_gradients_are_those_of_each_row_alone(folder: str, attention: Any) -> None:
    model: Any = load_causal_lm(Base(name=folder, attention=attention))
    assert first_context(model) == FIRST
    sequences = on_both_sides()
    expected = alone(model, sequences)
    weights = torch.linspace(-1, 1, expected.shape[-1])
    (expected * weights).square().sum().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    for _ in range(2):  # with prompts shared on either side, and without
        model.zero_grad()
        states = inside(sequence_states(model, sequences), sequences)
        torch.testing.assert_close(states, expected, rtol=0, atol=2e-5)
        (states * weights).square().sum().backward()
        found = [p.grad for p in model.parameters() if p.grad is not None]
        for one, other in zip(found, gradients, strict=True):
            assert float((one - other).norm()) <= 1e-4 * float(other.norm())
    with without_sharing(), torch.no_grad():
        torch.testing.assert_close(inside(sequence_states(model, sequences), sequences), expected, rtol=0, atol=2e-5)


def test_the_two_sets_do_differ(folder: str) -> None:
    """Else nothing above would be tested: beside a longer row, a plain forward says something else of a short one."""
    model = load_causal_lm(Base(name=folder))
    sequences = on_both_sides()
    with torch.no_grad():
        together = hidden_states(model, sequences.tokens)[0, :5]
        by_itself = hidden_states(model, sequences.tokens[:1, :5])[0]
    assert float((together - by_itself).abs().max()) > 0.02


def test_rows_of_one_side_are_left_to_the_model(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = load_causal_lm(Base(name=folder))
    monkeypatch.setattr(
        "rlhf_lit.models.rope._Chosen.__call__", lambda *_: pytest.fail("the factors were chosen again")
    )
    sequences = on_both_sides()
    for side in (sequences.lengths <= FIRST, sequences.lengths > FIRST):
        part = sequences.select(side.nonzero().squeeze(-1))
        with torch.no_grad():
            states = inside(sequence_states(model, part), part)
            torch.testing.assert_close(states, alone(model, part), rtol=0, atol=2e-5)


def test_scorers_and_pairs_too(folder: str) -> None:
    scorer: Any = load_scorer(Base(name=folder))
    sequences = on_both_sides()
    with torch.no_grad():
        states = inside(sequence_states(scorer, sequences), sequences)
        torch.testing.assert_close(states, alone(scorer, sequences), rtol=0, atol=2e-5)
    # A pair on both sides of the first context, in one micro-batch or with others.
    sides = on_both_sides()
    chosen, rejected = sides.select(torch.tensor([1, 2, 3])), sides.select(torch.tensor([7, 3, 4]))
    steps = []
    for budget in (1, tiny.EVERYTHING):
        module = tiny.build(DPO(Base(name=folder, lora=LoRA(targets=["o_proj"])), DPOLoss(beta=0.5)))
        tiny.disturb(module, 0.05)
        steps.append(tiny.Step(module, PreferenceBatch(chosen, rejected, torch.zeros(3), budget)))
    steps[0].assert_equals(steps[1], 2e-5)


def prompts_of(lengths: list[int]) -> PromptBatch:
    generator = torch.Generator().manual_seed(1)
    rows = [tiny.words(generator, n) for n in lengths]
    padded = Sequences.pad(rows, [[False] * n for n in lengths])
    index = torch.arange(len(rows))
    return PromptBatch(padded, index, 0 * index, tuple(map(str, lengths)), tuple({} for _ in rows), tiny.EVERYTHING)


def test_samples_are_drawn_as_they_are_scored(folder: str) -> None:
    """Short and long prompts of one call; each answer stays on its prompt's side."""
    model = load_causal_lm(Base(name=folder))
    tokenizer = tiny.make_tokenizer()
    prompts, keys = prompts_of([3, 30, 8, 17, 10, 17]).prompts, 7919 * torch.arange(6)
    samples = sample(model, prompts, keys, Sampling(max_new_tokens=6), stop_ids(tokenizer, model))
    with torch.no_grad():
        scored = token_logprobs(model, samples.sequences)
    torch.testing.assert_close(samples.sampled_logprobs, scored, rtol=0, atol=1e-5)
    for row, key in enumerate(keys):
        one = prompts.select(torch.tensor([row]))
        drawn = sample(model, one, key[None], Sampling(max_new_tokens=6), stop_ids(tokenizer, model))
        n = int(drawn.sequences.lengths[0])
        assert drawn.sequences.tokens[0, :n].equal(samples.sequences.tokens[row, :n])


def test_answers_that_may_cross_are_refused(folder: str) -> None:
    module = tiny.build(SFT(Base(name=folder), sampling=Sampling(max_new_tokens=6)))
    module.respond(prompts_of([10, 17, 30]))
    with pytest.raises(UserError, match=r"after a prompt of 11 tokens a response may reach 17, and at 16 the model"):
        module.respond(prompts_of([10, 11, 17]))
    asked = SimpleNamespace(sample_prompts=lambda: prompts_of([10, 11, 16, 17]))
    module._trainer = SimpleNamespace(datamodule=asked)  # type: ignore[assignment]
    assert [record["prompt"] for record in module.sample_completions()] == ["10", "17"]
    rooms = {n: leaves_room(module.roles.policy, n, 6) for n in (10, 11, 16, 17, 122, 123)}
    assert rooms == {10: True, 11: False, 16: False, 17: True, 122: True, 123: False}


def test_frequencies_that_grow_with_the_call_are_never_reached(tmp_path: Path) -> None:
    """Dynamic NTK: beyond the config's context alone, where every row is refused; within it nothing changes."""
    rope = {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 4.0}
    folder = tiny.save_model(tmp_path, "llama", max_position_embeddings=FIRST, rope_parameters=rope)
    model: Any = load_causal_lm(Base(name=folder))
    assert first_context(model) is None
    sequences = on_both_sides()
    fitting = sequences.select((sequences.lengths <= FIRST).nonzero().squeeze(-1))
    with torch.no_grad():
        states = inside(sequence_states(model, fitting), fitting)
        torch.testing.assert_close(states, alone(model, fitting), rtol=0, atol=2e-5)
    with pytest.raises(UserError, match="does not fit the model's context of 16"):
        sequence_states(model, sequences)


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_other_kinds_are_the_same_for_every_call(kind: str, tmp_path: Path) -> None:
    rope = {
        "rope_type": kind, "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": FIRST,
        "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    }  # fmt: skip
    folder = tiny.save_model(tmp_path, "llama", max_position_embeddings=4 * FIRST, rope_parameters=rope)
    model: Any = load_causal_lm(Base(name=folder))
    assert first_context(model) is None
    assert layout_of(model) == "shared"
    sequences = on_both_sides()
    with torch.no_grad():
        states = inside(sequence_states(model, sequences), sequences)
        torch.testing.assert_close(states, alone(model, sequences), rtol=0, atol=2e-5)


def test_no_kind_of_transformers_is_forgotten() -> None:
    """A new kind of frequencies may depend on the call too: look at it, and add it here."""
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_INIT_FUNCTIONS) == {"linear", "dynamic", "yarn", "longrope", "llama3", "proportional"}


def test_vllm_is_given_lengths_of_one_side_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes one set of frequencies for all rows, by the longest length that it may be asked for."""
    monkeypatch.setitem(tiny.SIZES, "phi3", KINDS["phi3"])
    model = load_causal_lm(Base(name=tiny.save_model(tmp_path, "phi3")))
    prompts, keys = prompts_of([3, 8]).prompts, torch.arange(2)
    for settings in (VLLM(), VLLM(max_length=FIRST + 1)):
        with pytest.raises(UserError, match=r"model\.vllm\.max_length: vLLM has one set .* set it to at most 16"):
            VLLMEngine(settings)(model, prompts, keys, Sampling(max_new_tokens=4), (tiny.EOS,))
    VLLMEngine(VLLM(max_length=FIRST))._check(prompts, Sampling(max_new_tokens=4), first_context(model))
