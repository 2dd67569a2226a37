"""Sampling: the softmax, and nothing else, decides what is drawn."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_lit.batches import Sequences
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.randomness import row_keys
from rlhf_lit.rollout import engine
from rlhf_lit.rollout.engine import Samples, Sampling, sample


@pytest.fixture(scope="module")
def model(llama: str) -> torch.nn.Module:
    return load_causal_lm(Base(name=llama))


def keys(index: Tensor) -> Tensor:
    return row_keys(11, index, torch.zeros_like(index))


def responses(samples: Samples) -> list[list[int]]:
    sequences = samples.sequences
    return [row[mask].tolist() for row, mask in zip(sequences.tokens, sequences.mask, strict=True)]


def draw(model: torch.nn.Module, rows: Tensor | None = None, **settings: int | float) -> Samples:
    batch = tiny.prompts(12)
    batch = batch if rows is None else batch.select(rows)
    sampling = Sampling(**{"max_new_tokens": 12, **settings})  # type: ignore[arg-type]
    return sample(model, batch.prompts, keys(batch.index), sampling, (tiny.EOS,))


def test_rows_at_once_order_and_company_change_no_sample(model: torch.nn.Module) -> None:
    expected = responses(draw(model))
    assert len({tuple(response) for response in expected}) == 12
    for rows_at_once in (1, 5, 12):
        assert responses(draw(model, rows_at_once=rows_at_once)) == expected
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    assert responses(draw(model, order, rows_at_once=5)) == [expected[i] for i in order.tolist()]
    assert responses(draw(model, torch.tensor([7]))) == [expected[7]]


def test_responses_are_cut_after_the_first_eos_which_stays(model: torch.nn.Module) -> None:
    samples = draw(model, max_new_tokens=60)
    ended = samples.ended.tolist()
    assert any(ended)
    assert not all(ended)
    for response, end in zip(responses(samples), ended, strict=True):
        assert (response[-1] == tiny.EOS) == end
        assert tiny.EOS not in response[:-1]
        assert end or len(response) == 60
    assert samples.sequences.lengths.equal(tiny.prompts(12).prompts.lengths + samples.sequences.mask.sum(-1))


def test_prompts_keep_their_own_eos_and_stand_unmasked(model: torch.nn.Module) -> None:
    prompts, samples = tiny.prompts(12).prompts, draw(model)
    for i, length in enumerate(prompts.lengths.tolist()):
        assert samples.sequences.tokens[i, :length].equal(prompts.tokens[i, :length])
        assert not samples.sequences.mask[i, :length].any()
        assert samples.sequences.mask[i, length : int(samples.sequences.lengths[i])].all()
    assert any(tiny.EOS in row[:n].tolist() for row, n in zip(prompts.tokens, prompts.lengths, strict=True))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_the_samplers_log_probs_are_those_of_the_training_forward(
    kind: str, temperature: float, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Left-padded and cached against right-padded without a mask: the positions must agree too (GPT-2 learns them)."""
    model = load_causal_lm(Base(name=tiny.save_model(tmp_path_factory.mktemp(kind), kind, spread=0.3)))
    samples = draw(model, temperature=temperature, rows_at_once=12)
    with torch.no_grad():
        expected = token_logprobs(model, samples.sequences, temperature)
    torch.testing.assert_close(samples.sampled_logprobs, expected, rtol=0, atol=2e-5)


def test_frequencies_are_the_softmax(model: torch.nn.Module) -> None:
    """4 000 first tokens of one prompt: chi-square over the 39 degrees of freedom, 72.1 is the 99.9 % point."""
    prompt = Sequences.pad([[1, 9, 4]] * 4000, [[False] * 3] * 4000)
    for temperature in (1.0, 0.5):
        sampling = Sampling(max_new_tokens=1, temperature=temperature, rows_at_once=4000)
        samples = sample(model, prompt, keys(torch.arange(4000)), sampling, (tiny.EOS,))
        with torch.no_grad():
            logits = model(torch.tensor([[1, 9, 4]])).logits[0, -1].double()
        expected = 4000 * torch.softmax(logits / temperature, -1)
        observed = torch.bincount(samples.sequences.tokens[:, 3], minlength=tiny.VOCABULARY).double()
        assert float(((observed - expected).square() / expected).sum()) < 72.1


def test_greedy_takes_the_largest_logit(model: torch.nn.Module) -> None:
    prompts = tiny.prompts(5).prompts
    samples = sample(model, prompts, None, Sampling(max_new_tokens=6), (tiny.EOS,))
    for row, length, response in zip(prompts.tokens, prompts.lengths, responses(samples), strict=True):
        tokens = row[:length].tolist()
        for token in response:
            assert int(model(torch.tensor([tokens])).logits[0, -1].argmax()) == token
            tokens.append(token)


def test_the_models_own_generation_defaults_are_left_out_and_put_back(model: torch.nn.Module) -> None:
    expected = responses(draw(model))
    config = model.generation_config
    config.repetition_penalty, config.top_k, config.temperature, config.do_sample = 5.0, 2, 0.1, True
    try:
        assert responses(draw(model)) == expected
        assert model.generation_config is config
    finally:
        config.repetition_penalty, config.top_k, config.temperature, config.do_sample = None, None, None, None


def test_any_stop_token_ends_a_response(model: torch.nn.Module) -> None:
    batch = tiny.prompts(12)
    samples = sample(model, batch.prompts, keys(batch.index), Sampling(max_new_tokens=40), (tiny.EOS, 7, 8))
    last = {response[-1] for response, end in zip(responses(samples), samples.ended, strict=True) if end}
    assert {7, 8} & last
    assert all(not {tiny.EOS, 7, 8} & set(response[:-1]) for response in responses(samples))


@contextmanager
def reads(model: torch.nn.Module) -> Iterator[list[tuple[int, int]]]:
    """The [rows, time] of each forward inside."""
    shapes: list[tuple[int, int]] = []
    hook = model.register_forward_pre_hook(
        lambda _, args, given: shapes.append(tuple(given["input_ids"].shape)), with_kwargs=True
    )
    try:
        yield shapes
    finally:
        hook.remove()


def never(criterion: object, input_ids: Tensor, scores: Tensor) -> Tensor:
    """A stopping criterion that stops nothing."""
    return torch.zeros(len(input_ids), dtype=torch.bool)


ATTENTION = {"llama": {}, "gpt2": {}, "mistral": {"sliding_window": 5}, "gemma2": {"sliding_window": 5}}


@pytest.mark.parametrize("kind", ATTENTION)
def test_rows_that_have_ended_are_dropped_and_no_sample_changes(
    kind: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tiny.save_model(tmp_path_factory.mktemp(kind), kind, **ATTENTION[kind])
    model = load_causal_lm(Base(name=folder))
    batch = tiny.prompts(24)
    settings = Sampling(max_new_tokens=40, rows_at_once=24)

    def answers() -> tuple[Samples, list[tuple[int, int]]]:
        with reads(model) as shapes:
            return sample(model, batch.prompts, keys(batch.index), settings, (tiny.EOS, 7, 8)), shapes

    engine._company(model)  # tried out once for each model
    samples, shapes = answers()
    rows = [rows for rows, _ in shapes]
    assert rows == sorted(rows, reverse=True)
    assert len(set(rows)) >= 3, "24, at most 12, at most 6"
    assert all(time == 1 for _, time in shapes[1:]), "nothing is read twice"
    monkeypatch.setattr(engine._HalfEnded, "__call__", never)
    alone, all_rows = answers()
    assert {rows for rows, _ in all_rows} == {24}
    assert responses(samples) == responses(alone)
    torch.testing.assert_close(samples.sampled_logprobs, alone.sampled_logprobs, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["lfm2", "mamba"])
def test_models_with_states_in_place_of_keys_are_sampled_from_too(
    kind: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Convolutions beside attention, and no attention at all; prompts of one length, as states would see padding."""
    layers = {"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {}
    config = AutoConfig.for_model(
        kind, vocab_size=tiny.VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=64, initializer_range=0.15, eos_token_id=tiny.EOS, pad_token_id=0,
        **layers,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    prompts = Sequences.pad([[1, 9, 4 + i] for i in range(16)], [[False] * 3] * 16)
    settings = Sampling(max_new_tokens=30, rows_at_once=16)

    def answers() -> list[list[int]]:
        return responses(sample(model, prompts, keys(torch.arange(16)), settings, (tiny.EOS, 7, 8)))

    dropping = answers()
    assert len({len(answer) for answer in dropping}) > 4
    monkeypatch.setattr(engine._HalfEnded, "__call__", never)
    assert dropping == answers()


@pytest.mark.parametrize("kind", ATTENTION)
def test_a_prompt_with_several_samples_is_read_once(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tiny.save_model(tmp_path_factory.mktemp(kind), kind, **ATTENTION[kind])
    model = load_causal_lm(Base(name=folder))
    prompts = tiny.prompts(4).prompts
    many = prompts.select(torch.arange(4).repeat_interleave(3))
    settings = Sampling(max_new_tokens=6, rows_at_once=12)
    engine._company(model)
    with reads(model) as shapes:
        samples = sample(model, many, keys(torch.arange(12)), settings, (tiny.EOS,))
    longest = int(prompts.lengths.max())
    windowed = "sliding_window" in ATTENTION[kind]  # of which a token cannot be taken back
    assert shapes[:2] == [(12 if windowed else 4, longest), (12, 1)]
    apart = [
        sample(model, many.select(torch.tensor([i])), keys(torch.tensor([i])), settings, (tiny.EOS,)) for i in range(12)
    ]
    assert responses(samples) == [responses(one)[0] for one in apart]
    assert len({tuple(response) for response in responses(samples)}) > 8
    with reads(model) as shapes:
        sample(model, prompts, keys(torch.arange(4)), settings, (tiny.EOS,))
    assert shapes[0] == (4, longest), "different prompts are read together, not in advance"


@pytest.mark.parametrize("settings", [{"max_new_tokens": 0}, {"temperature": 0.0}, {"rows_at_once": 0}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"sampling.{next(iter(settings))}"):
        Sampling(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(("filters", "kept"), [({"top_k": 3}, 3), ({"top_p": 0.5}, None), ({"top_k": 1}, 1)])
def test_filtered_samples_stay_in_the_filter(
    model: torch.nn.Module, filters: dict[str, float], kept: int | None
) -> None:
    """First tokens of many draws: the likeliest, none beyond; their log-probs are the filtered distribution's."""
    prompt = tiny.prompts(1).prompts
    many = prompt.select(torch.zeros(300, dtype=torch.int64))
    sampling = Sampling(max_new_tokens=1, rows_at_once=300, **filters)  # type: ignore[arg-type]
    samples = sample(model, many, keys(torch.arange(300)), sampling, (tiny.EOS,))
    with torch.no_grad():
        logits: Tensor = model(prompt.tokens).logits[0, -1]  # type: ignore[operator]
    order = logits.argsort(descending=True)
    if kept is None:  # the fewest that reach the probability
        kept = int((logits.softmax(-1)[order].cumsum(-1) < filters["top_p"]).sum()) + 1
        assert 1 < kept < 20
    allowed = order[:kept]
    drawn = samples.sequences.tokens[:, -1]
    assert set(drawn.tolist()) == set(allowed.tolist())
    table = torch.full_like(logits, -torch.inf).scatter(0, allowed, logits[allowed]).log_softmax(-1)
    torch.testing.assert_close(samples.sampled_logprobs[:, -1], table[drawn], rtol=0, atol=1e-5)


@pytest.mark.parametrize(("setting", "bad"), [("top_k", 0), ("top_p", 0.0), ("top_p", 1.5)])
def test_filters_that_keep_nothing_are_refused(setting: str, bad: float) -> None:
    with pytest.raises(ValueError, match=rf"sampling\.{setting}"):
        Sampling(**{setting: bad})  # type: ignore[arg-type]


MIXING = {
    "rwkv": {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64},
    "deepseek_v4": {
        "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16,
        "qk_rope_head_dim": 8, "q_lora_rank": 16, "o_lora_rank": 8, "o_groups": 2, "moe_intermediate_size": 16,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "max_position_embeddings": 128,
        "layer_types": ["compressed_sparse_attention", "heavily_compressed_attention"],
        "index_head_dim": 8, "index_n_heads": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "company"), [("rwkv", "none"), ("deepseek_v4", "equal")])
def test_rows_that_change_one_another_are_generated_apart(
    kind: str, company: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """RWKV's states mix the rows of a batch; DeepSeek-V4's compressed keys take in the padding."""
    monkeypatch.setitem(tiny.SIZES, kind, MIXING[kind])
    model = load_causal_lm(Base(name=tiny.save_model(tmp_path_factory.mktemp(kind), kind)))
    before = torch.get_rng_state()
    samples = draw(model, max_new_tokens=20)
    assert torch.get_rng_state().equal(before)
    assert vars(model)["company"] == company

    def gap(samples: Samples) -> float:
        with torch.no_grad():
            return float((token_logprobs(model, samples.sequences) - samples.sampled_logprobs).abs().max())

    assert gap(samples) < 2e-5
    apart = [responses(draw(model, torch.tensor([row]), max_new_tokens=20))[0] for row in range(12)]
    assert responses(samples) == apart
    model.company = "any"
    assert gap(draw(model, max_new_tokens=20)) > 0.1


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [*((kind, "float32") for kind in [*ATTENTION, "falcon_h1"]), ("llama", "bfloat16"), ("mistral", "bfloat16")],
)
def test_other_models_generate_any_rows_together(
    kind: str, dtype: Any, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    hybrid = {**tiny.SIZES["qwen2"], "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8}
    monkeypatch.setitem(tiny.SIZES, "falcon_h1", hybrid)
    folder = tiny.save_model(tmp_path_factory.mktemp(kind), kind, **ATTENTION.get(kind, {}))
    model = load_causal_lm(Base(name=folder, dtype=dtype))
    assert engine._company(model) == "any"


@pytest.mark.parametrize("kind", ["recurrent_gemma", "falcon_h1"])
def test_rows_that_have_ended_take_no_state_with_them(kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """RecurrentGemma keeps states on its layers and not in the cache, which gives up the rows that are dropped."""
    model = load_causal_lm(Base(name=tiny.save_model(tmp_path_factory.mktemp(kind), kind, spread=0.3)))
    prompts = Sequences.pad([[1, 9, 7, 5 + i] for i in range(6)], [[False] * 4] * 6)
    samples = sample(model, prompts, keys(torch.arange(6)), Sampling(max_new_tokens=16), (tiny.EOS, 5, 6, 7, 8, 9))
    ends = sorted(samples.sequences.lengths.tolist())
    assert ends[2] < ends[-1] - 3, "half of them end before the others"
    with torch.no_grad():
        scored = token_logprobs(model, samples.sequences)
    torch.testing.assert_close(samples.sampled_logprobs, scored, rtol=0, atol=1e-5)
