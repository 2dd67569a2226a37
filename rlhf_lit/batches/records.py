"""The kinds of batches, as typed records: the only thing `data` and `algorithms` share.

A batch is what one optimizer step sees on this rank. ``micro_batches()`` cuts it into pieces of at most
``micro_batch_tokens`` tokens, which is how this machine carries the step out and changes no result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from rlhf_lit.batches.micro_batches import Layout
from rlhf_lit.batches.sequences import Record, Sequences, _narrow, _widen
from rlhf_lit.errors import UserError


class Batch(Record):
    """What one optimizer step sees on this rank; a kind of batches is a frozen dataclass that derives from it.

    A kind answers for itself: the step, the checks before it and the data modules ask no further.

    Attributes:
        kind: what it holds, in words that follow "gives" or "learns from".
        data_module: the data module that makes it, by name.
        micro_batch_tokens: tokens that go through the device at once; a field of every kind.
    """

    kind: ClassVar[str] = "batches of a kind of their own"
    data_module: ClassVar[str] = ""
    micro_batch_tokens: int

    def answers(self) -> tuple[Sequences, ...]:
        """The sequences that are learned from, prompt and answer each; empty where they are still to be written."""
        raise self._without("answers")

    def rows_of_answers(self) -> Tensor:
        """[sequences of one member of ``answers()``] the row of the batch that each belongs to."""
        return torch.arange(len(self))

    def dummy(self) -> Self:
        """Dummy batch of the same kind, whose pass gathers what any other's does (see ``Sequences.dummy``)."""
        raise self._without("dummy")

    def micro_batches(self, layout: Layout = "padded") -> Iterator[Self]:
        """Pieces of at most ``micro_batch_tokens`` tokens, counted as ``layout`` lays them out."""
        raise self._without("micro_batches")

    def _without(self, method: str) -> UserError:
        return UserError(f"{type(self).__name__} has no {method}(), which every kind of batch must have (see Batch)")

    def __len__(self) -> int:
        raise NotImplementedError


@dataclass(frozen=True)
class SupervisedBatch(Batch):
    """Demonstrations for one optimizer step."""

    kind: ClassVar[str] = "demonstrations"
    data_module: ClassVar[str] = "SFTDataModule"

    sequences: Sequences
    micro_batch_tokens: int

    def answers(self) -> tuple[Sequences, ...]:
        return (self.sequences,)

    def dummy(self) -> SupervisedBatch:
        """Dummy batch of the same kind (see ``Sequences.dummy``)."""
        return replace(self, sequences=Sequences.dummy(self.sequences.tokens.device))

    def micro_batches(self, layout: Layout = "padded") -> Iterator[SupervisedBatch]:
        """Pieces of at most ``micro_batch_tokens`` tokens, length-sorted where no prompts are shared."""
        for rows in self.sequences.cut_responses(self.micro_batch_tokens, layout):
            yield self.select(rows)

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True)
class Comparisons:
    """Answers, each once, and which of them was preferred to which: what a reward model learns from.

    Attributes:
        answers: prompt + answer each, mask on the answer.
        better, worse: [pairs] int64, the answers of each pair.
        margin: [pairs] how much better the better one was rated (0 where unknown).
        siblings: [pairs] int64, how many pairs the same prompt has.
        best: [answers] bool, the answers that none to the same prompt was preferred to.
    """

    answers: Sequences
    better: Tensor
    worse: Tensor
    margin: Tensor
    siblings: Tensor
    best: Tensor


class ComparedBatch(Batch):
    """A batch of answers that were compared with one another: what a reward model learns from."""

    def comparisons(self) -> Comparisons:
        """All answers, each once, and which of them was preferred to which."""
        raise NotImplementedError

    def score_records(self, scores: Tensor) -> list[dict[str, Any]]:
        """One record per row of the data.

        Args:
            scores: [answers] of ``comparisons().answers``.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class PreferenceBatch(ComparedBatch):
    """Preference pairs for one optimizer step; both sides of a pair stay in one micro-batch.

    Attributes:
        chosen, rejected: prompt + response each, mask on the response.
        margin: [pairs] how much better the chosen side was rated (0 where unknown).
        reference_chosen, reference_rejected: [pairs, time] log π₀ of each response token, 0 off the mask, where they
            were computed beforehand.
    """

    kind: ClassVar[str] = "preference pairs"
    data_module: ClassVar[str] = "PreferenceDataModule"

    chosen: Sequences
    rejected: Sequences
    margin: Tensor
    micro_batch_tokens: int
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None

    def select(self, rows: Tensor) -> PreferenceBatch:
        """The given rows, per-token tensors trimmed like the sequences they belong to."""
        chosen = super().select(rows)
        return replace(
            chosen,
            reference_chosen=_narrow(chosen.reference_chosen, chosen.chosen),
            reference_rejected=_narrow(chosen.reference_rejected, chosen.rejected),
        )

    def answers(self) -> tuple[Sequences, ...]:
        return (self.chosen, self.rejected)

    def dummy(self) -> PreferenceBatch:
        """Dummy batch of the same kind (see ``Sequences.dummy``)."""
        side = Sequences.dummy(self.margin.device)
        known = None if self.reference_chosen is None else torch.zeros(1, 2, device=self.margin.device)
        return replace(self, chosen=side, rejected=side, margin=self.margin.new_zeros(1),
                       reference_chosen=known, reference_rejected=known)  # fmt: skip

    def sides(self) -> Sequences:
        """All chosen rows, then all rejected ones: one forward serves both."""
        return self.chosen.join(self.rejected)

    def reference_sides(self) -> Tensor | None:
        """The reference's log-probs of ``sides()``, [2·pairs, time], where they were computed beforehand."""
        if self.reference_chosen is None or self.reference_rejected is None:
            return None
        width = max(self.chosen.tokens.shape[1], self.rejected.tokens.shape[1])
        return torch.cat([_widen(self.reference_chosen, width), _widen(self.reference_rejected, width)])

    def comparisons(self) -> Comparisons:
        """One comparison for each pair: all chosen sides, then all rejected ones."""
        chosen = torch.arange(len(self), device=self.margin.device)
        return Comparisons(
            self.sides(),
            chosen,
            chosen + len(self),
            self.margin,
            torch.ones_like(chosen),
            torch.arange(2 * len(self), device=self.margin.device) < len(self),
        )

    def score_records(self, scores: Tensor) -> list[dict[str, Any]]:
        """Both scores of each pair, and whether the chosen one is higher."""
        chosen, rejected = (side.tolist() for side in scores.chunk(2))
        return [{"score_chosen": a, "score_rejected": b, "correct": a > b}
                for a, b in zip(chosen, rejected, strict=True)]  # fmt: skip

    def micro_batches(self, layout: Layout = "padded") -> Iterator[PreferenceBatch]:
        """Pieces of at most ``micro_batch_tokens`` tokens, both sides of a pair counted."""
        pair = torch.arange(len(self)).repeat(2)
        for rows in self.sides().cut_units(pair, self.micro_batch_tokens, layout):
            yield self.select(rows)

    def __len__(self) -> int:
        return len(self.chosen)


@dataclass(frozen=True)
class UnpairedBatch(Batch):
    """Single responses, each judged good or bad, for one optimizer step.

    Attributes:
        sequences: prompt + response, mask on the response.
        mismatched: the same prompts with the response of another row, mask on the response.
        desirable: [rows] bool.
        reference, reference_mismatched: [rows, time] log π₀ of each response token of either, 0 off the mask, where
            they were computed beforehand.
    """

    kind: ClassVar[str] = "answers judged one by one"
    data_module: ClassVar[str] = "UnpairedDataModule"

    sequences: Sequences
    mismatched: Sequences
    desirable: Tensor
    micro_batch_tokens: int
    reference: Tensor | None = None
    reference_mismatched: Tensor | None = None

    def select(self, rows: Tensor) -> UnpairedBatch:
        """The given rows, per-token tensors trimmed like the sequences they belong to."""
        chosen = super().select(rows)
        return replace(
            chosen,
            reference=_narrow(chosen.reference, chosen.sequences),
            reference_mismatched=_narrow(chosen.reference_mismatched, chosen.mismatched),
        )

    def answers(self) -> tuple[Sequences, ...]:
        return (self.sequences,)

    def dummy(self) -> UnpairedBatch:
        """Dummy batch of the same kind (see ``Sequences.dummy``)."""
        device = self.desirable.device
        row = Sequences.dummy(device)
        known = None if self.reference is None else torch.zeros(1, 2, device=device)
        return replace(self, sequences=row, mismatched=row, desirable=self.desirable.new_ones(1),
                       reference=known, reference_mismatched=known)  # fmt: skip

    def micro_batches(self, layout: Layout = "padded") -> Iterator[UnpairedBatch]:
        """Pieces of at most ``micro_batch_tokens`` tokens of ``sequences``; the mismatched ones are not counted."""
        for rows in self.sequences.cut_responses(self.micro_batch_tokens, layout):
            yield self.select(rows)

    def __len__(self) -> int:
        return len(self.sequences)


@dataclass(frozen=True)
class RankedBatch(ComparedBatch):
    """Prompts with several ranked answers each, for one optimizer step; a prompt's answers stay in one micro-batch.

    Attributes:
        sequences: prompt + answer each, mask on the answer; those of one prompt stand together.
        counts: [prompts] int64, how many answers each prompt has.
        rank: [answers] int64, 0 for the best of its prompt; answers of the same rank are not compared.
        rating: [answers] float32, differences of which are margins; 0 where there are ranks alone.
    """

    kind: ClassVar[str] = "ranked lists of answers"
    data_module: ClassVar[str] = "RankingDataModule"

    sequences: Sequences
    counts: Tensor
    rank: Tensor
    rating: Tensor
    micro_batch_tokens: int

    def select(self, rows: Tensor) -> RankedBatch:
        """The given prompts with all of their answers, in the given order."""
        rows = rows.to(self.counts.device)
        start = self.counts.cumsum(0) - self.counts
        places = [torch.arange(int(start[row]), int(start[row] + self.counts[row])) for row in rows.tolist()]
        kept = (torch.cat(places) if places else torch.zeros(0, dtype=torch.int64)).to(self.counts.device)
        return replace(
            self,
            sequences=self.sequences.select(kept),
            counts=self.counts[rows],
            rank=self.rank[kept],
            rating=self.rating[kept],
        )

    def answers(self) -> tuple[Sequences, ...]:
        return (self.sequences,)

    def dummy(self) -> RankedBatch:
        """Dummy batch of the same kind (see ``Sequences.dummy``)."""
        return replace(
            self,
            sequences=Sequences.dummy(self.rank.device, rows=2),
            counts=self.counts.new_tensor([2]),
            rank=self.rank.new_tensor([0, 1]),
            rating=self.rating.new_zeros(2),
        )

    def rows_of_answers(self) -> Tensor:
        return self.prompt_of_answer()

    def prompt_of_answer(self) -> Tensor:
        """[answers] the prompt's number in the batch."""
        return torch.repeat_interleave(torch.arange(len(self), device=self.counts.device), self.counts)

    def comparisons(self) -> Comparisons:
        """Every two answers of a prompt that differ in rank."""
        prompt = self.prompt_of_answer()
        preferred = (prompt[:, None] == prompt[None]) & (self.rank[:, None] < self.rank[None])
        better, worse = preferred.nonzero(as_tuple=True)
        per_prompt = torch.bincount(prompt[better], minlength=len(self))
        return Comparisons(
            self.sequences,
            better,
            worse,
            self.rating[better] - self.rating[worse],
            per_prompt[prompt[better]],
            self.rank == 0,
        )

    def score_records(self, scores: Tensor) -> list[dict[str, Any]]:
        """The scores of each prompt's answers."""
        return [{"scores": part.tolist()} for part in scores.split(self.counts.tolist())]

    def micro_batches(self, layout: Layout = "padded") -> Iterator[RankedBatch]:
        """Pieces of at most ``micro_batch_tokens`` tokens, all answers to a prompt counted."""
        for rows in self.sequences.cut_units(self.prompt_of_answer().cpu(), self.micro_batch_tokens, layout):
            yield self.select(rows)

    def __len__(self) -> int:
        return len(self.counts)
