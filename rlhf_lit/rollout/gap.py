"""How far a sampler is from the distribution that it is to draw from: its own log-probs against the training forward's.

They are computed in another way, token by token from a cache, with prompts of other lengths beside them, or by an
engine that holds weights of its own. Rounding sets them apart a little; broken generation, or weights that did not
arrive, by tenths of a nat and more at every token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.models.anatomy import computes_in_half
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.roles import Roles
from rlhf_lit.models.rope import leaves_room
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.randomness import derive_seed, row_keys
from rlhf_lit.rollout.engine import Engine, Samples, Sampling
from rlhf_lit.rollout.vllm_engine import VLLM

# Nats per token, in the median token of a response. A sampler is off by at most 2e-6 in float32 (vLLM on a CPU: 1e-6);
# in bfloat16 random models of 8 layers × 128 (Llama, Qwen3-MoE, OLMoE) are by 0.003 to 0.05, broken ones by 0.3 and
# more (RWKV's states, DeepSeek-V4's padding), and one whose LM head was never loaded by 7.
ALLOWED_IN_FULL, ALLOWED_IN_HALF = 1e-4, 0.1
MOST_TOKENS = 32  # of a sampled response
FEWEST_TOKENS = 8  # that a response must have to be judged by itself


def allowed_gap(model: nn.Module, vllm: VLLM | None) -> float:
    """How far a sampler may be off in the median token, in nats: by the dtype of the policy, or of vLLM's weights.

    Args:
        model: the policy.
        vllm: settings of the engine where that is vLLM.
    """
    narrow = computes_in_half(model) or (vllm is not None and vllm.dtype != "float32")
    return ALLOWED_IN_HALF if narrow else ALLOWED_IN_FULL


def cure_of(vllm: VLLM | None) -> str:
    """What to do about a sampler that is off."""
    if vllm is None:
        return "its generation is broken (padding, cache or states), and no policy could learn from it: another model"
    return "vLLM computes another model than the one that trains: set model.vllm to null"


def median_gap(samples: Samples, scored: Tensor) -> float:
    """The median |Δ log-prob| over all tokens of some responses; 0 where there are none. Arguments as of ``gap_of``.

    Over many rows the largest of their medians, which ``gap_of`` takes of a few, is rounding's in narrow dtypes.
    """
    distance = _distances(samples, scored)[samples.sequences.mask]
    return float(distance.median()) if len(distance) else 0.0


def require_own_samples(gap: float, limit: float, number: int, vllm: VLLM | None) -> None:
    """End the run before it learns from samples that are not its policy's own.

    Args:
        gap: ``median_gap`` of a rollout.
        limit: ``allowed_gap``.
        number: of the rollout.
        vllm: settings of the engine where that is vLLM.

    Raises:
        UserError: the gap is over the limit.
    """
    if gap <= limit:
        return
    raise UserError(
        f"rollout {number}: the sampler's log-probs and those of the training forward are {gap:.2g} nats apart in the "
        f"median token, and {limit:g} are allowed, so nothing is learnt from it; {cure_of(vllm)}"
    )


def of_different_lengths(prompts: Sequences) -> Sequences:
    """Prompts that padding must bring to one length: where all are as long as each other, every second one without its
    first token."""
    lengths = prompts.lengths
    if len(prompts) < 2 or bool((lengths != lengths[0]).any()) or int(lengths[0]) < 2:
        return prompts
    rows = [row[i % 2 : n] for i, (row, n) in enumerate(zip(prompts.tokens.tolist(), lengths.tolist(), strict=True))]
    return Sequences.pad(rows, [[False] * len(row) for row in rows]).to(prompts.tokens.device)


@torch.no_grad()
def measured_gap(
    engine: Engine, roles: Roles, prompts: Sequences, sampling: Sampling, stop_ids: tuple[int, ...]
) -> float | None:
    """``gap_of`` short responses, drawn to some prompts from the whole distribution.

    Args:
        engine: what draws.
        roles: of whose policy.
        prompts: of any lengths; made different where they are not.
        sampling: how responses are drawn in the run. Filters (top-k, top-p) are left out, as they change the sampler's
            log-probs.
        stop_ids: tokens that end a response.

    Returns:
        Nats per token; None where no prompt leaves room for a response.
    """
    short = min(sampling.limit, MOST_TOKENS)
    fitting = [row for row, n in enumerate(prompts.lengths.tolist()) if leaves_room(roles.policy, n, short)]
    if not fitting:
        return None
    asked = of_different_lengths(prompts.select(torch.tensor(fitting)))
    index = torch.arange(len(asked))
    keys = row_keys(derive_seed("sampling", 0), index, torch.zeros_like(index))
    drawn = replace(sampling, max_new_tokens=short, top_k=None, top_p=None)
    with roles.acting("policy") as model, sharding_of(model).whole():
        samples = engine(model, asked, keys, drawn, stop_ids)
        scored = token_logprobs(model, samples.sequences, drawn.temperature)
    return gap_of(samples, scored)


def gap_of(samples: Samples, scored: Tensor) -> float:
    """The median |Δ log-prob| over a response's tokens, the largest of all responses; of short ones together.

    It is the median because rounding may send single tokens of a mixture of experts elsewhere; a broken sampler is off
    at nearly all.

    Args:
        samples: responses, with the sampler's own log-probs.
        scored: [rows, time] the training forward's.
    """
    mask, distance = samples.sequences.mask, _distances(samples, scored)
    long = [row[tokens] for row, tokens in zip(distance, mask, strict=True) if int(tokens.sum()) >= FEWEST_TOKENS]
    return max(float(row.median()) for row in long or [distance[mask]])


def _distances(samples: Samples, scored: Tensor) -> Tensor:
    """[rows, time] |Δ log-prob|; infinite where one is no number."""
    return (samples.sampled_logprobs.to(scored.dtype) - scored).abs().nan_to_num(nan=torch.inf)
