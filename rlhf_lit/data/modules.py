"""The data modules, one for each kind of batch; ranked answers and rollouts of prompts have files of their own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch

from rlhf_lit.batches import PreferenceBatch, Sequences, SupervisedBatch, UnpairedBatch
from rlhf_lit.data import records
from rlhf_lit.data.chat import Conversation, Encoded, answers_to
from rlhf_lit.data.mismatch import MismatchedRows
from rlhf_lit.data.ranking_module import RankingDataModule
from rlhf_lit.data.records import RowReader
from rlhf_lit.data.rollout_module import RolloutDataModule
from rlhf_lit.data.sources import Source
from rlhf_lit.data.store import ColumnTypes, Rows
from rlhf_lit.data.text_module import Answer, TextDataModule
from rlhf_lit.data.truncation import truncate_pair, truncate_prompt

SPLITS = ("train", "validation", "test")

__all__ = [
    "PreferenceDataModule",
    "RankingDataModule",
    "RolloutDataModule",
    "SFTDataModule",
    "TextDataModule",
    "UnpairedDataModule",
]


class SFTDataModule(TextDataModule):
    """Demonstrations, in any of the supervised shapes.

    Args:
        train: training rows; the first argument, as of every data module.
        last_turn_only: only the last answer of a conversation is supervised, not each of them.
        rows: the other arguments of ``TextDataModule``, by name.
    """

    gives = SupervisedBatch
    wanted = "demonstrations"
    columns: ClassVar[ColumnTypes] = {"tokens": "tokens", "mask": "mask", "prompt": "tokens", "text": "text"}

    def __init__(
        self, train: Source | list[Source] | None = None, *, last_turn_only: bool = False, **rows: Any
    ) -> None:
        super().__init__(train, **rows)
        self.last_turn_only = last_turn_only

    @property
    def settings(self) -> list[object]:
        return [self.last_turn_only]

    def reader(self, first_rows: Sequence[Any], source: Source) -> RowReader[Any]:
        return records.demonstration_reader(first_rows, source)

    def conversations(self, record: records.Demonstration) -> list[Conversation]:
        last = len(record.messages) - 1
        return [Conversation(record.messages, last, last if self.last_turn_only else 0, record.tools)]

    def row(self, record: records.Demonstration, encoded: Sequence[Encoded]) -> dict[str, Any] | str:
        (whole,) = encoded
        if not any(whole.mask):
            return "zero supervised tokens"
        fitted = truncate_prompt(whole.tokens, whole.mask, self.max_length, self.truncation, self._bos)
        if fitted is None:
            return "over-long"
        return {"tokens": fitted[0], "mask": fitted[1], "prompt": self.cut_prompt(whole.prompt), "text": whole.text}

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> SupervisedBatch:
        sequences = Sequences.pad([row["tokens"] for row in examples], [row["mask"] for row in examples])
        return SupervisedBatch(sequences, self.micro_batch_tokens)

    def row_of(self, answers: Sequence[Answer]) -> dict[str, Any]:
        ((tokens, mask),) = answers
        return {"tokens": tokens, "mask": mask}

    def predict_dataloader(self) -> Any:
        return self.prompt_loader("predict")


class PreferenceDataModule(TextDataModule):
    """Preference pairs, in any of the paired shapes. Arguments: see ``TextDataModule``."""

    gives = PreferenceBatch
    wanted = "pairs"
    columns: ClassVar[ColumnTypes] = {
        "chosen": "tokens",
        "chosen_mask": "mask",
        "rejected": "tokens",
        "rejected_mask": "mask",
        "margin": "number",
        "prompt": "tokens",
        "text": "text",
    }

    def reader(self, first_rows: Sequence[Any], source: Source) -> RowReader[Any]:
        return records.preference_reader(first_rows, source, margins=self.reads_margins)

    @property
    def settings(self) -> list[object]:
        return [self.reads_margins]

    def conversations(self, record: records.Preference) -> list[Conversation]:
        return answers_to(record.prompt, [record.chosen, record.rejected], record.tools)

    def row(self, record: records.Preference, encoded: Sequence[Encoded]) -> dict[str, Any] | str:
        chosen, rejected = encoded
        if not any(chosen.mask) or not any(rejected.mask):
            return "zero supervised tokens"
        fitted = truncate_pair(chosen, rejected, self.max_length, self.truncation, self._bos)
        if fitted is None:
            return "over-long"
        prompt, text = self.cut_prompt(chosen.prompt), chosen.text
        chosen, rejected = fitted
        if chosen.tokens == rejected.tokens:
            return "chosen equal to rejected"
        return {
            "chosen": chosen.tokens,
            "chosen_mask": chosen.mask,
            "rejected": rejected.tokens,
            "rejected_mask": rejected.mask,
            "margin": record.margin,
            "prompt": prompt,
            "text": text,
        }

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> PreferenceBatch:
        sides = [
            Sequences.pad([row[side] for row in examples], [row[f"{side}_mask"] for row in examples])
            for side in ("chosen", "rejected")
        ]
        margin = torch.tensor([row["margin"] for row in examples], dtype=torch.float32)
        return PreferenceBatch(sides[0], sides[1], margin, self.micro_batch_tokens)

    @property
    def answers_per_row(self) -> int:
        return 2

    def row_of(self, answers: Sequence[Answer]) -> dict[str, Any]:
        (chosen, chosen_mask), (rejected, rejected_mask) = answers
        return {
            "chosen": chosen,
            "chosen_mask": chosen_mask,
            "rejected": rejected,
            "rejected_mask": rejected_mask,
            "margin": 0.0,
        }

    def responses(self) -> Iterator[tuple[list[int], list[bool]]]:
        """Tokens and masks of both sides of every pair that the present run compares."""
        for row in (row for name in SPLITS for row in self.rows_seen(name)):
            for side in ("chosen", "rejected"):
                yield row[side], row[f"{side}_mask"]

    def predict_dataloader(self) -> Any:
        """Pairs for a reward model to score, prompts for a policy to answer."""
        assert self.trainer is not None
        writes = hasattr(self.trainer.lightning_module, "respond")
        return self.prompt_loader("predict") if writes else self._loader("predict")


class UnpairedDataModule(TextDataModule):
    """Responses that were judged one by one, for KTO; a pair serves as two of them. Arguments: see ``TextDataModule``.

    Each row is also given a mismatched response, that of the next row with another prompt that fits, whatever batch it
    is in: what KTO's z is estimated from does not depend on the order of an epoch.
    """

    gives = UnpairedBatch
    wanted = "pairs"
    columns: ClassVar[ColumnTypes] = {
        "tokens": "tokens",
        "mask": "mask",
        "desirable": "flag",
        "prompt": "tokens",
        "text": "text",
    }

    def reader(self, first_rows: Sequence[Any], source: Source) -> RowReader[Any]:
        return records.judged_reader(first_rows, source)

    def conversations(self, record: records.Judged) -> list[Conversation]:
        return answers_to(record.prompt, [record.response], record.tools)

    def row(self, record: records.Judged, encoded: Sequence[Encoded]) -> dict[str, Any] | str:
        (whole,) = encoded
        if not any(whole.mask):
            return "zero supervised tokens"
        fitted = truncate_prompt(whole.tokens, whole.mask, self.max_length, self.truncation, self._bos)
        if fitted is None:
            return "over-long"
        return {
            "tokens": fitted[0],
            "mask": fitted[1],
            "desirable": record.desirable,
            "prompt": self.cut_prompt(whole.prompt),
            "text": whole.text,
        }

    def completed(self, rows: Rows) -> Rows:
        return MismatchedRows(rows, self.max_length)

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> UnpairedBatch:
        kinds = [
            Sequences.pad([row[kind] for row in examples], [row[mask] for row in examples])
            for kind, mask in (("tokens", "mask"), ("mismatched", "mismatched_mask"))
        ]
        desirable = torch.tensor([row["desirable"] for row in examples], dtype=torch.bool)
        return UnpairedBatch(kinds[0], kinds[1], desirable, self.micro_batch_tokens)

    def row_of(self, answers: Sequence[Answer]) -> dict[str, Any]:
        ((tokens, mask),) = answers
        return {"tokens": tokens, "mask": mask, "mismatched": tokens, "mismatched_mask": mask, "desirable": True}

    def responses(self) -> Iterator[tuple[list[int], list[bool]]]:
        """Tokens and masks of every response, and of every mismatched one, that the present run compares."""
        for row in (row for name in SPLITS for row in self.rows_seen(name)):
            yield row["tokens"], row["mask"]
            yield row["mismatched"], row["mismatched_mask"]

    def predict_dataloader(self) -> Any:
        return self.prompt_loader("predict")
