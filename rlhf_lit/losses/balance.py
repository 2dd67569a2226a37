"""How evenly a mixture of experts is used: the auxiliary loss of its routers, for each sequence by itself.

For a sequence of T tokens, L routers of E experts, k of which are chosen at each token:

    L_bal = E · Σ_i f_i·P_i,    f_i = 1/(L·T) · Σ_l Σ_t 1[i among the k chosen by router l at t],
                                P_i = 1/(L·T) · Σ_l Σ_t p_l,t(i),    p = softmax of the router's logits.

It is k where all experts are used alike, and up to E where always the same k are. The product of the two means is
Fedus et al. 2021, "Switch Transformers", arXiv 2101.03961, Eq. 4–6; that they are taken over one sequence and not over
a batch is DeepSeek-V3, arXiv 2412.19437, Eq. 17–20: so it does not matter how a batch is cut. Of one sequence it is
what transformers' ``load_balancing_loss_func`` says of a batch of it alone: all layers in one mean, and not divided by
k, as coefficients in configs of models expect.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def sequence_balance(routers: Sequence[Tensor], chosen: int, place: Tensor, row: Tensor, lengths: Tensor) -> Tensor:
    """L_bal of each sequence. → [rows]

    Args:
        routers: [places, experts] logits of each router.
        chosen: k, the experts that a token is sent to.
        place: [tokens] int64, the place of each token of each sequence; one place may be of several sequences.
        row: [tokens] int64, whose token it is.
        lengths: [rows] tokens of each sequence.
    """
    experts = routers[0].shape[-1]
    used = torch.zeros(len(lengths), experts, device=lengths.device)
    likely = torch.zeros_like(used)
    for logits in routers:
        probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
        choice = torch.zeros_like(probabilities).scatter_(-1, probabilities.topk(chosen, -1).indices, 1.0)
        used = used + torch.zeros_like(used, dtype=choice.dtype).index_add(0, row, choice[place])
        likely = likely + torch.zeros_like(used, dtype=choice.dtype).index_add(0, row, probabilities[place])
    tokens = len(routers) * lengths[:, None]
    return experts * (used / tokens * (likely / tokens)).sum(-1)
