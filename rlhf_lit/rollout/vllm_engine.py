"""Sampling by vLLM, in the process and on the GPU that train: the same interface as transformers' engine.

Before each draw vLLM is given the policy's weights, adapter merged, and its cache of prompts is emptied. It computes
logits by other kernels and in another dtype than the training forward; its own log-probs of what it drew come along, so
that ``policy_loss.importance_cap`` can correct for that. Each row's seed comes from the key of its noise.

Written against vLLM 0.33's documented interface: ``LLM``, ``SamplingParams``, ``RequestOutput``, sleep mode
(docs.vllm.ai/en/latest/features/sleep_mode), ``reload_weights``.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.merging import merged_weights
from rlhf_lit.models.quantization import Dtype
from rlhf_lit.models.rope import first_context
from rlhf_lit.rollout.engine import Samples, Sampling

# vLLM raises a temperature between 0 and this one to it (vllm/sampling_params.py): another distribution.
LEAST_TEMPERATURE = 0.01

UNCORRECTED = (
    "note: model.vllm: its log-probs differ from the training forward's, and nothing corrects for that while "
    "model.policy_loss.importance_cap is null (2 in the paper)"
)


@dataclass(frozen=True)
class VLLM:
    """Draw responses with vLLM, in whole weights beside the policy's own. One GPU.

    Args:
        gpu_memory_utilization: share of the card that vLLM may fill with its weights and its key-value cache.
        dtype: of vLLM's weights. float32 is slow, and not every attention kernel has it.
        max_length: longest prompt + response; null is the model's context, which the key-value cache must then hold.
        sleep: what vLLM's memory is while the policy learns. 0: kept; 1: the cache is freed and the weights wait in the
            host's memory; 2: both are freed (vLLM restores not every model from that: its issue 29341).
        enforce_eager: no CUDA graphs: a faster start and slower sampling.
    """

    gpu_memory_utilization: float = 0.3
    dtype: Dtype = "bfloat16"
    max_length: int | None = None
    sleep: Literal[0, 1, 2] = 1
    enforce_eager: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.gpu_memory_utilization < 1:
            raise ValueError(f"vllm.gpu_memory_utilization must lie in (0, 1), not {self.gpu_memory_utilization}")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"vllm.max_length must be at least 2 or null, not {self.max_length}")


def require_vllm(device: torch.device, ranks: int) -> None:
    """Refuse to start where vLLM cannot run.

    Args:
        device: that trains.
        ranks: of the run.

    Raises:
        UserError: vLLM is not installed, the device is no GPU, or there are several ranks.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("model.vllm: vLLM is not installed: pip install 'rlhf-lit[vllm]', or leave model.vllm null")
    if device.type != "cuda":
        raise UserError(f"model.vllm: vLLM samples on a GPU, and this run is on {device}; leave model.vllm null")
    if ranks > 1:
        raise UserError(f"model.vllm: runs on one GPU, and this run has {ranks}; set trainer.devices: 1")


class VLLMEngine:
    """One vLLM in this process, made at the first draw.

    Args:
        settings: its memory and its width.
        remote_code: whether the model comes with code of its own.

    Raises:
        UserError: it does.
    """

    def __init__(self, settings: VLLM, remote_code: bool = False) -> None:
        if remote_code:
            raise UserError("model.vllm: a model with code of its own (base.trust_remote_code) is not handed to vLLM")
        self.settings = settings
        self._llm: Any = None
        self._asleep = False
        self._folder: TemporaryDirectory[str] | None = None

    @torch.no_grad()
    def __call__(
        self, model: nn.Module, prompts: Sequences, keys: Tensor, sampling: Sampling, stop_ids: tuple[int, ...]
    ) -> Samples:
        """One response to each prompt; arguments as of ``rollout.engine.sample``.

        Raises:
            UserError: the temperature is one that vLLM changes, a prompt and its response may exceed ``max_length``, or
                that allows lengths at which the model's rotary frequencies are others.
        """
        self._check(prompts, sampling, first_context(unwrapped(model)))
        rows = [row[:length] for row, length in zip(prompts.tokens.tolist(), prompts.lengths.tolist(), strict=True)]
        # Mixed precision is the training forward's: vLLM has a dtype of its own, and a merge is exact.
        with torch.autocast(prompts.tokens.device.type, enabled=False):
            self._wake(model, sampling)
            from vllm import SamplingParams  # type: ignore[import-not-found, unused-ignore]

            outputs = self._llm.generate(
                [{"prompt_token_ids": row} for row in rows],
                [SamplingParams(**request(sampling, stop_ids, key)) for key in keys.tolist()],
                use_tqdm=False,
            )
            if self.settings.sleep:
                self._llm.sleep(level=self.settings.sleep)
                self._asleep = True
        return read(outputs, prompts, stop_ids)

    def _check(self, prompts: Sequences, sampling: Sampling, first: int | None) -> None:
        limit = self.settings.max_length
        if first is not None and (limit is None or limit > first):
            raise UserError(
                "model.vllm.max_length: vLLM has one set of rotary frequencies for all rows, chosen by this length, "
                f"and the model has others beyond {first} tokens (LongRoPE); set it to at most {first}, or leave "
                "model.vllm null"
            )
        if sampling.temperature < LEAST_TEMPERATURE:
            raise UserError(
                f"model.sampling.temperature: vLLM raises {sampling.temperature} to {LEAST_TEMPERATURE}; set at least "
                "that"
            )
        longest = int(prompts.lengths.max()) + sampling.limit
        if self.settings.max_length is not None and longest > self.settings.max_length:
            raise UserError(
                f"model.vllm.max_length: a prompt and its response may reach {longest} tokens, and it is "
                f"{self.settings.max_length}; raise it, or lower model.sampling.max_new_tokens or data.max_length"
            )

    def _wake(self, model: nn.Module, sampling: Sampling) -> None:
        """vLLM with the policy's present weights, nothing left of what it computed by earlier ones."""
        if self._llm is None:
            self._llm = self._start(model, sampling)
        if self._asleep:
            # torch's allocator holds on to what training freed, and vLLM asks the device.
            torch.cuda.empty_cache()
            self._llm.wake_up(tags=["weights"])
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": merged_weights(model)})
        if self._asleep:
            self._llm.wake_up(tags=["kv_cache"])
            self._asleep = False
        self._llm.reset_prefix_cache()

    def _start(self, model: nn.Module, sampling: Sampling) -> Any:
        # In a process of its own vLLM could not be handed tensors.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        from vllm import LLM

        self._folder = TemporaryDirectory(prefix="rlhf_lit_vllm_")
        write_config(model, self._folder.name)
        return LLM(**arguments(self.settings, sampling, self._folder.name))


def write_config(model: nn.Module, folder: str) -> None:
    """The config that vLLM builds the model from: the policy's own, in whole weights."""
    inner = unwrapped(model)
    config = copy.deepcopy(inner.config)
    config.architectures = [type(inner).__name__]
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.save_pretrained(folder)


def arguments(settings: VLLM, sampling: Sampling, folder: str) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``.

    Args:
        settings: memory and width.
        sampling: how many rows go at once.
        folder: with the model's config.
    """
    return {
        "model": folder,
        "skip_tokenizer_init": True,  # tokens in, tokens out
        "load_format": "dummy",  # weights come from the policy
        "generation_config": "vllm",
        "dtype": settings.dtype,
        "max_model_len": settings.max_length,
        "max_num_seqs": sampling.rows_at_once,
        "gpu_memory_utilization": settings.gpu_memory_utilization,
        "enable_sleep_mode": settings.sleep > 0,
        "enforce_eager": settings.enforce_eager,
        # Of the distribution that is drawn from, temperature included.
        "logprobs_mode": "processed_logprobs",
    }


def request(sampling: Sampling, stop_ids: tuple[int, ...], key: int) -> dict[str, Any]:
    """Arguments of ``vllm.SamplingParams`` for one row.

    Args:
        sampling: how responses are drawn.
        stop_ids: tokens that end one, and nothing else does.
        key: of the row's noise, an int64.
    """
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k or 0,
        "top_p": 1.0 if sampling.top_p is None else sampling.top_p,
        "max_tokens": sampling.limit,
        "seed": key & (2**63 - 1),  # −1 would mean none
        "stop_token_ids": list(stop_ids),
        "ignore_eos": True,
        "logprobs": 0,  # of the drawn token alone
        "detokenize": False,
    }


def read(outputs: Sequence[Any], prompts: Sequences, stop_ids: tuple[int, ...]) -> Samples:
    """vLLM's ``RequestOutput`` of each prompt as Samples.

    Raises:
        UserError: vLLM gave up on one.
    """
    completions = [output.outputs[0] for output in outputs]
    for row, completion in enumerate(completions):
        if completion.finish_reason not in ("stop", "length"):
            raise UserError(f"model.vllm: vLLM ended the response to row {row} by {completion.finish_reason!r}")
    responses = [list(completion.token_ids) for completion in completions]
    logprobs = [
        torch.tensor([position[token].logprob for token, position in zip(tokens, completion.logprobs, strict=True)])
        for tokens, completion in zip(responses, completions, strict=True)
    ]
    return Samples.collect(prompts, responses, logprobs, stop_ids)
