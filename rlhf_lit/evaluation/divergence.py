"""KL(π‖π₀) of whole responses, estimated on the policy's own samples."""

from __future__ import annotations

import torch

from rlhf_lit.algorithms.policy import Writer
from rlhf_lit.batches import Sequences
from rlhf_lit.batches.micro_batches import cut_by_tokens, no_rows
from rlhf_lit.evaluation.estimates import Array
from rlhf_lit.evaluation.sampling import SCORING_TOKENS
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.score_pass import compare_with_reference
from rlhf_lit.parallel.sharding import sharding_of


@torch.no_grad()
def kl_per_response(module: Writer, sequences: Sequences, budget: int = SCORING_TOKENS) -> tuple[Array, Array]:
    """Two estimates of KL from one sample of prefixes, in nats per response.

    Args:
        module: a policy with a reference, in eval mode.
        sequences: prompt + sampled response, the mask on the response.
        budget: padded tokens that go through the device at once. Changes no result.

    Returns:
        [rows] Σ_t Σ_v π(v)(log π(v) − log π₀(v)), exact for each prefix; and [rows] Σ_t (log π − log π₀)(y_t), k1.
        Their expectations are the same, the first varies less.
    """
    exact, k1 = torch.zeros(2, len(sequences), dtype=torch.float64)
    groups = cut_by_tokens(sequences.lengths.cpu(), budget)
    for rows, counts in sharding_of(module.roles).passes(groups, no_rows):
        part = sequences.part(rows).to(module.device)
        comparison = compare_with_reference(module.roles, part, module.sampling.temperature)
        if not counts:
            continue
        exact[rows] = row_sums(comparison.exact_kl, part.mask).double().cpu()
        k1[rows] = row_sums(comparison.logratio, part.mask).double().cpu()
    return exact.numpy(), k1.numpy()
