"""All of vLLM's engine but vLLM, which a strict stand-in replaces: requests, answers, weights, memory, correction."""

from __future__ import annotations

import importlib.util
import math
import os
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import vllm_double
from jsonargparse import Namespace, dict_to_namespace
from lightning import Callback, Trainer
from vllm_double import CompletionOutput, Logprob, RequestOutput

from rlhf_lit.algorithms import GRPO, PPO, RLOO
from rlhf_lit.batches import Sequences
from rlhf_lit.data.modules import RolloutDataModule
from rlhf_lit.data.records import Source
from rlhf_lit.errors import UserError
from rlhf_lit.losses.kl import FixedKL
from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss
from rlhf_lit.memory.measurement import Measurement
from rlhf_lit.memory.phases import out_of_memory
from rlhf_lit.memory.worst_case import prepare
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.merging import merged_weights
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.models.roles import Critic
from rlhf_lit.randomness import row_keys
from rlhf_lit.rollout.engine import Samples, Sampling
from rlhf_lit.rollout.rewards import RewardFromFunction
from rlhf_lit.rollout.vllm_engine import VLLM, VLLMEngine, arguments, read, request, require_vllm

STOPS = (tiny.EOS, 7, 8)
EXACT = VLLM(dtype="float32")


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch) -> list[vllm_double.LLM]:
    """The stand-in in vllm's place. → what was made of it."""
    vllm_double.install(monkeypatch)
    return vllm_double.LLM.made


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """Levels of sleep as on a GPU."""
    sleep_on = VLLM.sleep_on
    monkeypatch.setattr(VLLM, "sleep_on", lambda settings, device: sleep_on(settings, torch.device("cuda")))


def draw(engine: VLLMEngine, model: Any, rows: list[int] | None = None, sampling: Sampling = Sampling(12)) -> Samples:
    batch = tiny.prompts(12).select(torch.tensor(rows if rows is not None else range(12)))
    keys = row_keys(11, batch.index, torch.zeros_like(batch.index))
    with torch.no_grad():
        return engine(model, batch.prompts, keys, sampling, STOPS)


def responses(samples: Samples) -> list[list[int]]:
    rows = zip(samples.sequences.tokens, samples.sequences.mask, strict=True)
    return [row[mask].tolist() for row, mask in rows]


# --- requests and answers --------------------------------------------------------------------------------------------


def test_a_request() -> None:
    plain = request(Sampling(5, 0.7), (2, 9), -3)
    assert plain == {
        "temperature": 0.7, "top_k": 0, "top_p": 1.0, "max_tokens": 5, "seed": 2**63 - 3, "stop_token_ids": [2, 9],
        "ignore_eos": True, "logprobs": 0, "detokenize": False,
    }  # fmt: skip
    filtered = request(Sampling(5, top_k=4, top_p=0.9), (2,), 17)
    assert (filtered["top_k"], filtered["top_p"], filtered["seed"]) == (4, 0.9, 17)
    assert request(Sampling(5), (2,), -1)["seed"] > 0


def test_the_settings_reach_vllm() -> None:
    chosen = arguments(VLLM(0.4, "float16", 128, 2, True), Sampling(rows_at_once=9), 2, "here")
    assert chosen == {
        "model": "here", "skip_tokenizer_init": True, "load_format": "dummy", "generation_config": "vllm",
        "dtype": "float16", "max_model_len": 128, "max_num_seqs": 9, "gpu_memory_utilization": 0.4,
        "enable_sleep_mode": True, "enforce_eager": True, "logprobs_mode": "processed_logprobs",
    }  # fmt: skip
    assert not arguments(VLLM(), Sampling(), 0, "here")["enable_sleep_mode"]


def answer(tokens: list[int], logprobs: list[float], reason: str | None) -> RequestOutput:
    table = [{token: Logprob(value)} for token, value in zip(tokens, logprobs, strict=True)]
    return RequestOutput([], [CompletionOutput(tokens, table, reason)])


def test_answers_become_samples() -> None:
    prompts = Sequences.pad([[5, 6, 4], [9]], [[False] * 3, [False]])
    found = read([answer([3, 2], [-0.5, -1.5], "stop"), answer([4, 4, 6], [-1, -2, -3], "length")], prompts, (2,))
    assert found.sequences.tokens.tolist() == [[5, 6, 4, 3, 2], [9, 4, 4, 6, 0]]
    assert found.sequences.lengths.tolist() == [5, 4]
    assert found.sequences.mask.tolist() == [[False] * 3 + [True] * 2, [False] + [True] * 3 + [False]]
    assert found.sampled_logprobs.tolist() == [[0, 0, 0, -0.5, -1.5], [0, -1, -2, -3, 0]]
    assert found.ended.tolist() == [True, False]


def test_a_likelier_token_beside_the_drawn_one_is_not_taken_for_it() -> None:
    output = answer([3], [-2.0], "length")
    output.outputs[0].logprobs = [{8: Logprob(-0.1, 1), 3: Logprob(-2.0, 5)}]
    prompts = Sequences.pad([[5]], [[False]])
    assert read([output], prompts, (2,)).sampled_logprobs.tolist() == [[0, -2.0]]


@pytest.mark.parametrize("reason", ["abort", None])
def test_an_answer_that_was_given_up_ends_the_run(reason: str | None) -> None:
    prompts = Sequences.pad([[5], [5]], [[False], [False]])
    with pytest.raises(UserError, match=rf"model\.vllm: vLLM ended the response to row 1 by {reason!r}"):
        read([answer([3], [-1], "length"), answer([3], [-1], reason)], prompts, (2,))


# --- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"lora": LoRA(4)}, {"lora": LoRA(4), "quantization": Quantization(compute_dtype="float32")}],
    ids=["whole", "lora", "4 bit"],
)
def test_each_draw_is_of_the_weights_as_they_are(double: Any, card: None, llama: str, settings: dict[str, Any]) -> None:
    """Its log-probs are the training forward's, at the first draw, and after an update."""
    model = load_causal_lm(Base(llama, **settings))
    engine, sampling = VLLMEngine(EXACT), Sampling(12, 0.7)
    first: list[list[int]] = []
    for step in range(2):
        tiny.disturb(model, 0.1, step)
        samples = draw(engine, model, sampling=sampling)
        expected = token_logprobs(model, samples.sequences, 0.7).detach()
        torch.testing.assert_close(samples.sampled_logprobs, expected, rtol=0, atol=1e-4)
        assert samples.ended.any()
        assert responses(samples) != first
        first = responses(samples)
    assert len(double) == 1
    assert double[0].slept == [1, 1]
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"


def test_draws_are_keyed_by_their_rows(double: Any, llama: str) -> None:
    model = load_causal_lm(Base(llama))
    every = responses(draw(VLLMEngine(EXACT), model))
    assert len({tuple(row) for row in every}) == 12
    assert responses(draw(VLLMEngine(EXACT), model, [7, 2])) == [every[7], every[2]]


@pytest.mark.parametrize("sleep", [0, 2])
def test_it_sleeps_as_it_is_told(double: Any, card: None, llama: str, sleep: Any) -> None:
    model, engine = load_causal_lm(Base(llama)), VLLMEngine(VLLM(sleep=sleep))
    draw(engine, model)
    draw(engine, model)
    assert double[0].slept == [sleep, sleep] * (sleep > 0)


def test_on_a_cpu_it_stays_awake(double: Any, llama: str) -> None:
    model, engine = load_causal_lm(Base(llama)), VLLMEngine(VLLM())
    draw(engine, model)
    draw(engine, model)
    assert double[0].slept == []
    assert not double[0].sleeps
    draw(VLLMEngine(VLLM(sleep=0)), model)
    with pytest.raises(UserError, match=r"^model\.vllm\.sleep: on a CPU .* the level is 1; set it to 0 or null"):
        draw(VLLMEngine(VLLM(sleep=1)), model)


TIED: dict[str, Any] = {"tie_word_embeddings": True}


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("qwen2", None),
        ("gemma2", None),
        ("cohere", LoRA(4)),
        ("qwen2", LoRA(4)),
        ("qwen2", LoRA(4, targets=["embed_tokens"])),
        ("qwen2", LoRA(4, targets=["q_proj", "lm_head"])),
    ],
    ids=["whole", "no head in vLLM", "no head, lora", "lora", "lora on the embeddings", "lora on the head"],
)
def test_a_tied_models_head_is_given_too(double: Any, tmp_path: Path, kind: str, lora: LoRA | None) -> None:
    """vLLM's own would stay as it was built; an adapter on one of the two ends acts there alone."""
    model = load_causal_lm(Base(tiny.save_model(tmp_path, kind, **TIED), lora=lora))
    engine = VLLMEngine(EXACT)
    for step in range(2):
        tiny.disturb(model, 0.1, step)
        samples = draw(engine, model)
        expected = token_logprobs(model, samples.sequences, 1.0).detach()
        torch.testing.assert_close(samples.sampled_logprobs, expected, rtol=0, atol=1e-4)
    assert ("lm_head.weight" in double[0].weights) == (kind == "qwen2")


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"]])
def test_an_adapter_on_one_end_of_what_vllm_ties_is_refused(double: Any, tmp_path: Path, targets: list[str]) -> None:
    model = load_causal_lm(Base(tiny.save_model(tmp_path, "gemma2", **TIED), lora=LoRA(4, targets=targets)))
    with pytest.raises(UserError, match=r"base\.lora\.targets: the embeddings and the LM head share their weights"):
        draw(VLLMEngine(EXACT), model)


def test_the_global_generators_stay_as_they_are(double: Any, llama: str) -> None:
    model = load_causal_lm(Base(llama))
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    draw(VLLMEngine(EXACT), model)
    assert before[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.get_rng_state().equal(before[2])


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ("1 validation error for ModelConfig\n  Value error, max_model_len (99) is too long [type=…]\n  For further …",
         "Value error, max_model_len (99) is too long [type=…]"),
        ("no room for the cache\nmore", "no room for the cache"),
    ],
)  # fmt: skip
def test_what_vllm_refuses_at_its_start_is_one_line(
    double: Any, llama: str, monkeypatch: pytest.MonkeyPatch, said: str, line: str
) -> None:
    model = load_causal_lm(Base(llama))

    def refuse(self: Any, **settings: Any) -> None:
        torch.set_num_threads = None  # type: ignore[assignment]
        raise ValueError(said)

    set_num_threads = torch.set_num_threads
    monkeypatch.setattr(vllm_double.LLM, "__init__", refuse)
    with pytest.raises(UserError) as caught:
        draw(VLLMEngine(EXACT), model)
    assert str(caught.value) == f"model.vllm: vLLM does not start: {line}"
    assert torch.set_num_threads is set_num_threads


def test_memory_that_runs_out_at_its_start_is_told_as_such(
    double: Any, llama: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, **settings: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(vllm_double.LLM, "__init__", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        draw(VLLMEngine(EXACT), load_causal_lm(Base(llama)))


def test_it_lets_go_of_vllm(double: Any, llama: str) -> None:
    model, engine = load_causal_lm(Base(llama)), VLLMEngine(EXACT)
    first = responses(draw(engine, model))
    engine.close()
    engine.close()
    assert double[0].closed
    assert responses(draw(engine, model)) == first
    assert len(double) == 2


def test_mixed_precision_does_not_touch_what_is_merged(double: Any, llama: str) -> None:
    model = load_causal_lm(Base(llama, lora=LoRA(4)))
    tiny.disturb(model, 0.1)
    with torch.autocast("cpu", torch.bfloat16):
        draw(VLLMEngine(EXACT), model)
    for name, weight in merged_weights(model):
        assert double[0].weights[name].equal(weight), name


# --- a run -----------------------------------------------------------------------------------------------------------


def fit(module: Any, folder: Path) -> list[dict[str, float]]:
    """Two rollouts, one step on each. → the steps' metrics."""
    (folder / "prompts.txt").write_text("".join(f"w{3 + i} w{9 + i}\n" for i in range(4)))
    logged: list[dict[str, float]] = []

    class Note(Callback):
        def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
            logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    trainer = Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[Note()], default_root_dir=folder,
    )  # fmt: skip
    data = RolloutDataModule(
        train=Source(str(folder / "prompts.txt")), rollout_size=4, samples_per_prompt=2, batch_size=8, ppo_epochs=1,
        template="none", cache=None,
    )  # fmt: skip
    trainer.fit(module, data)
    return logged


def make(kind: Any, llama: str, **settings: Any) -> Any:
    chosen: dict[str, Any] = {"critic": Critic(init="policy")} if kind is PPO else {}
    chosen |= {"vllm": EXACT, "learning_rate": 1e-2, "sampling": Sampling(4), **settings}
    base = chosen.pop("base", Base(llama))
    return kind(base, RewardFromFunction(tiny.word_count), FixedKL(0.1), **chosen)


@pytest.mark.parametrize("kind", [PPO, RLOO, GRPO])
def test_a_run_learns_from_what_vllm_draws(
    double: Any, llama: str, tmp_path: Path, kind: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of first tokens its log-probs are off by a known amount: the metric tells, and the loss is corrected for it."""
    shift = 0.0 if kind is PPO else 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_double.LLM, "shift", shift)
        base = Base(llama, lora=LoRA(4)) if kind is PPO else Base(llama)
        module = make(kind, llama, base=base, policy_loss=ClippedPolicyLoss(importance_cap=2.0))
        steps = fit(module, tmp_path)
    assert len(double) == 1
    assert double[0].closed
    for step in steps:
        assert step["rollout/sampler_gap"] == pytest.approx(shift, abs=1e-4)
        expected = 1 + (math.exp(-shift) - 1) / step["rollout/length"]
        assert step["policy/importance"] == pytest.approx(expected, abs=1e-4)
    assert "nothing corrects" not in capsys.readouterr().err


def test_an_uncorrected_run_says_so(
    double: Any, llama: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit(make(RLOO, llama), tmp_path)
    assert "note: model.vllm: its log-probs differ from the training forward's" in capsys.readouterr().err


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "device", "ranks", "complaint"),
    [
        (False, "cuda", 1, r"vLLM is not installed: pip install 'rlhf-lit\[vllm\]'"),
        (True, "mps", 1, "samples on a GPU or a CPU, and this run is on mps"),
        (True, "cuda:0", 2, "runs in one process, and this run has 2"),
        (True, "cuda:0", 1, "the vLLM that is installed samples on cpu, and this run is on cuda:0; set trainer.acc"),
    ],
)
def test_where_vllm_cannot_run(
    double: Any, monkeypatch: pytest.MonkeyPatch, installed: bool, device: str, ranks: int, complaint: str
) -> None:
    require_vllm(torch.device("cpu"), 1)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if installed else None)
    with pytest.raises(UserError, match=rf"^model\.vllm: {complaint}"):
        require_vllm(torch.device(device), ranks)


def test_its_environment_is_the_users_first(double: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "DEBUG")
    monkeypatch.delenv("VLLM_NO_USAGE_STATS", raising=False)
    require_vllm(torch.device("cpu"), 1)
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG"
    assert os.environ["VLLM_NO_USAGE_STATS"] == "1"


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"gpu_memory_utilization": 0.0}, r"vllm\.gpu_memory_utilization must lie in \(0, 1\), not 0"),
        ({"gpu_memory_utilization": 1.0}, r"vllm\.gpu_memory_utilization must lie in \(0, 1\), not 1"),
        ({"max_length": 1}, r"vllm\.max_length must be at least 2 or null, not 1"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        VLLM(**settings)


def test_what_vllm_would_change_or_break_is_refused(double: Any, llama: str) -> None:
    model = load_causal_lm(Base(llama))
    with pytest.raises(UserError, match=r"model\.sampling\.temperature: vLLM raises 0\.005 to 0\.01"):
        draw(VLLMEngine(EXACT), model, sampling=Sampling(4, 0.005))
    longest = int(tiny.prompts(12).prompts.lengths.max())
    draw(VLLMEngine(VLLM(max_length=longest + 4)), model, sampling=Sampling(4))
    with pytest.raises(UserError, match=rf"model\.vllm\.max_length: .* may reach {longest + 5} tokens"):
        draw(VLLMEngine(VLLM(max_length=longest + 4)), model, sampling=Sampling(5))
    with pytest.raises(UserError, match=r"base\.trust_remote_code\) is not handed to vLLM"):
        make(RLOO, llama, base=Base(llama, trust_remote_code=True))
    with pytest.raises(UserError, match=r"measure the rest with model\.vllm null"):
        prepare(make(RLOO, llama), Measurement.__new__(Measurement))


@pytest.mark.parametrize(
    ("vllm", "advice"),
    [
        (None, "try --model.sampling.rows_at_once=32 (now 64)"),
        (VLLM(), "--model.vllm.gpu_memory_utilization (now 0.3)"),
    ],
)
def test_out_of_memory_in_a_rollout_names_the_engines_own_knob(vllm: VLLM | None, advice: str) -> None:
    settings = None if vllm is None else dict_to_namespace(asdict(vllm))
    init_args = Namespace(sampling=Namespace(rows_at_once=64), vllm=settings)
    assert advice in out_of_memory("rollout", Namespace(model=Namespace(init_args=init_args)))
