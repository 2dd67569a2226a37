"""The data module of ranked answers: several to one prompt, all of its pairs in one element of a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from rlhf_lit.batches import RankedBatch, Sequences
from rlhf_lit.data import records
from rlhf_lit.data.chat import Conversation, Encoded, answers_to
from rlhf_lit.data.records import RowReader
from rlhf_lit.data.sources import Source
from rlhf_lit.data.store import ColumnTypes, Rows
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
    wanted = "ranked answers"
    columns: ClassVar[ColumnTypes] = {
        "answers": "token lists",
        "masks": "masks",
        "ranks": "ranks",
        "ratings": "numbers",
        "prompt": "tokens",
        "text": "text",
    }

    def __init__(self, train: Source | list[Source] | None = None, *, max_answers: int = 9, **rows: Any) -> None:
        super().__init__(train, **rows)
        if max_answers < 2:
            raise UserError(f"data.max_answers must be at least 2, not {max_answers}")
        self.max_answers = max_answers

    @property
    def settings(self) -> list[object]:
        return [self.max_answers, self.reads_margins]

    def reader(self, first_rows: Sequence[Any], source: Source) -> RowReader[Any]:
        return records.ranking_reader(first_rows, source, most=self.max_answers, margins=self.reads_margins)

    def conversations(self, record: records.Ranking) -> list[Conversation]:
        return answers_to(record.prompt, record.answers, record.tools)

    def row(self, record: records.Ranking, encoded: Sequence[Encoded]) -> dict[str, Any] | str:
        if not all(any(answer.mask) for answer in encoded):
            return "zero supervised tokens"
        fitted = truncate_group(encoded, self.max_length, self.truncation, self._bos)
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
            "prompt": self.cut_prompt(encoded[0].prompt),
            "text": encoded[0].text,
        }

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> RankedBatch:
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

    def _rows(self, name: str, source: Source) -> Rows:
        kept = super()._rows(name, source)
        ranks = [row["ranks"] for row in kept]
        pairs = sum(a < b for row in ranks for a in row for b in row)
        say(f"{name}: {len(kept)} lists of {sum(map(len, ranks))} answers, {pairs} ranked pairs")
        return kept
