"""How far a sampler is from the distribution that it is to draw from: its own log-probs against the training forward's.

They are computed in another way, token by token from a cache, with prompts of other lengths beside them. Rounding sets
them apart a little; a model whose generation is broken, by tenths of a nat at every token.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from rlhf_lit.batches import Sequences
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.roles import Roles
from rlhf_lit.models.rope import leaves_room
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.randomness import derive_seed, row_keys
from rlhf_lit.rollout.engine import Engine, Samples, Sampling

MOST_TOKENS = 32  # of a sampled response
FEWEST_TOKENS = 8  # that a response must have to be judged by itself


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
    mask = samples.sequences.mask
    distance = (samples.sampled_logprobs.to(scored.dtype) - scored).abs().nan_to_num(nan=torch.inf)
    long = [row[tokens] for row, tokens in zip(distance, mask, strict=True) if int(tokens.sum()) >= FEWEST_TOKENS]
    return max(float(row.median()) for row in long or [distance[mask]])
