"""The data module of ranked answers: several to one prompt, all of its pairs in one element of a batch."""

from __future__ import annotations

from typing import Any

import torch

from rlhf_lit import playground
from rlhf_lit.batches import RankedBatch, Sequences
from rlhf_lit.data import records
from rlhf_lit.data.chat import Template
from rlhf_lit.data.records import OnBadRow, RowReport, Source
from rlhf_lit.data.text_module import TextDataModule, say
from rlhf_lit.data.truncation import Truncation, truncate_group
from rlhf_lit.errors import UserError


class RankingDataModule(TextDataModule):
    """Ranked lists of answers, all pairs of which a reward model learns from at once; a pair is a list of two.

    ``batch_size`` counts prompts.

    Args:
        train, validation, validation_fraction, test, predict, batch_size: see ``TextDataModule``.
        micro_batch_tokens, max_length, truncation, template, on_bad_row, world, workers, cache: likewise.
        max_answers: a list of more is a bad row. All answers to a prompt go through the device at once.
    """

    gives = RankedBatch

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        validation_fraction: float = 0.0,
        test: Source | None = None,
        predict: Source | None = None,
        batch_size: int = 64,
        micro_batch_tokens: int = 8192,
        max_length: int = 1024,
        truncation: Truncation = "keep_end",
        template: Template = "auto",
        on_bad_row: OnBadRow = "skip",
        world: playground.World = playground.World(),
        workers: int = 1,
        cache: str | None = "~/.cache/rlhf_lit",
        max_answers: int = 9,
    ) -> None:
        super().__init__(
            train,
            validation,
            validation_fraction,
            test,
            predict,
            batch_size,
            micro_batch_tokens,
            max_length,
            truncation,
            template,
            on_bad_row,
            world,
            workers,
            cache,
        )
        if max_answers < 2:
            raise UserError(f"data.max_answers must be at least 2, not {max_answers}")
        self.max_answers = max_answers

    def read(self, source: Source) -> tuple[list[Any], RowReport]:
        if source.path == "playground":
            raise UserError(
                "data: the built-in world's ranked answers are a policy's own samples: make a file with "
                "`python -m rlhf_lit playground --model RUN --ranked true --to FILE` and name it here"
            )
        rows = records.read_rows(source)
        return records.rankings(rows, source, on_bad_row=self.on_bad_row, most=self.max_answers)

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

    def _tokenised(self, name: str, source: Source) -> list[dict[str, Any]]:
        kept = super()._tokenised(name, source)
        pairs = sum(a < b for row in kept for a in row["ranks"] for b in row["ranks"])
        say(f"{name}: {len(kept)} lists of {sum(len(row['ranks']) for row in kept)} answers, {pairs} ranked pairs")
        return kept
