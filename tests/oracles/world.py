"""A world in which everything can be enumerated: three prompts, six tokens, responses of one or two tokens.

π₀ is a random table (``table.py``) and the rewards are standard normal numbers. The optimum is
π*(y|x) ∝ π₀(y|x)·exp(r(x, y)/β). One prompt is EOS itself, as a prompt may hold the end of an earlier turn.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from table import number
from torch import Tensor

from rlhf_lit.algorithms import PPO
from rlhf_lit.algorithms.algorithm import Optimizer
from rlhf_lit.algorithms.policy import Writer
from rlhf_lit.batches import PromptBatch, Sequences
from rlhf_lit.data.modules import RolloutDataModule
from rlhf_lit.data.records import Source
from rlhf_lit.losses.kl import FixedKL
from rlhf_lit.losses.policy_gradient import ClippedValueLoss
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.base import Base
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.roles import Critic, Role
from rlhf_lit.rollout.engine import Samples, Sampling
from rlhf_lit.rollout.rewards import RewardFromFunction

BETA = 0.5
LETTERS = ["a", "b", "c", "d", "e", "<eos>"]
VOCABULARY, STOP = len(LETTERS), len(LETTERS) - 1
PROMPTS = ["a", "b", "<eos>"]
PROMPT_TOKENS = [LETTERS.index(prompt) for prompt in PROMPTS]
EPISODES = 768  # of a rollout
EVERYTHING = 10**9  # padded tokens: all rows go through at once


@dataclass(frozen=True, eq=False)
class World:
    """All responses there are, the same to each prompt, and what they are worth.

    Attributes:
        responses: the responses' tokens.
        rewards: [prompts, responses] r, float64 with the values of float32: a reward source returns float32.
    """

    responses: list[list[int]]
    rewards: Tensor

    @cached_property
    def texts(self) -> list[str]:
        """The responses as a reward function sees them."""
        return [" ".join(LETTERS[token] for token in response if token != STOP) for response in self.responses]

    @cached_property
    def sequences(self) -> Sequences:
        """Every response to every prompt, prompt by prompt."""
        return Sequences.pad(
            [[prompt, *response] for prompt in PROMPT_TOKENS for response in self.responses],
            [[False, *(True for _ in response)] for _ in PROMPTS for response in self.responses],
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest response."""
        return max(map(len, self.responses))

    def score(self, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        """The rewards, as a reward function."""
        cells = zip(prompts, responses, strict=True)
        return [float(self.rewards[PROMPTS.index(p), self.texts.index(r)]) for p, r in cells]

    def table(self, module: Writer, role: Role = "policy") -> Tensor:
        """[prompts, responses] log π(y|x) of a role."""
        with torch.no_grad(), module.roles.acting(role) as model:
            return row_sums(token_logprobs(model, self.sequences), self.sequences.mask).view(len(PROMPTS), -1)

    def optimum(self, reference: Tensor, rewards: Tensor | None = None, beta: float = BETA) -> Tensor:
        """[prompts, responses] log π* of π₀'s table and rewards, the world's own unless told otherwise."""
        return (reference + (self.rewards if rewards is None else rewards) / beta).log_softmax(-1)

    def first_tokens(self, table: Tensor) -> Tensor:
        """[prompts, responses] log-weights of responses → [prompts, V] of those that begin with each token."""
        firsts = torch.tensor([response[0] for response in self.responses])
        return torch.stack([table[:, firsts == token].logsumexp(-1) for token in range(VOCABULARY)], -1)

    def write_policy(self, module: Writer, table: Tensor) -> None:
        """Make the policy be [prompts, responses] log-probs."""
        firsts = self.first_tokens(table)
        weight = module.roles.policy.lm_head.weight.data
        for prompt, first, row in zip(PROMPT_TOKENS, firsts, table, strict=True):
            weight[:, number([prompt], VOCABULARY)] = first.to(weight.dtype)
            for response, logprob in zip(self.responses, row, strict=True):
                if len(response) > 1:  # up to the constant that a softmax does not see
                    weight[response[1], number([prompt, response[0]], VOCABULARY)] = logprob.to(weight.dtype)

    def everything(self) -> tuple[PromptBatch, Samples]:
        """Every trajectory once, as a rollout that was sampled."""
        sequences, copies = self.sequences, len(self.responses)
        prompts = Sequences.pad([[p] for p in PROMPT_TOKENS for _ in range(copies)], [[False]] * len(sequences))
        index = torch.arange(len(PROMPTS)).repeat_interleave(copies)
        batch = PromptBatch(
            prompts,
            index,
            torch.arange(copies).repeat(len(PROMPTS)),
            tuple(PROMPTS[i] for i in index.tolist()),
            tuple({} for _ in index),
            EVERYTHING,
        )
        ended = torch.tensor([response[-1] == STOP for response in self.responses]).repeat(len(PROMPTS))
        return batch, Samples(sequences, torch.zeros(sequences.tokens.shape), ended)


def random_rewards(responses: int) -> Tensor:
    """[prompts, responses] standard normal numbers: the first columns of a draw in which EOS at once is worth
    something, so that π* has short and long responses."""
    drawn = torch.randn(len(PROMPTS), 1 + (VOCABULARY - 1) * VOCABULARY, generator=torch.Generator().manual_seed(63))
    return drawn[:, :responses].double()


# An EOS at once, or another token and then any.
SEQUENCES = World(
    [[STOP], *([first, second] for first in range(STOP) for second in range(VOCABULARY))], random_rewards(31)
)
# Half as much at stake: with the KL in the loss, tokens that die out do so slowly.
BANDIT = World([[token] for token in range(VOCABULARY)], random_rewards(VOCABULARY) / 2)


def distance(a: Tensor, b: Tensor) -> float:
    """Total variation between two tables of log-probs, the largest over the prompts."""
    return float((a.exp() - b.exp()).abs().sum(-1).max() / 2)


class SilentPPO(PPO):
    """PPO without a log: Lightning takes longer to keep a step's numbers than a table takes to make the step."""

    def log(self, name: str, value: Any, **settings: Any) -> None:
        """Nobody reads it here."""


def make_ppo(base: Base, world: World, **settings: Any) -> PPO:
    """PPO as it reaches the optimum fastest: Adam at 0.03, no limit to the gradient, a critic that is not held back."""
    defaults: dict[str, Any] = {
        "reward": RewardFromFunction(world.score),
        "kl": FixedKL(BETA),
        "sampling": Sampling(max_new_tokens=world.longest, rows_at_once=EPISODES),
        "critic": Critic(init="policy"),
        "value_loss": ClippedValueLoss(clip=None, coefficient=0.5),
        "learning_rate": 0.03,
        "optimizer": Optimizer(eps=1e-5, max_grad_norm=None),
    }
    torch.manual_seed(0)  # a new value head is drawn from the global generator
    module = SilentPPO(base, **{**defaults, **settings})
    module.configure_model()
    return module


def train(module: PPO, folder: Path, rollouts: int) -> None:
    """So many rollouts of 256 responses to each prompt, four passes over each, the learning rate annealed to 0."""
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    data = RolloutDataModule(
        train=Source(path=str(file)),
        rollout_size=len(PROMPTS),
        samples_per_prompt=EPISODES // len(PROMPTS),
        batch_size=EPISODES // 3,
        ppo_epochs=4,
        episodes=EPISODES * rollouts,
        micro_batch_tokens=EVERYTHING,
        template="none",
        cache=None,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    assert trainer.global_step == rollouts * 12
