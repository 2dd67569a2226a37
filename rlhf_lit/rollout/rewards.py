"""Where a rollout's scores come from: a trained reward model, any Python function, or a weighted sum of sources.

Sources that check a response by a rule, without a model, are in ``verifiable.py`` and the files it names.
"""

from __future__ import annotations

import math
import reprlib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from rlhf_lit.batches import Sequences
from rlhf_lit.batches.micro_batches import no_rows
from rlhf_lit.errors import UserError
from rlhf_lit.models.adapters import holds_adapter
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base
from rlhf_lit.models.heads import reward_bias, sequence_scores
from rlhf_lit.models.loading import load_scorer, load_tokenizer
from rlhf_lit.models.packing import layout_of
from rlhf_lit.models.quantization import Dtype, Quantization
from rlhf_lit.models.roles import Roles
from rlhf_lit.parallel.sharding import sharding_of

RewardFunction = Callable[[list[str], list[str], list[dict[str, Any]]], list[float]]

LARGEST = torch.finfo(torch.float32).max

_short = reprlib.Repr()
_short.maxstring = _short.maxother = 100


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

    def share(self, roles: Roles) -> None:
        """Take a place on the policy's base, where the source can; called once, before ``prepare``."""

    def prepare(self, tokenizer: Any) -> None:
        """Load what is needed, once, before the first rollout.

        Args:
            tokenizer: the policy's, whose tokens will be scored.
        """

    def critic_base(self) -> Base | None:
        """Where a critic can start from; None where the source is no model."""
        return None

    def unreadable(self, row: dict[str, Any]) -> str | None:
        """Why the source cannot read a row's gold answer, in a few words that rows are counted under.

        Args:
            row: as the data file has it. Data modules ask about every row before the first step, and drop it.

        Returns:
            The reason, or None where the answer can be read, or none is needed.
        """
        return None

    def all_unreadable(self, rows: list[dict[str, Any]]) -> list[str | None]:
        """``unreadable`` of each row; for a source that reads many at once faster."""
        return [self.unreadable(row) for row in rows]

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

    Where policy and reward model are both LoRA adapters they stand on one base: the reward is a frozen adapter and a
    head, and costs no second model. Otherwise it is a model of its own beside the policy.

    Args:
        path: its run folder (`runs/<name>`, or one version of it), an `hf/` folder, or a hub name.
        own_base: load the reward model's own base even so, which may then be another one than the policy's.
        dtype: of the weights of a base of its own.
        quantization: 4 bits for a base of its own; null is what an adapter was trained on, or full precision.
    """

    def __init__(
        self,
        path: str,
        own_base: bool = False,
        dtype: Dtype = "float32",
        quantization: Quantization | None = None,
    ) -> None:
        super().__init__()
        self.base = Base(name=path, dtype=dtype, quantization=quantization)
        self.own_base = own_base
        self.model: nn.Module | None = None
        # In a tuple, so that the policy's modules do not count as this one's.
        self._shared: tuple[Roles, str] | None = None

    def critic_base(self) -> Base:
        return self.base

    def share(self, roles: Roles) -> None:
        if self._shared is None and not self.own_base and roles.shared and holds_adapter(self.base):
            self._shared = roles, roles.add_reward(self.base)

    def prepare(self, tokenizer: Any) -> None:
        if self.model is not None:
            return
        own = load_tokenizer(self.base)
        if own.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"reward.path: the reward model in {self.base.name} has another vocabulary than the policy; "
                "train it from the same base"
            )
        if self._shared is None:
            self.model = load_scorer(self.base, trained=True, frozen=True)

    def forward(
        self,
        sequences: Sequences,
        prompts: list[str],
        responses: list[str],
        rows: list[dict[str, Any]],
        budget: int,
    ) -> Tensor:
        if self._shared is not None:
            roles, role = self._shared
            with roles.acting(role) as model:
                return _in_pieces(model, roles.heads[role], sequences, budget)
        assert self.model is not None, "prepare() comes first"
        return score_sequences(self.model, sequences, budget)


def score_sequences(model: nn.Module, sequences: Sequences, budget: int) -> Tensor:
    """[rows] scores of a reward model, the constant it was centred by included."""
    inner = unwrapped(model)
    return _in_pieces(model, inner.score, sequences, budget) + reward_bias(inner)


@torch.no_grad()
def _in_pieces(model: nn.Module, head: nn.Module, sequences: Sequences, budget: int) -> Tensor:
    """[rows] the head's scores, in micro-batches of at most ``budget`` tokens."""
    scores = torch.zeros(len(sequences), device=sequences.tokens.device)
    groups = sequences.cut_responses(budget, layout_of(model))
    for rows, counts in sharding_of(model).passes(groups, no_rows):
        rows = rows.to(scores.device)
        part = sequences.part(rows)
        found = sequence_scores(model, head, part).to(scores.dtype)
        if counts:
            scores[rows] = found
    return scores


class RewardFromFunction(RewardSource):
    """Any function `(prompts, responses, rows) -> scores`, named by its import path.

    Args:
        function: gets lists of prompt texts, response texts and data rows; returns one number for each, in a list, an
            array or a tensor. True counts as 1, False as 0.
    """

    def __init__(self, function: RewardFunction) -> None:
        super().__init__()
        self.function = function

    @property
    def name(self) -> str:
        """What messages call the function."""
        return str(getattr(self.function, "__qualname__", repr(self.function)))

    def forward(
        self,
        sequences: Sequences,
        prompts: list[str],
        responses: list[str],
        rows: list[dict[str, Any]],
        budget: int,
    ) -> Tensor:
        if not responses:  # of a rank without rows, which runs the passes of the others
            return torch.zeros(0, device=sequences.tokens.device)
        try:
            scores = self.function(prompts, responses, rows)
        except UserError:
            raise
        except Exception as error:
            raise UserError(self._complaint(error, prompts, responses, rows)) from error
        return score_tensor(scores, responses, sequences.tokens.device, f"reward.function: {self.name}")

    def _complaint(self, error: Exception, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> str:
        """What was raised and where; and on which response, where the function raises the same on it alone."""
        line = f"reward.function: {self.name} raised {_described(error)}"
        for frame in traceback.extract_tb(error.__traceback__)[1:2]:  # the function's own, below ours
            line += f" ({Path(frame.filename).name}, line {frame.lineno})"
        for i in range(len(responses)):
            try:
                self.function(prompts[i : i + 1], responses[i : i + 1], rows[i : i + 1])
            except Exception as again:
                if _described(again) == _described(error):
                    return f"{line}; the first response it fails on is {shown(responses[i])} to {shown(prompts[i])}"
        return line


class RewardSum(RewardSource):
    """Σ weight · score over several named sources, whose own scores are logged as `objective/scores/<name>`.

    Args:
        sources: by a name of yours: the reward sources. A critic that starts from the reward starts from the first of
            them, in this order, that is a model.
        weights: of each source, by the same names. 0 only logs it; a negative weight turns it around.

    Raises:
        UserError: no source, names that do not agree, or a weight that is not finite.
    """

    def __init__(self, sources: dict[str, RewardSource], weights: dict[str, float]) -> None:
        super().__init__()
        if not sources:
            raise UserError("reward.sources: name at least one source")
        for name in sources:
            if name not in weights:
                raise UserError(f"reward.weights: no weight for the source {name!r}")
        for name, weight in weights.items():
            if name not in sources:
                raise UserError(f"reward.weights: {name!r} names no source; there is {', '.join(sources)}")
            require_finite(f"reward.weights.{name}", weight)
        for name in sources:
            if not name or "." in name or hasattr(nn.ModuleDict(), name):  # as torch names modules
                raise UserError(f"reward.sources: {name!r} cannot be the name of a source; choose another")
        self.sources = cast("Mapping[str, RewardSource]", nn.ModuleDict(sources))
        self.weights = weights

    def share(self, roles: Roles) -> None:
        for name, source in self.sources.items():
            with _complaining_as(name):
                source.share(roles)

    def prepare(self, tokenizer: Any) -> None:
        for name, source in self.sources.items():
            with _complaining_as(name):
                source.prepare(tokenizer)

    def critic_base(self) -> Base | None:
        """That of the first source, in the order given, that has one."""
        bases = (source.critic_base() for source in self.sources.values())
        return next((base for base in bases if base is not None), None)

    def unreadable(self, row: dict[str, Any]) -> str | None:
        """What the first source says, in the order given, that cannot read the row."""
        return self.all_unreadable([row])[0]

    def all_unreadable(self, rows: list[dict[str, Any]]) -> list[str | None]:
        found: list[str | None] = [None] * len(rows)
        for name, source in self.sources.items():
            with _complaining_as(name):
                reasons = source.all_unreadable(rows)
            found = [one or (reason and f"{name}: {reason}") for one, reason in zip(found, reasons, strict=True)]
        return found

    def forward(
        self,
        sequences: Sequences,
        prompts: list[str],
        responses: list[str],
        rows: list[dict[str, Any]],
        budget: int,
    ) -> Tensor:
        self.parts = {}
        for name, source in self.sources.items():
            with _complaining_as(name):
                self.parts[name] = source(sequences, prompts, responses, rows, budget)
        return torch.stack([self.weights[name] * part for name, part in self.parts.items()]).sum(0)


def score_tensor(scores: Any, responses: Sequence[str], device: torch.device, giver: str) -> Tensor:
    """Scores in any common form, checked.

    Args:
        scores: one number for each response: a list or tuple, an array, a tensor, or a list of their scalars.
        responses: the texts that were scored.
        device: where the scores are wanted.
        giver: the source, as a message begins: its config key and name.

    Returns:
        [rows] float32 scores.

    Raises:
        UserError: another type or number of scores, or one that is no number, or not finite in float32.
    """
    if hasattr(scores, "tolist"):  # an array or a tensor
        scores = scores.tolist()
    if not isinstance(scores, Sequence):
        raise UserError(f"{giver} returned a {type(scores).__name__} instead of a list of numbers")
    if len(scores) != len(responses):
        raise UserError(f"{giver} returned {len(scores)} scores for {len(responses)} responses")
    numbers = [score.tolist() if hasattr(score, "tolist") else score for score in scores]
    for response, number in zip(responses, numbers, strict=True):
        # NaN compares as False, and an int beyond every float compares exactly.
        if not isinstance(number, int | float) or not abs(number) <= LARGEST:
            raise UserError(
                f"{giver} returned {shown(number)} instead of a number (finite in float32) for "
                f"the response {shown(response)}"
            )
    return torch.tensor(numbers, dtype=torch.float32, device=device)


def shown(value: Any) -> str:
    """A response or a value in a message: on one line, and enough of it to recognise it by."""
    return " ".join(_short.repr(value).split())


def require_finite(field: str, value: float) -> None:
    """Refuse a setting that is NaN or infinite. Raises UserError."""
    if not math.isfinite(value):
        raise UserError(f"{field} must be a finite number, not {value}")


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")


@contextmanager
def _complaining_as(name: str) -> Iterator[None]:
    """Name the source of a sum in its complaint: `reward.path: …` becomes `reward.sources.<name>.path: …`."""
    try:
        yield
    except UserError as error:
        message = str(error)
        rest = message.removeprefix("reward") if message.startswith("reward.") else f": {message}"
        raise UserError(f"reward.sources.{name}{rest}") from error
