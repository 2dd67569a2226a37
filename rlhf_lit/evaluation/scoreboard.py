"""The built-in world's scoreboard: what each stage of RLHF made of the policy, by the exact gold reward."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf_lit import playground
from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.data.records import Message
from rlhf_lit.evaluation.best_of_n import best_of_n_kl
from rlhf_lit.evaluation.divergence import kl_per_response
from rlhf_lit.evaluation.estimates import Estimate
from rlhf_lit.evaluation.sampling import SCORING_TOKENS, draw
from rlhf_lit.evaluation.win_rate import wins
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import score_sequences

BEST_OF = 4


@dataclass(frozen=True)
class Row:
    """One line of the scoreboard, over held-out prompts.

    Attributes:
        gold_reward: exact reward of a sampled response.
        win_rate: against a sample of SFT's to the same prompt, by gold reward, a tie counted half.
        kl: Σ_t exact per-token KL(π‖SFT) of a sampled response, nats.
        length: tokens of a response, EOS included.
    """

    gold_reward: Estimate
    win_rate: Estimate
    kl: Estimate
    length: Estimate


def scoreboard(
    policies: dict[str, Base], sft: str, reward: str, prompts: list[str], max_new_tokens: int = 24
) -> tuple[dict[str, Row], dict[str, list[str]]]:
    """Sample every policy on the same prompts, and best-of-n of SFT by the reward model.

    Args:
        policies: name → where it is; one of them is named ``sft``.
        sft: the model KL is measured to.
        reward: the reward model that picks the best of n.
        prompts: held-out instructions.
        max_new_tokens: longest response.

    Returns:
        Rows by name, and the responses by name.
    """
    reference = load_causal_lm(Base(name=sft))
    conversations = [[Message("user", prompt)] for prompt in prompts]
    responses: dict[str, list[str]] = {}
    kl: dict[str, list[float]] = {}
    lengths: dict[str, list[int]] = {}
    for name, base in policies.items():
        module = SFT(base, sampling=Sampling(max_new_tokens=max_new_tokens, rows_at_once=512))
        module.configure_model()
        module.roles.use_reference(reference)
        samples, texts = draw(module, conversations)
        responses[name] = [row[0] for row in texts]
        kl[name] = kl_per_response(module, samples.sequences)[0].tolist()
        lengths[name] = samples.sequences.mask.sum(-1).tolist()
        if name == "sft":
            _, rival_texts = draw(module, conversations, stream=1)
            best_name = f"sft_best_of_{BEST_OF}"
            responses[best_name], lengths[best_name] = _best_of(module, conversations, reward)
            kl[best_name] = [best_of_n_kl(BEST_OF)] * len(prompts)
            rivals = [row[0] for row in rival_texts]
            rival_gold = np.array(playground.gold_reward(prompts, rivals))
    rows = {}
    for name, texts_of in responses.items():
        gold = np.array(playground.gold_reward(prompts, texts_of))
        won, tied = wins(gold[:, None], rival_gold[:, None])
        points = (won + tied / 2).ravel()
        rows[name] = Row(Estimate.of(gold), Estimate.of(points), Estimate.of(kl[name]), Estimate.of(lengths[name]))
    return rows, responses


def _best_of(module: SFT, conversations: list[list[Message]], reward: str) -> tuple[list[str], list[int]]:
    """Of ``BEST_OF`` samples to each prompt, the one the reward model likes best."""
    samples, texts = draw(module, conversations, samples=BEST_OF, stream=2)
    scores = score_sequences(load_scorer(Base(name=reward), trained=True), samples.sequences, SCORING_TOKENS)
    best = scores.view(-1, BEST_OF).argmax(-1)
    lengths = samples.sequences.mask.sum(-1).view(-1, BEST_OF)
    rows = torch.arange(len(best))
    return [row[i] for row, i in zip(texts, best.tolist(), strict=True)], lengths[rows, best].tolist()


def as_json(rows: dict[str, Row]) -> dict[str, Any]:
    """Plain numbers, by model and column."""
    return {name: asdict(row) for name, row in rows.items()}


def picture(rows: dict[str, Row], labels: dict[str, str], file: Path) -> None:
    """Gold reward against KL to SFT, and win rates, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (frontier, wins) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (name, row) in enumerate(rows.items()):
        colour = f"C{i}"
        gold, kl, win = row.gold_reward, row.kl, row.win_rate
        frontier.errorbar(
            kl.mean,
            gold.mean,
            xerr=[[kl.mean - kl.low], [kl.high - kl.mean]],
            yerr=[[gold.mean - gold.low], [gold.high - gold.mean]],
            fmt="o",
            color=colour,
            label=labels[name],
            capsize=3,
        )
        wins.barh(i, win.mean, xerr=[[win.mean - win.low], [win.high - win.mean]], color=colour, capsize=3)
    frontier.set_xscale("symlog", linthresh=1)
    frontier.set_xlim(left=-0.1)
    frontier.set_xlabel("exact KL to SFT (nats per response)")
    frontier.set_ylabel("gold reward")
    frontier.legend(frameon=False)
    frontier.grid(alpha=0.3)
    wins.set_yticks(range(len(rows)), [labels[name] for name in rows])
    wins.invert_yaxis()
    wins.axvline(0.5, color="0.4", linewidth=1, linestyle="--")
    wins.set_xlim(0, 1)
    wins.set_xlabel("win rate against SFT (gold reward, ties ½)")
    figure.savefig(file, dpi=150)
    plt.close(figure)
