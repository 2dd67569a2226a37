"""What the algorithms that write their own answers learn from: prompts, and the experience made of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from rlhf_lit.batches.micro_batches import Layout
from rlhf_lit.batches.records import Batch
from rlhf_lit.batches.sequences import Record, Sequences, _widen


@dataclass(frozen=True)
class PromptBatch(Record):
    """Prompts to be answered.

    Attributes:
        prompts: the prompt tokens; the mask is False everywhere.
        index: [rows] int64, the prompt's number in its dataset: what sampling noise is keyed by.
        sample: [rows] int64, 0 for the first answer to a prompt, 1 for the second, …
        texts: the rendered prompts as text.
        rows: the row each prompt came from, as the file had it (what a reward function may read).
        micro_batch_tokens: padded tokens of a training micro-batch.
    """

    prompts: Sequences
    index: Tensor
    sample: Tensor
    texts: tuple[str, ...]
    rows: tuple[dict[str, Any], ...]
    micro_batch_tokens: int

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class ExperienceBatch(Batch):
    """A rollout, or a minibatch of one: prompts, their sampled responses, and what PPO knows about each action.

    Attributes:
        sequences: prompt + response, the mask on the response (EOS included, nothing after it).
        sampled_logprobs: [rows, time] log-prob of each action as the sampler itself drew it.
        old_logprobs: [rows, time] the same under the same policy, from the training forward.
        reference_logprobs: [rows, time] the same under the reference.
        values: [rows, time] value of the state in which each action was taken, at sampling time: the critic's, or the
            baseline its response was compared with.
        advantages, returns: [rows, time]; 0 off the mask.
        kl_coefficient: β of this rollout.
        micro_batch_tokens: padded tokens of a micro-batch.
    """

    kind: ClassVar[str] = "prompts to be answered"
    data_module: ClassVar[str] = "RolloutDataModule"

    sequences: Sequences
    sampled_logprobs: Tensor
    old_logprobs: Tensor
    reference_logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kl_coefficient: float
    micro_batch_tokens: int

    def select(self, rows: Tensor) -> ExperienceBatch:
        """The given rows, every per-token tensor trimmed to the longest of them."""
        sequences = self.sequences.select(rows)
        width = sequences.tokens.shape[1]

        cut: dict[str, Any] = {name: x[rows.to(x.device), :width] for name, x in self.columns().items()}
        return replace(self, sequences=sequences, **cut)

    def join(self, other: ExperienceBatch) -> ExperienceBatch:
        """These rows, then the other's, padded to the wider of the two."""
        sequences = self.sequences.join(other.sequences)
        width, theirs = sequences.tokens.shape[1], other.columns()
        joined: dict[str, Any] = {
            name: torch.cat([_widen(column, width), _widen(theirs[name], width)])
            for name, column in self.columns().items()
        }
        return replace(self, sequences=sequences, **joined)

    def columns(self) -> dict[str, Tensor]:
        """The per-token tensors beside the sequences."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def answers(self) -> tuple[Sequences, ...]:
        return (self.sequences,)

    def dummy(self) -> ExperienceBatch:
        """Dummy batch of the same kind (see ``Sequences.dummy``)."""
        nothing: dict[str, Any] = {name: column.new_zeros(1, 2) for name, column in self.columns().items()}
        return replace(self, sequences=Sequences.dummy(self.values.device), **nothing)

    def micro_batches(self, layout: Layout = "padded") -> Iterator[ExperienceBatch]:
        """Pieces of at most ``micro_batch_tokens`` tokens, length-sorted where no prompts are shared."""
        for rows in self.sequences.cut_responses(self.micro_batch_tokens, layout):
            yield self.select(rows)

    def __len__(self) -> int:
        return len(self.sequences)
