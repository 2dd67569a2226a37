"""Where a rollout's scores come from: a trained reward model, or any Python function."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences, cut_by_tokens
from rlhf_lit.errors import UserError
from rlhf_lit.models.heads import reward_bias, sequence_scores
from rlhf_lit.models.loading import Base, Dtype, load_scorer, load_tokenizer, unwrapped

RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]


@dataclass(frozen=True)
class MissingEOS:
    """What becomes of the score of a response that was cut at the length limit.

    Args:
        rule: `subtract` the value from the score, or `replace` the score by it.
        value: the number.
    """

    rule: Literal["subtract", "replace"]
    value: float

    def __call__(self, scores: Tensor, ended: Tensor) -> Tensor:
        """[rows] scores → [rows] scores, changed where ``ended`` is False."""
        changed = scores - self.value if self.rule == "subtract" else torch.full_like(scores, self.value)
        return torch.where(ended, scores, changed)


class RewardSource(nn.Module):
    """Scores of whole responses.

    Attributes:
        parts: [rows] scores of each named source of the last call, unweighted; empty where there is but one.
    """

    parts: dict[str, Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.parts = {}

    def prepare(self, tokenizer: Any) -> None:
        """Load what is needed, once, before the first rollout.

        Args:
            tokenizer: the policy's, whose tokens will be scored.
        """

    def critic_base(self) -> Base | None:
        """Where a critic can start from; None where the source is no model."""
        return None

    def forward(
        self,
        sequences: Sequences,
        prompts: list[str],
        responses: list[str],
        rows: list[dict[str, Any]],
        budget: int,
    ) -> Tensor:
        """One score per row.

        Args:
            sequences: prompt + response, cut after the first stop token.
            prompts, responses: the same as text, without special tokens in the response.
            rows: the rows of the data file the prompts came from.
            budget: padded tokens that may go through the device at once.

        Returns:
            [rows] float32 scores.
        """
        raise NotImplementedError


class RewardFromModel(RewardSource):
    """The score of a RewardModel run.

    Args:
        path: its run folder (`runs/<name>`, or one version of it), an `hf/` folder, or a hub name.
        dtype: of the base weights.
    """

    def __init__(self, path: str, dtype: Dtype = "float32") -> None:
        super().__init__()
        self.base = Base(name=path, dtype=dtype)
        self.model: nn.Module | None = None

    def critic_base(self) -> Base:
        return self.base

    def prepare(self, tokenizer: Any) -> None:
        if self.model is not None:
            return
        own = load_tokenizer(self.base)
        if own.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"reward.path: the reward model in {self.base.name} has another vocabulary than the policy; "
                "train it from the same base"
            )
        self.model = load_scorer(self.base, trained=True).requires_grad_(False)

    def forward(
        self,
        sequences: Sequences,
        prompts: list[str],
        responses: list[str],
        rows: list[dict[str, Any]],
        budget: int,
    ) -> Tensor:
        assert self.model is not None, "prepare() comes first"
        return score_sequences(self.model, sequences, budget)


def score_sequences(model: nn.Module, sequences: Sequences, budget: int) -> Tensor:
    """[rows] scores of a reward model, the constant it was centred by included."""
    inner = unwrapped(model)
    scores = torch.zeros(len(sequences), device=sequences.tokens.device)
    with torch.no_grad():
        for rows in cut_by_tokens(sequences.lengths, budget):
            rows = rows.to(scores.device)
            scores[rows] = sequence_scores(model, inner.score, sequences.select(rows)).to(scores.dtype)
    return scores + reward_bias(inner)


class RewardFromFunction(RewardSource):
    """Any function `(prompts, responses, rows) -> scores`, named by its import path.

    Args:
        function: gets lists of prompt texts, response texts and data rows; returns one number for each, in a list, an
            array or a tensor.
    """

    def __init__(self, function: RewardFunction) -> None:
        super().__init__()
        self.function = function

    def forward(
        self,
        sequences: Sequences,
        prompts: list[str],
        responses: list[str],
        rows: list[dict[str, Any]],
        budget: int,
    ) -> Tensor:
        name = getattr(self.function, "__qualname__", repr(self.function))
        scores = self.function(prompts, responses, rows)
        if hasattr(scores, "tolist"):  # an array or a tensor
            scores = scores.tolist()
        if not isinstance(scores, Sequence):
            raise UserError(f"reward.function: {name} returned a {type(scores).__name__} instead of a list of numbers")
        if len(scores) != len(responses):
            raise UserError(f"reward.function: {name} returned {len(scores)} scores for {len(responses)} responses")
        for i, score in enumerate(scores):
            if not isinstance(score, int | float) or not math.isfinite(score):
                raise UserError(
                    f"reward.function: {name} returned {score!r} instead of a number for the response {responses[i]!r}"
                )
        return torch.tensor(scores, dtype=torch.float32, device=sequences.tokens.device)
