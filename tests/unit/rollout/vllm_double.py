"""A stand-in for the package vllm: what the engine uses of its interface, on transformers.

It is as strict as vLLM where a mistake would pass unseen: unknown arguments are errors; the model is built from the
config alone, with random weights; weights come by the names of a checkpoint and must be all there; a tied LM head stays
as it was built, and some families have none of their own; memory that sleeps may not be used; what was computed with
old weights is reused until the prefix cache is reset; the global generators are seeded at the start.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

ALWAYS_TIED = {"Gemma2ForCausalLM", "CohereForCausalLM"}  # their logits are the embeddings', in vLLM


@dataclass
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    index: int = 0


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]


class LLM:
    made: list[LLM] = []  # noqa: RUF012
    shift = 0.0  # added to the log-prob that it reports of each first token
    noise_from: int | None = None  # weights that come as the so-manieth do not arrive

    def __init__(
        self, model: str, *, skip_tokenizer_init: bool, load_format: str, generation_config: str, dtype: str,
        max_model_len: int | None, max_num_seqs: int, gpu_memory_utilization: float, enable_sleep_mode: bool,
        enforce_eager: bool, logprobs_mode: str,
    ) -> None:  # fmt: skip
        assert skip_tokenizer_init
        assert (load_format, generation_config, logprobs_mode) == ("dummy", "vllm", "processed_logprobs")
        self.config = AutoConfig.from_pretrained(model)
        assert not hasattr(self.config, "quantization_config")
        self.dtype = getattr(torch, dtype)
        if self.config.architectures[0] in ALWAYS_TIED:
            self.config.tie_word_embeddings = True
        torch.manual_seed(99)
        self.built = AutoModelForCausalLM.from_config(self.config)
        self.sleeps = enable_sleep_mode
        self.received, self.closed = 0, False
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self._shut_down))
        self.asleep: set[str] = set()
        self.weights: dict[str, Tensor] = {}
        self.model: Any = None
        self.slept: list[int] = []
        self.cache: dict[tuple[int, ...], Tensor] = {}
        LLM.made.append(self)

    def collective_rpc(self, method: str, timeout: None = None, args: tuple[()] = (), kwargs: Any = None) -> list[None]:
        assert method == "reload_weights"
        assert "weights" not in self.asleep
        weights: Iterable[tuple[str, Tensor]] = kwargs["weights_iterator"]
        self.weights = {name: weight.clone().contiguous() for name, weight in weights}
        self.received += 1
        if self.config.tie_word_embeddings and "lm_head.weight" in self.weights:
            raise ValueError("There is no module or parameter named 'lm_head'")
        with TemporaryDirectory() as folder:
            save_file(self.weights, Path(folder) / "model.safetensors", metadata={"format": "pt"})
            self.config.save_pretrained(folder)
            # Of the attentions of transformers the one that leaves out nothing (Gemma 2's cap) in any of its releases.
            self.model, found = AutoModelForCausalLM.from_pretrained(
                folder, dtype=self.dtype, attn_implementation="eager", output_loading_info=True
            )
        assert not any(found.values()), found
        if self.noise_from is not None and self.received >= self.noise_from:
            self.model = self.built
        if self.config.tie_word_embeddings and self.config.architectures[0] not in ALWAYS_TIED:
            self.model.lm_head.weight = nn.Parameter(self.built.lm_head.weight.detach())
        return [None]

    def apply_model(self, func: Callable[[nn.Module], Any]) -> list[Any]:
        return [func(self.built)]

    def _shut_down(self) -> None:
        self.closed = True

    def wake_up(self, tags: list[str] | None = None) -> bool:
        self.asleep -= set(tags or self.asleep)
        return not self.asleep

    def sleep(self, level: int = 1) -> None:
        assert self.sleeps
        self.slept.append(level)
        self.asleep, self.model = {"weights", "kv_cache"}, None

    def reset_prefix_cache(self) -> bool:
        self.cache = {}
        return True

    @torch.no_grad()
    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        assert not self.asleep
        assert not self.closed
        assert len(prompts) == len(sampling_params)
        rows = [prompt["prompt_token_ids"] for prompt in prompts]
        return [
            RequestOutput(row, [self._answer(row, settings)])
            for row, settings in zip(rows, sampling_params, strict=True)
        ]

    def _answer(self, prompt: list[int], settings: SamplingParams) -> CompletionOutput:
        assert settings.seed is not None
        assert settings.seed >= 0
        assert settings.ignore_eos
        generator = torch.Generator().manual_seed(settings.seed)
        tokens: list[int] = []
        found: list[dict[int, Logprob]] = []
        while len(tokens) < settings.max_tokens and not set(tokens) & set(settings.stop_token_ids):
            key = (*prompt, *tokens)
            if key not in self.cache:
                self.cache[key] = self.model(torch.tensor([key])).logits[0, -1].float()
            scaled = self.cache[key] / settings.temperature
            if settings.top_k:
                scaled = scaled.masked_fill(scaled < scaled.topk(settings.top_k).values[-1], -torch.inf)
            logprobs = scaled.log_softmax(-1)
            token = int(torch.multinomial(logprobs.exp(), 1, generator=generator))
            found.append({token: Logprob(float(logprobs[token]) + (0.0 if tokens else self.shift))})
            tokens.append(token)
        reason = "stop" if tokens[-1] in settings.stop_token_ids else "length"
        return CompletionOutput(tokens, None if settings.logprobs is None else found, reason)


def install(patch: pytest.MonkeyPatch) -> None:
    """Put it in vllm's place."""
    module: Any = ModuleType("vllm")
    module.__spec__ = ModuleSpec("vllm", None)
    module.LLM, module.SamplingParams = LLM, SamplingParams
    module.platforms = SimpleNamespace(current_platform=SimpleNamespace(device_type="cpu"))
    patch.setitem(sys.modules, "vllm", module)
    patch.setitem(sys.modules, "vllm.platforms", module.platforms)
    patch.setattr(LLM, "made", [])
    patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
