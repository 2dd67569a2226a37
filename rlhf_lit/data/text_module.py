"""What the data modules share: files → records → tokens, with a cache, and batches.

``batch_size`` belongs to the experiment: what one optimizer step sees, over all ranks. ``micro_batch_tokens`` belongs
to the machine: what goes through the device at once; it changes no result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule

from rlhf_lit.batches import Batch, PromptBatch, Record, Sequences
from rlhf_lit.data import records
from rlhf_lit.data.chat import ChatFormat, Template
from rlhf_lit.data.loader import BatchLoader
from rlhf_lit.data.records import OnBadRow, RowReport, Source
from rlhf_lit.data.sources import require_one_world
from rlhf_lit.data.tokens import tokenise
from rlhf_lit.data.truncation import Truncation, truncate_prompt
from rlhf_lit.errors import UserError, say
from rlhf_lit.randomness import permutation

SHOWN_SAMPLES = 8

Answer = tuple[list[int], list[bool]]
"""Tokens of prompt and answer, and the mask on the answer."""


class TextDataModule(LightningDataModule):
    """What the data modules share: reading, validating, tokenising with a cache, splitting, batching.

    Args:
        train: training rows.
        validation: held-out rows, from a file or split of their own.
        validation_fraction: instead of `validation`, this fraction of the training rows, always the same ones.
        test: rows for `test`.
        predict: rows for `predict`; the test rows, else the validation rows, where it is left out.
        batch_size: rows per optimizer step, over all ranks.
        micro_batch_tokens: padded tokens that go through the device at once. Changes no result.
        max_length: longest prompt + response in tokens.
        truncation: what to do with a row that is longer: keep the start or the end of its prompt, or drop it. A
            response is never cut.
        template: how conversations become text: the tokenizer's own chat template where it has one (`auto`), that
            or none (`tokenizer`), the built-in `User: … Assistant: …` (`plain`), or the bare text (`none`).
        on_bad_row: `skip` counts and reports bad rows, `error` stops at the first.
        workers: processes that tokenise.
        cache: folder of tokenised files, found again by content; null keeps nothing.
    """

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
        workers: int = 1,
        cache: str | None = "~/.cache/rlhf_lit",
    ) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("micro_batch_tokens", micro_batch_tokens)):
            if value < 1:
                raise UserError(f"data.{name} must be at least 1, not {value}")
        if not 0 <= validation_fraction < 1:
            raise UserError(f"data.validation_fraction must lie in [0, 1), not {validation_fraction}")
        if validation is not None and validation_fraction:
            raise UserError("data.validation_fraction: leave it out where data.validation names rows of its own")
        self.sources = {"train": train, "validation": validation, "test": test, "predict": predict}
        require_one_world(self.sources)
        self.validation_fraction = validation_fraction
        self.batch_size = batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.max_length = max_length
        self.truncation = truncation
        self.template: Template = template
        self.on_bad_row: OnBadRow = on_bad_row
        self.workers = workers
        self.cache = cache
        self.examples: dict[str, list[Any]] = {}
        self.reports: dict[str, RowReport] = {}
        self.identities: dict[str, str] = {}  # of the rows that were read for a split: how many, and a digest
        self._chat: ChatFormat | None = None

    # What a subclass says

    gives: type[Batch] | None = None  # the kind of batch that its rows make, where it says so

    def read(self, source: Source) -> tuple[list[Any], RowReport]:
        """Validated records of a source."""
        raise NotImplementedError

    def encode(self, record: Any) -> dict[str, Any] | str:
        """A record's tokens (plain lists), or in a few words why it has none."""
        raise NotImplementedError

    def collate(self, examples: list[dict[str, Any]]) -> Batch:
        """A typed batch of what ``encode`` made."""
        raise NotImplementedError

    @property
    def answers_per_row(self) -> int:
        """The most sequences that a row may have; ``memory`` asks."""
        return 1

    def row_of(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """A row for ``collate`` that holds the given answers (tokens and mask); ``memory`` measures with such rows.

        Raises:
            UserError: the data module does not say.
        """
        name = type(self).__name__
        raise UserError(f"data: memory does not know what a row of {name} is made of; write {name}.row_of(answers)")

    def first_seen(self, rows: Sequence[dict[str, Any]], places: Sequence[int]) -> Batch | PromptBatch:
        """What training makes of rows first: a batch to learn from, or prompts to be answered.

        Args:
            rows: training rows, as ``encode`` made them.
            places: their numbers among the training rows.
        """
        return self.collate(list(rows))

    # Setup

    @property
    def chat(self) -> ChatFormat:
        """How text becomes tokens, with the running module's tokenizer."""
        if self._chat is None:
            assert self.trainer is not None
            module: Any = self.trainer.lightning_module
            self._chat = ChatFormat(module.tokenizer, self.template)
        return self._chat

    @property
    def _bos(self) -> int | None:
        return self.chat.tokenizer.bos_token_id

    def setup(self, stage: str) -> None:
        """Read and tokenise what the stage needs, once.

        Raises:
            UserError: the running algorithm learns from other batches, or the stage has no rows.
        """
        self._require_a_learner(stage)
        needed = {
            "fit": ("train", "validation"),
            "validate": ("validation",),
            "test": ("test",),
            "predict": ("predict",),
        }[stage]
        for name in needed:
            if name not in self.examples:
                self._load(name)
        if stage == "fit" and not self.examples.get("train"):
            raise UserError("data.train: name the training rows, e.g. data.train.path=FILE")
        if stage != "fit" and not self.examples.get(needed[0]):
            raise UserError(f"data.{needed[0]}: name the rows to {stage}, e.g. data.{needed[0]}.path=FILE")

    def _require_a_learner(self, stage: str) -> None:
        """The algorithm must know the batches. A policy answers the prompts of any rows; a user's own algorithm or data
        module need not say what it is made for."""
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        known: tuple[type[Batch], ...] = getattr(module, "learns_from", ())
        if not known or self.gives is None or issubclass(self.gives, known):
            return
        if stage == "predict" and hasattr(module, "respond"):
            return
        words = " or ".join(f"{kind.kind} ({kind.data_module or kind.__name__})" for kind in known)
        name = type(module).__name__
        raise UserError(f"data: {type(self).__name__} gives {self.gives.kind}, and {name} learns from {words}")

    @property
    def reads_margins(self) -> bool:
        """Whether the running algorithm's loss reads margins, so that a row without one is bad."""
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        return bool(getattr(module, "reads_margins", False))

    def _load(self, name: str) -> None:
        source = self.sources[name]
        if name == "predict" and source is None:
            source = self.sources["test"] or self.sources["validation"]
        if source is not None:
            self.examples[name] = self._tokenised(name, source)
        if name == "validation" and self.validation_fraction and "train" not in self.examples:
            self._load("train")
        if name == "train" and self.validation_fraction and source is not None:
            rows = self.examples["train"]
            # The same rows whatever the run's seed, so that arms of a sweep are compared on the same ones.
            order = np.random.default_rng(0).permutation(len(rows))
            held_out = max(1, round(self.validation_fraction * len(rows)))
            self.examples["validation"] = [rows[i] for i in sorted(order[:held_out])]
            self.examples["train"] = [rows[i] for i in sorted(order[held_out:])]

    def _tokenised(self, name: str, source: Source) -> list[dict[str, Any]]:
        """Rows of a source as token lists; bad ones counted and reported."""
        found, report = self.read(source)
        settings = (type(self).__name__, self.chat.fingerprint, self.max_length, self.truncation)
        encoded, key = tokenise(found, self.encode, settings, name, self.cache, self.workers)
        self.identities[name] = f"{len(found)} rows with the digest {key[:12]}"
        kept = []
        for record, tokens in zip(found, encoded, strict=True):
            if isinstance(tokens, str):
                if self.on_bad_row == "error":
                    raise UserError(
                        f"data.{name}: {report.file} row {record.row}: {tokens}; mend it or set on_bad_row: skip"
                    )
                report.drop(tokens, record.row)
            else:
                kept.append({**tokens, "source": record.source, "row": record.row})
        self.reports[name] = report
        for line in (report.summary(), *report.remarks()):
            say(f"{name}: {line}")
        if moved := sum(bool(row.get("moved")) for row in kept):
            say(
                f"{name}: in {moved} rows the prompt's own tokens are not a prefix of the row's; the response starts "
                "at the common prefix"
            )
        if not kept:
            raise UserError(f"data.{name}: no usable row is left of {report.summary()}")
        return kept

    # Loaders

    def _loader(self, name: str, shuffle: bool) -> BatchLoader | list[Any]:
        return self._batches(name, self.examples.get(name) or [], self.collate, shuffle)

    def _batches(
        self, name: str, examples: Sequence[Any], collate: Callable[[list[Any]], Record], shuffle: bool
    ) -> BatchLoader | list[Any]:
        """This rank's share of a split's batches; none where there is nothing.

        Raises:
            UserError: fewer rows to evaluate on than ranks.
        """
        if not examples:
            return []
        rank, world = self._rank()
        if name in ("validation", "test") and len(examples) < world:
            raise UserError(f"data.{name}: {len(examples)} rows are too few for {world} ranks, which need one each")
        return BatchLoader(examples, self._batch_size(name), collate, shuffle, rank, world)

    def _batch_size(self, name: str) -> int:
        """Rows of a split's batch. In an evaluation ranks add their numbers up together, so that each must have some: a
        row of the first batch at least."""
        return max(self.batch_size, self._rank()[1]) if name in ("validation", "test") else self.batch_size

    def _rank(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size

    def train_dataloader(self) -> Any:
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> Any:
        return self._loader("validation", shuffle=False)

    def test_dataloader(self) -> Any:
        return self._loader("test", shuffle=False)

    def predict_dataloader(self) -> Any:
        return self._loader("predict", shuffle=False)

    def batches_in_order(self, limit: int) -> Iterator[Record]:
        """The first ``limit`` training rows in the file's order."""
        rows = self.examples["train"][:limit]
        for start in range(0, len(rows), self.batch_size):
            yield self.collate(rows[start : start + self.batch_size])

    def rows_seen(self, name: str) -> list[dict[str, Any]]:
        """The rows of a split that the trainer's limits leave to the present run, however far it has come."""
        assert self.trainer is not None
        trainer, rows = self.trainer, self.examples.get(name) or []
        size = self._batch_size(name)
        batches = math.ceil(len(rows) / size)
        limit = {
            "train": trainer.limit_train_batches,
            "validation": trainer.limit_val_batches,
            "test": trainer.limit_test_batches,
        }[name]
        seen = int(limit * batches) if isinstance(limit, float) else min(limit, batches)
        order = torch.arange(len(rows))
        if name == "train":
            order = permutation(len(rows), "shuffle", 0)
            seen *= trainer.max_epochs if trainer.max_epochs not in (None, -1) else batches
            seen = seen if trainer.max_steps < 0 else min(seen, trainer.max_steps)
        return rows if seen >= batches else [rows[i] for i in order[: seen * size].tolist()]

    def sample_prompts(self) -> PromptBatch | None:
        """A few held-out prompts (training ones where nothing is held out) to watch the policy by."""
        found = self.examples.get("validation") or self.examples.get("train") or []
        rows = [row for row in found[:SHOWN_SAMPLES] if row["prompt"]]
        return self.prompt_batch([(row, i, 0) for i, row in enumerate(rows)]) if rows else None

    def prompt_batch(self, items: Sequence[tuple[dict[str, Any], int, int]]) -> PromptBatch:
        """A prompt batch of [(example, stream index, sample number)]."""
        prompts = [row["prompt"] for row, _, _ in items]
        return PromptBatch(
            Sequences.pad(prompts, [[False] * len(p) for p in prompts]),
            torch.tensor([index for _, index, _ in items], dtype=torch.int64),
            torch.tensor([sample for _, _, sample in items], dtype=torch.int64),
            tuple(row["text"] for row, _, _ in items),
            tuple(row["source"] for row, _, _ in items),
            self.micro_batch_tokens,
        )

    def prompt_tokens(self, messages: Sequence[records.Message]) -> list[int]:
        """The prompt to be answered, cut like a row's; empty where a row has none (plain text without a template)."""
        tokens = self.chat.prompt(messages)
        fitted = truncate_prompt(tokens, [False] * len(tokens), self.max_length, self.truncation, self._bos)
        return fitted[0] if fitted else tokens

    def prompt_text(self, messages: Sequence[records.Message]) -> str:
        """The prompt as a reward function and a reader see it: a single turn bare, a dialogue rendered."""
        return messages[0].content if len(messages) == 1 else self.chat.render_prompt(messages)

    def prompt_loader(self, name: str) -> BatchLoader | list[Any]:
        """Prompts of a split, to be answered."""
        items = [(row, i, 0) for i, row in enumerate(self.examples.get(name) or []) if row["prompt"]]
        return self._batches(name, items, self.prompt_batch, shuffle=False)
