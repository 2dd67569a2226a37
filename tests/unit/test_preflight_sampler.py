"""A sampler off its own distribution: found before a run learns from it, or an evaluation believes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from rlhf_lit.algorithms import DPO, GRPO, RLOO, SFT
from rlhf_lit.batches import Sequences
from rlhf_lit.data.records import Message, Prompt
from rlhf_lit.errors import UserError
from rlhf_lit.evaluation.answers import sampled
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.models.base import Base
from rlhf_lit.preflight.checks import model_checks
from rlhf_lit.preflight.sampler import prompts_of, sampler
from rlhf_lit.rollout.engine import Samples, Sampling
from rlhf_lit.rollout.gap import gap_of, of_different_lengths
from rlhf_lit.rollout.vllm_engine import VLLM

RWKV: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}


@pytest.fixture
def rwkv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(tiny.SIZES, "rwkv", RWKV)
    return tiny.save_model(tmp_path, "rwkv")


@pytest.fixture
def together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows generated together, whatever they do to one another."""
    monkeypatch.setattr("rlhf_lit.rollout.engine._company", lambda inner: "any")


@pytest.fixture
def shifted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama whose cache is read one position off: wrong in any company."""
    from transformers.models.llama.modeling_llama import LlamaModel

    forward = LlamaModel.forward

    def one_off(
        self: Any, input_ids: Tensor, position_ids: Any = None, past_key_values: Any = None, **rest: Any
    ) -> Any:
        if position_ids is not None and past_key_values is not None and past_key_values.get_seq_length():
            position_ids = position_ids + 1
        return forward(self, input_ids=input_ids, position_ids=position_ids, past_key_values=past_key_values, **rest)

    monkeypatch.setattr(LlamaModel, "forward", one_off)


def offline(folder: str) -> list[tuple[Any, Any]]:
    return [
        (tiny.build(SFT(Base(name=folder))), tiny.supervised()),
        (tiny.build(DPO(Base(name=folder), DPOLoss(beta=0.1))), tiny.preferences()),
    ]


def verdicts(module: Any, batch: Any) -> dict[str, Any]:
    with torch.no_grad():
        return {check.name: check for check in model_checks(module, batch)}


def on_policy(kind: Any, folder: str, **settings: Any) -> tuple[Any, Any]:
    return tiny.make_on_policy(kind, Base(name=folder), **settings), tiny.repeated(tiny.prompts(4), 2)


@pytest.mark.parametrize("kind", [RLOO, GRPO])
def test_a_run_that_would_learn_from_it_stops(kind: Any, rwkv: str, together: None) -> None:
    module, prompts = on_policy(kind, rwkv)
    check = verdicts(module, prompts)["sampler"]
    assert check.verdict == "failed"
    assert "0.0001 allowed" in check.found
    assert float(check.found.split(" apart")[0].split()[-1]) > 0.1


def test_in_company_that_they_bear_rows_are_sound(rwkv: str) -> None:
    for module, batch in (on_policy(RLOO, rwkv), *offline(rwkv)):
        assert verdicts(module, batch)["sampler"].verdict == "ok"


def test_elsewhere_it_is_a_warning(rwkv: str, together: None) -> None:
    for module, batch in offline(rwkv):
        found = verdicts(module, batch)["sampler"]
        assert found.verdict == "warning"
        assert "no win rate" in found.advice


def test_a_cache_that_is_read_wrongly_is_found(llama: str, shifted: None) -> None:
    assert verdicts(*on_policy(RLOO, llama))["sampler"].verdict == "failed"
    assert [verdicts(*run)["sampler"].verdict for run in offline(llama)] == ["warning", "warning"]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_and_filters_are_no_fault(llama: str, temperature: float) -> None:
    sampling = Sampling(temperature=temperature, top_k=3, top_p=0.9, max_new_tokens=12)
    module = tiny.build(SFT(Base(name=llama), sampling=sampling))
    assert verdicts(module, tiny.supervised())["sampler"].verdict == "ok"
    assert module.sampling is sampling


def test_nothing_is_used_up(llama: str) -> None:
    module, batch = offline(llama)[0]
    modes = {name: part.training for name, part in module.named_modules()}
    before = torch.get_rng_state()
    verdicts(module, batch)
    assert torch.get_rng_state().equal(before)
    assert modes == {name: part.training for name, part in module.named_modules()}


def test_no_room_for_an_answer_is_no_fault(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path, "llama", max_position_embeddings=16)
    module = tiny.build(SFT(Base(name=folder), sampling=Sampling(max_new_tokens=32)))
    assert verdicts(module, tiny.supervised())["sampler"].verdict == "skipped"


def test_an_evaluation_refuses_such_a_model(llama: str, request: pytest.FixtureRequest) -> None:
    module = tiny.build(SFT(Base(name=llama), sampling=Sampling(max_new_tokens=12)))
    module.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    asked = [Prompt([Message("user", f"w{row + 3} w4 w5")], row, {}) for row in range(4)]
    assert len(sampled(module, asked, 2, "auto", 0).texts) == 4
    request.getfixturevalue("shifted")
    with pytest.raises(
        UserError, match=r"sampler: its log-probs and those of the training forward .* apart, 0.0001 all"
    ):
        sampled(module, asked, 2, "auto", 0)


def test_prompts_of_one_length_are_made_different() -> None:
    """Padding is what many faults come from."""
    alike = Sequences.pad([[3, 4, 5], [6, 7, 8], [9, 3, 4]], [[False] * 3] * 3)
    made = of_different_lengths(alike)
    assert [row[:n].tolist() for row, n in zip(made.tokens, made.lengths, strict=True)] == [
        [3, 4, 5],
        [7, 8],
        [9, 3, 4],
    ]
    ragged = Sequences.pad([[3, 4], [6, 7, 8]], [[False] * 2, [False] * 3])
    assert of_different_lengths(ragged) is ragged
    rows = Sequences.pad([[3, 4, 5, 6], [7, 8, 9]], [[False, False, True, True], [True, True, True]])
    prompts = prompts_of(rows)
    assert [row[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths, strict=True)] == [[3, 4], [7]]


def test_the_median_of_the_worst_answer_is_judged() -> None:
    lengths = [12, 12, 3]
    sequences = Sequences.pad([[5] * n for n in lengths], [[True] * n for n in lengths])
    scored = torch.zeros(sequences.tokens.shape)

    def gap(distance: Tensor) -> float:
        return gap_of(Samples(sequences, distance, torch.ones(3, dtype=torch.bool)), scored)

    assert gap(torch.where(torch.arange(12) < 5, 3.0, 0.01).expand(3, -1)) == pytest.approx(0.01)  # single tokens
    assert gap(torch.tensor([[0.0], [0.4], [9.0]]).expand(-1, 12)) == pytest.approx(0.4)  # one row; too short a one
    assert gap(torch.full((3, 12), torch.nan)) == torch.inf


def test_vllm_in_half_width_is_judged_by_it(llama: str) -> None:
    from rlhf_lit.preflight.sampler import limit_of

    module, _ = on_policy(RLOO, llama)
    assert limit_of(module) == 1e-4
    for dtype, limit in (("bfloat16", 0.1), ("float32", 1e-4)):
        module.vllm = VLLM(dtype=dtype)  # type: ignore[arg-type]
        assert limit_of(module) == limit
    assert limit_of(tiny.build(SFT(Base(name=llama, dtype="bfloat16")))) == 0.1
    assert sampler(tiny.build(SFT(Base(name=llama, dtype="bfloat16"))), tiny.prompts().prompts).verdict == "ok"
