"""Sampling responses: the interface of an engine, and the one that stands on transformers' `.generate(`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast

import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences
from rlhf_lit.models.anatomy import attends_to_everything, context_length, unwrapped
from rlhf_lit.models.rope import first_context
from rlhf_lit.randomness import gumbel_noise

UNNAMED_LIMIT = 64  # tokens of a response, where sampling.max_new_tokens is null
# The rows that one may be generated with: any, padded to one length; those of its own length; none.
Company = Literal["any", "equal", "none"]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn: y ~ softmax(logits/T).

    Args:
        max_new_tokens: longest response, EOS included. Where it is null, responses have at most 64 tokens (in `chat` no
            such limit), and no more than the model's context leaves after their prompt.
        temperature: T, divides the logits here and wherever the policy's and the reference's log-probs are taken.
        top_k: draw among the k likeliest tokens only; null among all. Not for PPO, RLOO and GRPO, where the log-probs
            of sampler and update must speak of the same distribution.
        top_p: draw among the likeliest tokens that together have this probability; null among all. Likewise.
        rows_at_once: sequences generated together. How this machine carries it out: changes no sample.
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    rows_at_once: int = 64

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"sampling.max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if not self.temperature > 0:
            raise ValueError(f"sampling.temperature must be greater than 0, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"sampling.top_k must be at least 1 or null, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"sampling.top_p must lie in (0, 1] or be null, not {self.top_p}")
        if self.rows_at_once < 1:
            raise ValueError(f"sampling.rows_at_once must be at least 1, not {self.rows_at_once}")

    @property
    def limit(self) -> int:
        """Tokens of the longest response, wherever the model's context leaves that many."""
        return UNNAMED_LIMIT if self.max_new_tokens is None else self.max_new_tokens


@dataclass(frozen=True)
class Samples:
    """What the sampler returns.

    Attributes:
        sequences: prompt + response, right-padded, the mask on the response: up to and with its first stop token.
        sampled_logprobs: [rows, time] the sampler's own log-probs of its actions, 0 off the mask.
        ended: [rows] bool, whether the response ends in a stop token.
    """

    sequences: Sequences
    sampled_logprobs: Tensor
    ended: Tensor

    @classmethod
    def collect(
        cls, prompts: Sequences, responses: list[list[int]], logprobs: list[Tensor], stop_ids: tuple[int, ...]
    ) -> Samples:
        """From the responses to the prompts, each cut after its first stop token, and the log-probs of their tokens."""
        device, lengths = prompts.tokens.device, prompts.lengths.tolist()
        asked = [row[:length] for row, length in zip(prompts.tokens.tolist(), lengths, strict=True)]
        sequences = Sequences.pad(
            [prompt + response for prompt, response in zip(asked, responses, strict=True)],
            [[False] * len(prompt) + [True] * len(response) for prompt, response in zip(asked, responses, strict=True)],
        ).to(device)
        sampled = torch.zeros(sequences.tokens.shape, device=device)
        sampled[sequences.mask] = torch.cat(logprobs).to(sampled)
        ended = torch.tensor([response[-1] in stop_ids for response in responses], device=device)
        return cls(sequences, sampled, ended)


class Engine(Protocol):
    """What draws responses: ``sample`` below, or a ``VLLMEngine``."""

    def __call__(
        self, model: nn.Module, prompts: Sequences, keys: Tensor, sampling: Sampling, stop_ids: tuple[int, ...]
    ) -> Samples:
        """One response to each prompt, in their order; arguments as of ``sample``."""


class _KeyedNoise:
    """A logits processor: keyed Gumbel noise on logits/T, so that the argmax that follows is a sample.

    ``keys`` None leaves the logits alone (greedy decoding). Keeps the log-prob of each choice.
    """

    def __init__(self, keys: Tensor | None, sampling: Sampling, prompt_width: int) -> None:
        from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

        self.keys = keys
        self.temperature = sampling.temperature
        self.prompt_width = prompt_width
        self.filters = LogitsProcessorList()
        if sampling.top_k is not None:
            self.filters.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p is not None:
            self.filters.append(TopPLogitsWarper(sampling.top_p))
        self.logprobs: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scaled = scores.to(torch.promote_types(scores.dtype, torch.float32)) / self.temperature
        scaled = self.filters(input_ids, scaled)
        perturbed = scaled
        if self.keys is not None:
            perturbed = scaled + gumbel_noise(self.keys, input_ids.shape[1] - self.prompt_width, scores.shape[-1])
        choice = perturbed.argmax(-1, keepdim=True)
        self.logprobs.append((scaled.gather(-1, choice) - scaled.logsumexp(-1, keepdim=True)).squeeze(-1))
        return perturbed


def sample(
    model: nn.Module,
    prompts: Sequences,
    keys: Tensor | None,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> Samples:
    """Draw one response to each prompt.

    Args:
        model: a causal language model, in eval mode.
        prompts: [rows, time]; the prompts' tokens.
        keys: [rows] the rows' noise keys (see ``randomness.row_keys``); None for greedy decoding.
        sampling: length, temperature and how many rows go at once.
        stop_ids: tokens that end a response.

    Returns:
        Samples in the order of the prompts.
    """
    responses: list[list[int]] = [[] for _ in range(len(prompts))]
    logprobs: list[Tensor] = [torch.empty(0)] * len(prompts)
    for rows in _together(unwrapped(model), prompts.lengths, sampling.rows_at_once):
        part = prompts.select(rows)
        new, part_logprobs = _generate(model, part, None if keys is None else keys[rows], sampling, stop_ids)
        is_stop = _stops(new, stop_ids)
        # Cut after the first stop token, keeping it; what generate wrote after it is filler.
        lengths = torch.where(is_stop.any(-1), is_stop.int().argmax(-1) + 1, new.shape[1]).tolist()
        for i, row in enumerate(rows.tolist()):
            responses[row] = new[i, : lengths[i]].tolist()
            logprobs[row] = part_logprobs[i, : lengths[i]]
    return Samples.collect(prompts, responses, logprobs, stop_ids)


def _together(inner: Any, lengths: Tensor, rows_at_once: int) -> Iterator[Tensor]:
    """Groups of rows that are generated together, short prompts first, at most so many rows each.

    Prompts of one group are padded on the left to one length, where the model can bear it (``_company``). With two sets
    of rotary frequencies, which a call's longest row would choose for all, they are on one side of the first context.
    """
    order = torch.argsort(lengths, stable=True)
    kind, first = torch.zeros_like(lengths), first_context(inner)
    if first is not None:
        kind = (lengths > first).to(kind)
    company = _company(inner) if len(lengths) > 1 else "any"
    if company != "any":
        kind = lengths
    _, sizes = torch.unique_consecutive(kind[order], return_counts=True)
    for rows in order.split(sizes.tolist()):
        yield from rows.split(1 if company == "none" else rows_at_once)


def _company(inner: Any) -> Company:
    """In what company a row is generated as it is alone: tried out once, and remembered on the model.

    transformers' states of RWKV mix the rows of a batch, and other states or compressed keys may take in the padding
    that an attention mask hides. A short prompt is continued by the same tokens alone, beside another of its
    length, and padded beside a longer one. What it says must be the same, far nearer than where the padding is to be
    seen.
    """
    from transformers.cache_utils import DynamicCache

    if not hasattr(inner, "company"):
        # An odd number of pads: keys may be compressed in groups of 2, 4, …
        prompt, other, longer, new = [3, 5, 4, 7], [9, 4, 6, 8], [3, *([8, 6, 9, 3] * 4)], 3
        if (context_length(inner) or sys.maxsize) < len(longer) + new:
            prompt, other, longer, new = [3], [4], [3, 8], 1
        padded = [longer[: -len(prompt)] + prompt, longer]
        alone = _continued(inner, [prompt], len(prompt), new)
        narrow = any(weight.dtype not in (torch.float32, torch.float64) for weight in inner.parameters())
        rounding, most = (torch.finfo(torch.bfloat16).eps, 0.1) if narrow else (torch.finfo(torch.float32).eps, 1e-3)

        def distance(found: Tensor) -> float:
            return float((found - alone).abs().mean() / alone.std())

        limit = min(most, 0.1 * distance(_continued(inner, padded, len(longer), new)) + 16 * rounding)
        ways: list[tuple[Company, list[list[int]]]] = [("any", padded), ("equal", [prompt, other])]
        if any(type(layer).__module__ != DynamicCache.__module__ for layer in DynamicCache(config=inner.config).layers):
            del ways[0]  # a cache of its own may compress more tokens than are tried
        fine = (way for way, rows in ways if distance(_continued(inner, rows, len(prompt), new)) <= limit)
        inner.company = next(fine, "none")
    return cast("Company", inner.company)


def _continued(inner: Any, rows: list[list[int]], read: int, new: int) -> Tensor:
    """[new, vocabulary] log-probs, as the first of some rows is continued by tokens that are given.

    Args:
        rows: token ids, all of one length; of a small vocabulary the remainders.
        read: the last so many tokens of the first row are not hidden.
        new: how many tokens are given.
    """
    embeddings = inner.get_input_embeddings().weight
    given = torch.tensor([min(5, len(embeddings) - 1)], device=embeddings.device)

    def forced(input_ids: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill(-1, given.to(scores.device), 0.0)

    ids = torch.tensor(rows, device=embeddings.device) % len(embeddings)
    attention = torch.ones_like(ids)
    attention[0, :-read] = 0
    settings = _stop_at((0,), new)
    settings.output_logits = True
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _generating(inner):
        output = inner.generate(
            ids, attention_mask=attention, generation_config=settings, logits_processor=[forced], synced_gpus=False
        )
    return torch.stack([logits[0] for logits in output.logits]).double().log_softmax(-1)


def _generate(
    model: nn.Module, prompts: Sequences, keys: Tensor | None, sampling: Sampling, stop_ids: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """[rows, new] tokens and their log-probs, for prompts of similar length; what follows a stop token is filler.

    Prompts that stand here twice or more on average are read once. When half of the rows have ended, they are dropped,
    and the others go on from their own part of the key-value cache.
    """
    width = prompts.tokens.shape[1]
    # Left padding: each row's last prompt token must stand next to its first new one.
    shift = width - prompts.lengths
    index = torch.arange(width, device=shift.device)[None] - shift[:, None]
    attention = (index >= 0).long()
    ids = torch.where(index >= 0, prompts.tokens.gather(1, index.clamp(min=0)), 0)
    rows = torch.arange(len(ids), device=ids.device)
    tokens = ids.new_full((len(ids), sampling.limit), stop_ids[0])
    logprobs = torch.zeros(tokens.shape, device=ids.device)
    noise, done = _KeyedNoise(keys, sampling, width), 0
    # Compiled layers would be compiled for each layer's place in the cache, and again as the cache grows.
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), _generating(unwrapped(model)) as inner:
        cache = _read_once(inner, ids, attention)
        while True:
            noise.keys = None if keys is None else keys[rows.to(keys.device)]
            noise.logprobs = []
            output = inner.generate(
                ids,
                attention_mask=attention,
                **({} if cache is None else {"past_key_values": cache}),
                generation_config=_stop_at(stop_ids, sampling.limit - done),
                logits_processor=[noise],
                stopping_criteria=[_HalfEnded(stop_ids)],
                synced_gpus=False,  # sharded weights are whole by now: no rank waits for another
            )
            new = output.sequences[:, ids.shape[1] :]
            tokens[rows, done : done + new.shape[1]] = new
            # On some devices generate takes one step more than it returns.
            taken = torch.stack(noise.logprobs[: new.shape[1]], dim=1)
            logprobs[rows, done : done + new.shape[1]] = taken.to(logprobs.dtype)
            done += new.shape[1]
            going_on = ~_stops(new, stop_ids).any(-1)
            if done == sampling.limit or not bool(going_on.any()):
                return tokens[:, :done], logprobs[:, :done]
            cache = _filled(output)
            if cache is not None:
                cache.reorder_cache(going_on.nonzero().squeeze(-1))
            rows, ids = rows[going_on], output.sequences[going_on]
            attention = nn.functional.pad(attention[going_on], (0, new.shape[1]), value=1)


def _filled(output: Any) -> Any:
    """The key-value cache that a call of generate left; None of a model that has none, and reads everything again. So
    does one that keeps the states of some layers elsewhere (RecurrentGemma, MiniMax), where rows that are dropped would
    stay."""
    from transformers.cache_utils import Cache, CacheLayerMixin

    cache = getattr(output, "past_key_values", None)
    layers = cache.layers if isinstance(cache, Cache) else []
    attends = any(isinstance(layer, CacheLayerMixin) and layer.get_seq_length() for layer in layers)
    return cache if attends and all(_holds(layer) for layer in layers) else None


def _holds(layer: Any) -> bool:
    """Whether a cache has anything of a layer."""
    from transformers.cache_utils import LinearAttentionCacheLayerMixin

    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return any((*layer.is_conv_states_initialized.values(), *layer.is_recurrent_states_initialized.values()))
    return bool(layer.get_seq_length())


def _stops(tokens: Tensor, stop_ids: tuple[int, ...]) -> Tensor:
    """Which of them are stop tokens."""
    return torch.isin(tokens, torch.tensor(stop_ids, device=tokens.device))


class _HalfEnded:
    """A stopping criterion: ends a batch once half of its rows have ended."""

    def __init__(self, stop_ids: tuple[int, ...]) -> None:
        self.stop_ids = stop_ids
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        ended = _stops(input_ids[:, -1], self.stop_ids)
        self.ended = ended if self.ended is None else self.ended | ended
        return (self.ended.sum() * 2 >= len(self.ended)).expand(len(self.ended))


def _stop_at(stop_ids: tuple[int, ...], new_tokens: int) -> Any:
    """Settings of a call of generate that takes the likeliest token each time."""
    from transformers import GenerationConfig

    return GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=list(stop_ids),
        pad_token_id=stop_ids[0],
        use_cache=True,
        return_dict_in_generate=True,
    )


def _read_once(inner: Any, ids: Tensor, attention: Tensor) -> Any:
    """The key-value cache of all prompts but their last token, where each is there twice or more on average; else None.

    A cache of sliding windows or states, which cannot give up its last token, is not made.
    """
    width = ids.shape[1]
    different, place = torch.unique(torch.cat([ids, attention], -1), dim=0, return_inverse=True)
    if width < 2 or 2 * len(different) > len(ids):
        return None
    if not (inner._supports_default_dynamic_cache() and attends_to_everything(inner)):
        return None
    settings = _stop_at((0,), 1)
    output = inner.generate(
        different[:, :width], attention_mask=different[:, width:], generation_config=settings, synced_gpus=False
    )
    cache = _filled(output)
    if cache is not None:
        cache.crop(-1)
        cache.reorder_cache(place)
    return cache


@contextmanager
def _generating(inner: Any) -> Iterator[Any]:
    """The model without what would change its samples or slow them down."""
    from transformers import GenerationConfig
    from transformers.modeling_layers import GradientCheckpointingLayer

    own_config, config = inner.generation_config, inner.config.get_text_config()
    # With them transformers computes the routers' loss, over a mask that does not fit the one token of a step.
    asks_routers = getattr(config, "output_router_logits", None)
    # The model's own defaults (repetition penalties, top-k) would silently change the distribution.
    inner.generation_config = GenerationConfig()
    if asks_routers:
        config.output_router_logits = False
    checkpointing = [m for m in inner.modules() if isinstance(m, GradientCheckpointingLayer) and m.training]
    for module in checkpointing:  # in training mode they would switch the key-value cache off
        module.training = False
    try:
        yield inner
    finally:
        inner.generation_config = own_config
        if asks_routers:
            config.output_router_logits = asks_routers
        for module in checkpointing:
            module.training = True
