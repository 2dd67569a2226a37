"""The data module of ranked answers: several to one prompt, all of its pairs in one element of a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from rlhf_lit.batches import RankedBatch, Sequences
from rlhf_lit.data import records
from rlhf_lit.data.records import RowReport, Source
from rlhf_lit.data.text_module import Answer, TextDataModule
from rlhf_lit.data.truncation import truncate_group
from rlhf_lit.errors import UserError, say


class RankingDataModule(TextDataModule):
    """Ranked lists of answers, all pairs of which a reward model learns from at once; a pair is a list of two.

    ``batch_size`` counts prompts.

    Args:
        train: training rows; the first argument, as of every data module.
        rows: the other arguments of ``TextDataModule``, by name.
        max_answers: a list of more is a bad row. All answers to a prompt go through the device at once.
    """

    gives = RankedBatch

    def __init__(self, train: Source | None = None, *, max_answers: int = 9, **rows: Any) -> None:
        super().__init__(train, **rows)
        if max_answers < 2:
            raise UserError(f"data.max_answers must be at least 2, not {max_answers}")
        self.max_answers = max_answers

    def read(self, source: Source) -> tuple[list[Any], RowReport]:
        rows = records.rows_of(source, "ranked answers")
        return records.rankings(
            rows, source, on_bad_row=self.on_bad_row, most=self.max_answers, margins=self.reads_margins
        )

    def encode(self, record: records.Ranking) -> dict[str, Any] | str:
        answers = self.chat.answers(record.prompt, record.answers)
        if not all(any(answer.mask) for answer in answers):
            return "zero supervised tokens"
        fitted = truncate_group(answers, self.max_length, self.truncation, self._bos)
        if fitted is None:
            return "over-long"
        ranks: dict[tuple[int, ...], int] = {}
        for answer, rank in zip(fitted, record.ranks, strict=True):
            if ranks.setdefault(tuple(answer.tokens), rank) != rank:
                return "the same answer at two ranks"
        return {
            "answers": [answer.tokens for answer in fitted],
            "masks": [answer.mask for answer in fitted],
            "ranks": list(record.ranks),
            "ratings": list(record.ratings),
            "prompt": self.prompt_tokens(record.prompt),
            "text": self.prompt_text(record.prompt),
            "moved": any(answer.boundary_moved for answer in fitted),
        }

    def collate(self, examples: list[dict[str, Any]]) -> RankedBatch:
        def flat(name: str) -> list[Any]:
            return [value for row in examples for value in row[name]]

        return RankedBatch(
            Sequences.pad(flat("answers"), flat("masks")),
            torch.tensor([len(row["answers"]) for row in examples], dtype=torch.int64),
            torch.tensor(flat("ranks"), dtype=torch.int64),
            torch.tensor(flat("ratings"), dtype=torch.float32),
            self.micro_batch_tokens,
        )

    @property
    def answers_per_row(self) -> int:
        return self.max_answers

    def row_of(self, answers: Sequence[Answer]) -> dict[str, Any]:
        return {
            "answers": [tokens for tokens, _ in answers],
            "masks": [mask for _, mask in answers],
            "ranks": list(range(len(answers))),
            "ratings": [0.0] * len(answers),
        }

    def _tokenised(self, name: str, source: Source) -> list[dict[str, Any]]:
        kept = super()._tokenised(name, source)
        pairs = sum(a < b for row in kept for a in row["ranks"] for b in row["ranks"])
        say(f"{name}: {len(kept)} lists of {sum(len(row['ranks']) for row in kept)} answers, {pairs} ranked pairs")
        return kept
