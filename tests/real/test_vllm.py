"""Rollouts by a real vLLM: in the environment that `make vllm` makes, on its CPU, or wherever vLLM is installed.

Its log-probs are the training forward's to 1e-4 in float32, before and after an update, whatever stands on the base.
"""

from __future__ import annotations

import csv
import gc
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed: make vllm")

ROOT = Path(__file__).parents[2]
SMOLLM2 = ROOT / ".envs" / "smollm2"
sys.path.insert(0, str(ROOT / "tests" / "unit"))

import tiny  # noqa: E402

from rlhf_lit.errors import UserError  # noqa: E402
from rlhf_lit.models.base import Base, LoRA  # noqa: E402
from rlhf_lit.models.loading import load_causal_lm  # noqa: E402
from rlhf_lit.models.logprobs import token_logprobs  # noqa: E402
from rlhf_lit.models.quantization import Quantization  # noqa: E402
from rlhf_lit.randomness import row_keys  # noqa: E402
from rlhf_lit.rollout import vllm_engine  # noqa: E402
from rlhf_lit.rollout.engine import Samples, Sampling  # noqa: E402
from rlhf_lit.rollout.vllm_engine import VLLM, VLLMEngine  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STOPS = (tiny.EOS, 7, 8, 9, 30)
EXACT = VLLM(dtype="float32", enforce_eager=True)
# vLLM's attention kernels have few widths of heads, the smallest 32.
SIZE: dict[str, Any] = {"max_position_embeddings": 256, "hidden_size": 64, "num_attention_heads": 2}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "untied": ("llama", SIZE),
    "tied": ("qwen2", {**SIZE, "num_key_value_heads": 1, "tie_word_embeddings": True}),
    # in vLLM these have no LM head of their own, or transposed weights
    "gemma2": ("gemma2", {**SIZE, "num_key_value_heads": 1, "head_dim": 32}),
    "gpt2": ("gpt2", {"n_embd": 64, "n_head": 2}),
}
NF4 = Quantization(compute_dtype="float32")


@pytest.fixture(autouse=True)
def small_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    yield
    gc.collect()


@pytest.fixture
def engine() -> Iterator[VLLMEngine]:
    made = VLLMEngine(EXACT)
    yield made
    made.close()


def load(folder: Path, kind: str, **settings: Any) -> Any:
    model_type, overrides = KINDS[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's, on adapters of tied weights
        model = load_causal_lm(Base(tiny.save_model(folder, model_type, **overrides), **settings))
    return model.to(DEVICE).eval()


def draw(engine: VLLMEngine, model: Any, sampling: Sampling) -> Samples:
    batch = tiny.prompts(12)
    keys = row_keys(11, batch.index, torch.zeros_like(batch.index))
    return engine(model, batch.prompts.to(DEVICE), keys, sampling, STOPS)


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("untied", {}),
        ("untied", {"lora": LoRA(4)}),
        ("untied", {"lora": LoRA(4), "quantization": NF4}),
        ("tied", {}),
        ("tied", {"lora": LoRA(4)}),
        ("tied", {"lora": LoRA(4, targets=["q_proj", "embed_tokens"])}),
        ("tied", {"lora": LoRA(4, targets=["q_proj"], modules_to_save=["lm_head"])}),
        ("tied", {"lora": LoRA(4), "quantization": NF4}),
        ("gemma2", {"attention": "eager"}),
        ("gpt2", {}),
    ],
    ids=[
        "untied", "untied-lora", "untied-4bit", "tied", "tied-lora", "tied-lora-on-embeddings", "tied-own-head",
        "tied-4bit", "gemma2", "gpt2",
    ],
)  # fmt: skip
def test_two_rounds_of_weights(engine: VLLMEngine, tmp_path: Path, kind: str, settings: dict[str, Any]) -> None:
    model, drawn = load(tmp_path, kind, **settings), []
    for step in range(2):
        tiny.disturb(model, 0.1, step)
        samples = draw(engine, model, Sampling(12, 0.7))
        expected = token_logprobs(model, samples.sequences, 0.7).detach()
        torch.testing.assert_close(samples.sampled_logprobs, expected, rtol=0, atol=1e-4)
        assert samples.ended.any()
        assert not samples.ended.all()
        drawn.append(samples.sequences.tokens.tolist())
    assert drawn[0] != drawn[1]


def test_a_row_draws_by_its_own_key(engine: VLLMEngine, tmp_path: Path) -> None:
    """Filters included, which are those of transformers' engine: none of the others' tokens is drawn."""
    model = load(tmp_path, "tied")
    first = draw(engine, model, Sampling(12))
    assert draw(engine, model, Sampling(12)).sequences.tokens.equal(first.sequences.tokens)
    assert len({tuple(row) for row in first.sequences.tokens.tolist()}) == 12
    few = draw(engine, model, Sampling(12, top_k=2))
    logits = model(few.sequences.tokens).logits[:, :-1].detach()
    likeliest = (logits.topk(2).indices == few.sequences.tokens[:, 1:, None]).any(-1)
    assert likeliest[few.sequences.mask[:, 1:]].all()


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU vLLM's memory can be freed")
def test_a_cpu_has_no_sleep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.vllm\.sleep: on a CPU"):
        draw(VLLMEngine(VLLM(dtype="float32", sleep=1)), load(tmp_path, "untied"), Sampling(4))


def test_what_vllm_refuses_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^model\.vllm: vLLM does not start: .*max_model_len.*") as caught:
        draw(VLLMEngine(VLLM(max_length=10_000, enforce_eager=True)), load(tmp_path, "untied"), Sampling(4))
    assert "\n" not in str(caught.value)


# Whole runs, through the command line

OPTIONS = (
    "--model.kl=FixedKL", "--model.kl.beta=0.1", "--model.reward=RewardFromFunction",
    "--model.reward.function=tiny.word_count", "--data.train.path=prompts.txt", "--data.batch_size=16",
    "--data.ppo_epochs=1", "--trainer.max_steps=2", "--trainer.log_every_n_steps=1", "--model.vllm.enforce_eager=true",
    "--name=vllm",
)  # fmt: skip
TINY = (
    "--model.base.name=model", "--data.template=none", "--model.learning_rate=1e-3", "--model.vllm.dtype=float32",
    "--model.sampling.max_new_tokens=16", "--model.sampling.temperature=0.7",
)  # fmt: skip
PPO = ("--model=PPO", "--data=RolloutDataModule", "--model.critic.init=policy", "--data.rollout_size=16")
GRPO = ("--model=GRPO", "--data=RolloutDataModule", "--data.rollout_size=4", "--data.samples_per_prompt=4")


def run(command: Callable[..., Any], *options: object) -> list[dict[str, str]]:
    """Rows of metrics of a run's steps, one for each rollout."""
    answer = command("fit", *options)
    assert answer.status == 0, answer.err
    with Path("runs/vllm/version_0/metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["rollout/sampler_gap"]]


def prompts(line: Callable[[int], str]) -> None:
    Path("prompts.txt").write_text("".join(f"{line(i)}\n" for i in range(16)))


@pytest.mark.parametrize("lora", [(), ("--model.base.lora.rank=8",)], ids=["whole", "lora"])
@pytest.mark.parametrize("algorithm", [PPO, GRPO], ids=["ppo", "grpo"])
def test_two_rollouts(command: Callable[..., Any], algorithm: tuple[str, ...], lora: tuple[str, ...]) -> None:
    """Each of them by other weights; preflight draws with it too."""
    tiny.save_model(Path("model"), KINDS["tied"][0], **KINDS["tied"][1])
    prompts(lambda i: f"w{3 + i} w{4 + i}")
    rows = run(command, *algorithm, *TINY, *lora, *OPTIONS)
    assert len(rows) == 2
    for row in rows:
        assert 0 < float(row["rollout/sampler_gap"]) < 1e-4


def test_a_head_that_does_not_arrive_ends_the_run(command: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """As it was before: the config says tied, and vLLM's LM head stays as it was built."""
    monkeypatch.setattr(vllm_engine, "write_config", lambda model, folder: as_it_is(model, folder))
    monkeypatch.setattr(vllm_engine, "has_lm_head", lambda model: False)
    tiny.save_model(Path("model"), KINDS["tied"][0], **KINDS["tied"][1])
    prompts(lambda i: f"w{3 + i} w{4 + i}")
    answer = command("fit", *GRPO, *TINY, *OPTIONS, "--preflight=false")
    assert answer.status == 2
    assert "error: rollout 0: the sampler's log-probs and those of the training forward are" in answer.err
    assert "Traceback" not in answer.err


def as_it_is(model: Any, folder: str) -> None:
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)


# A real model

needs_smollm2 = pytest.mark.skipif(
    not (SMOLLM2 / "complete").exists(), reason="no real model: make .envs/smollm2/complete"
)
REAL = (
    f"--model.base.name={SMOLLM2}", "--model.learning_rate=1e-5", "--model.sampling.max_new_tokens=24",
    "--model.vllm.max_length=128", "--preflight=false",
)  # fmt: skip


@needs_smollm2
@pytest.mark.parametrize(
    ("algorithm", "width", "limit"),
    [
        (GRPO, ("--model.vllm.dtype=float32",), 1e-4),
        (PPO, ("--model.vllm.dtype=float32", "--model.base.lora.rank=8", "--model.base.quantization.type=nf4",
               "--model.base.quantization.compute_dtype=float32"), 1e-4),
        (GRPO, ("--model.vllm.dtype=bfloat16", "--model.policy_loss.importance_cap=2"), 1.0),
    ],
    ids=["grpo-float32", "ppo-4bit-lora-float32", "grpo-bfloat16"],
)  # fmt: skip
def test_smollm2(command: Callable[..., Any], algorithm: tuple[str, ...], width: tuple[str, ...], limit: float) -> None:
    prompts(lambda i: f"Name {i + 2} animals.")
    rows = run(command, *algorithm, *REAL, *OPTIONS, *width)
    assert len(rows) == 2
    for row in rows:
        assert 0 < float(row["rollout/sampler_gap"]) < limit
    print(*(f"{os.path.basename(str(SMOLLM2))} {width[0]}: gap {row['rollout/sampler_gap']}" for row in rows), sep="\n")
