"""The data modules, one for each kind of batch; ranked answers and rollouts of prompts have files of their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlhf_lit.batches import PreferenceBatch, Sequences, SupervisedBatch, UnpairedBatch
from rlhf_lit.data import records
from rlhf_lit.data.ranking_module import RankingDataModule
from rlhf_lit.data.records import RowReport, Source
from rlhf_lit.data.rollout_module import RolloutDataModule
from rlhf_lit.data.text_module import Answer, TextDataModule
from rlhf_lit.data.truncation import truncate_pair, truncate_prompt
from rlhf_lit.errors import UserError

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
    """Demonstrations, in any of the supervised shapes. Arguments: see ``TextDataModule``."""

    gives = SupervisedBatch

    def read(self, source: Source) -> tuple[list[Any], RowReport]:
        rows = records.rows_of(source, "demonstrations")
        return records.demonstrations(rows, source, on_bad_row=self.on_bad_row)

    def encode(self, record: records.Demonstration) -> dict[str, Any] | str:
        encoded = self.chat.demonstration(record.messages)
        if not any(encoded.mask):
            return "zero supervised tokens"
        fitted = truncate_prompt(encoded.tokens, encoded.mask, self.max_length, self.truncation, self._bos)
        if fitted is None:
            return "over-long"
        prompt = record.messages[:-1]
        return {
            "tokens": fitted[0],
            "mask": fitted[1],
            "prompt": self.prompt_tokens(prompt),
            "text": self.prompt_text(prompt),
            "moved": encoded.boundary_moved,
        }

    def collate(self, examples: list[dict[str, Any]]) -> SupervisedBatch:
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

    def read(self, source: Source) -> tuple[list[Any], RowReport]:
        rows = records.rows_of(source, "pairs")
        return records.preferences(rows, source, on_bad_row=self.on_bad_row, margins=self.reads_margins)

    def encode(self, record: records.Preference) -> dict[str, Any] | str:
        chosen, rejected = self.chat.pair(record.prompt, record.chosen, record.rejected)
        if not any(chosen.mask) or not any(rejected.mask):
            return "zero supervised tokens"
        fitted = truncate_pair(chosen, rejected, self.max_length, self.truncation, self._bos)
        if fitted is None:
            return "over-long"
        chosen, rejected = fitted
        if chosen.tokens == rejected.tokens:
            return "chosen equal to rejected"
        return {
            "chosen": chosen.tokens,
            "chosen_mask": chosen.mask,
            "rejected": rejected.tokens,
            "rejected_mask": rejected.mask,
            "margin": record.margin,
            "prompt": self.prompt_tokens(record.prompt),
            "text": self.prompt_text(record.prompt),
            "moved": chosen.boundary_moved,
        }

    def collate(self, examples: list[dict[str, Any]]) -> PreferenceBatch:
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
        return self.prompt_loader("predict") if writes else self._loader("predict", shuffle=False)


class UnpairedDataModule(TextDataModule):
    """Responses that were judged one by one, for KTO; a pair serves as two of them. Arguments: see ``TextDataModule``.

    Each row is also given a mismatched response, that of the next row with another prompt that fits, whatever batch it
    is in: what KTO's z is estimated from does not depend on the order of an epoch.
    """

    gives = UnpairedBatch

    def read(self, source: Source) -> tuple[list[Any], RowReport]:
        return records.judged(records.rows_of(source, "pairs"), source, on_bad_row=self.on_bad_row)

    def encode(self, record: records.Judged) -> dict[str, Any] | str:
        (encoded,) = self.chat.answers(record.prompt, [record.response])
        if not any(encoded.mask):
            return "zero supervised tokens"
        fitted = truncate_prompt(encoded.tokens, encoded.mask, self.max_length, self.truncation, self._bos)
        if fitted is None:
            return "over-long"
        return {
            "tokens": fitted[0],
            "mask": fitted[1],
            "desirable": record.desirable,
            "prompt": self.prompt_tokens(record.prompt),
            "text": self.prompt_text(record.prompt),
            "moved": encoded.boundary_moved,
        }

    def _load(self, name: str) -> None:
        super()._load(name)
        for split in SPLITS:
            rows = self.examples.get(split, [])
            if rows and "mismatched" not in rows[0]:
                self.examples[split] = mismatched(rows, self.max_length)

    def collate(self, examples: list[dict[str, Any]]) -> UnpairedBatch:
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


def mismatched(rows: Sequence[dict[str, Any]], max_length: int) -> list[dict[str, Any]]:
    """The rows, each with its prompt and another's response as ``mismatched`` and ``mismatched_mask``.

    The other is the first row after it (around the end where need be) that has another prompt and whose response fits;
    where none fits, the shortest response with another prompt, cut.

    Args:
        rows: token lists, as ``UnpairedDataModule.encode`` makes them.
        max_length: of prompt and response, in tokens.

    Raises:
        UserError: all rows have one prompt.
    """
    starts = [row["mask"].index(True) for row in rows]
    answers = [row["tokens"][start:] for row, start in zip(rows, starts, strict=True)]
    prompts = [row["tokens"][:start] for row, start in zip(rows, starts, strict=True)]
    if all(prompt == prompts[0] for prompt in prompts):
        raise UserError(
            "data: KTO compares each response with one to another prompt, and all rows have the same prompt"
        )
    shortest = sorted(range(len(rows)), key=lambda i: len(answers[i]))
    result = []
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        following = (j % len(rows) for j in range(i + 1, i + len(rows)))
        fits = (j for j in following if prompts[j] != prompt and len(prompt) + len(answers[j]) <= max_length)
        other = next(fits, None)
        if other is None:
            other = next(j for j in shortest if prompts[j] != prompt)
        answer = answers[other][: max(1, max_length - len(prompt))]
        mask = [False] * len(prompt) + [True] * len(answer)
        result.append({**row, "mismatched": prompt + answer, "mismatched_mask": mask})
    return result
