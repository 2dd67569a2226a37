"""What the data modules share: files → records → tokens, with a cache, and batches.

``batch_size`` belongs to the experiment: what one optimizer step sees, over all ranks. ``micro_batch_tokens`` belongs
to the machine: what goes through the device at once; it changes no result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from lightning import LightningDataModule

from rlhf_lit.batches import Batch, PromptBatch, Record, Sequences
from rlhf_lit.data.chat import ChatFormat, Conversation, Encoded, Template
from rlhf_lit.data.loader import BatchLoader
from rlhf_lit.data.mixture import Order, in_shares, mixed_order, shuffled
from rlhf_lit.data.records import OnBadRow, RowReader, RowReport, stopped
from rlhf_lit.data.sources import Source, check_sources, open_rows, place_of
from rlhf_lit.data.store import ColumnTypes, Rows, held_out, joined, schema_of
from rlhf_lit.data.stream import Stream, StreamLoader
from rlhf_lit.data.tokens import Loading, Work, code_of, key_of, tokenised
from rlhf_lit.data.truncation import Truncation, truncate_prompt
from rlhf_lit.errors import UserError, say
from rlhf_lit.playground import Wanted

SHOWN_SAMPLES = 8

Answer = tuple[list[int], list[bool]]
"""Tokens of prompt and answer, and the mask on the answer."""


class TextDataModule(LightningDataModule):
    """What the data modules share: reading, validating, tokenising with a cache, splitting, batching.

    Args:
        train: training rows; of a list of sources, a mixture in the ratio of their weights.
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
        workers: processes that read and tokenise a file of 10 000 rows or more; null is one for each core.
        cache: folder of tokenised files, found again by content; null keeps nothing.
        stream_buffer: rows of a streamed source that are shuffled together.
    """

    def __init__(
        self,
        train: Source | list[Source] | None = None,
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
        workers: int | None = None,
        cache: str | None = "~/.cache/rlhf_lit",
        stream_buffer: int = 10_000,
    ) -> None:
        super().__init__()
        for name, value in (
            ("batch_size", batch_size),
            ("micro_batch_tokens", micro_batch_tokens),
            ("stream_buffer", stream_buffer),
            ("workers", 1 if workers is None else workers),
        ):
            if value < 1:
                raise UserError(f"data.{name} must be at least 1, not {value}")
        if not 0 <= validation_fraction < 1:
            raise UserError(f"data.validation_fraction must lie in [0, 1), not {validation_fraction}")
        if validation is not None and validation_fraction:
            raise UserError("data.validation_fraction: leave it out where data.validation names rows of its own")
        self.sources = {
            name: some if isinstance(some, list) else [] if some is None else [some]
            for name, some in (("train", train), ("validation", validation), ("test", test), ("predict", predict))
        }
        check_sources(self.sources, validation_fraction)
        self.validation_fraction = validation_fraction
        self.batch_size = batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.max_length = max_length
        self.truncation = truncation
        self.template: Template = template
        self.on_bad_row: OnBadRow = on_bad_row
        self.workers = workers
        self.cache = cache
        self.stream_buffer = stream_buffer
        self.examples: dict[str, Rows] = {}
        self.reports: dict[str, RowReport] = {}
        self.identities: dict[str, str] = {}  # of the rows that were read for a split: how many, and a digest
        self.stream: Stream | None = None  # of the training rows, where they are streamed
        self._order: Order | None = None  # of a mixture
        self._chat: ChatFormat | None = None

    # What a subclass says

    gives: type[Batch] | None = None  # the kind of batch that its rows make, where it says so
    wanted: Wanted  # what the built-in world makes up for it
    columns: ClassVar[ColumnTypes]  # of its rows

    def reader(self, first_rows: Sequence[Any], source: Source) -> RowReader[Any]:
        """What makes records of a source's rows, whose first ones are given.

        Raises:
            UserError: they have no known shape.
        """
        raise NotImplementedError

    def conversations(self, record: Any) -> list[Conversation]:
        """What is tokenised of a record."""
        raise NotImplementedError

    def row(self, record: Any, encoded: Sequence[Encoded]) -> dict[str, Any] | str:
        """The row that a record makes, with the tokens of its conversations, or in a few words why it makes none."""
        raise NotImplementedError

    def collate(self, examples: Sequence[Mapping[str, Any]]) -> Batch:
        """A typed batch of what ``row`` made."""
        raise NotImplementedError

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | str]:
        """Their tokens, or why the chat template refuses one."""
        return self.chat.encode(conversations)

    def completed(self, rows: Rows) -> Rows:
        """The rows of a split with what depends on the others among them."""
        return rows

    @property
    def settings(self) -> list[object]:
        """What else rows of a subclass depend on, its own fields for one; stores are found by it."""
        return []

    @property
    def reads_margins(self) -> bool:
        """Whether the running loss does, so that a row without one is a bad row."""
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        return bool(getattr(getattr(module, "loss", None), "use_margin", False))

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

    def first_seen(self, rows: Sequence[Mapping[str, Any]], places: Sequence[int]) -> Batch | PromptBatch:
        """What training makes of rows first: a batch to learn from, or prompts to be answered.

        Args:
            rows: training rows, as ``row`` made them.
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

    def _load(self, name: str) -> None:
        sources = self.sources[name]
        if name == "predict" and not sources:
            sources = self.sources["test"] or self.sources["validation"]
        parts, labels = [self._rows(name, source) for source in sources], [source.label for source in sources]
        if name == "validation" and self.validation_fraction and "train" not in self.examples:
            self._load("train")
        if name == "train" and self.validation_fraction and parts:
            fraction = self.validation_fraction
            split = [held_out(part, fraction, label) for part, label in zip(parts, labels, strict=True)]
            parts = [kept for kept, _ in split]
            self.examples["validation"] = self.completed(joined([held for _, held in split]))
        if name == "train" and len(parts) > 1:
            sizes, weights = [len(part) for part in parts], [source.weight for source in sources]
            self._order = mixed_order(sizes, weights)
            say(f"train: {in_shares(labels, sizes, weights)}")
        if parts:
            self.examples[name] = self.completed(joined(parts))

    def _rows(self, name: str, source: Source) -> Rows:
        """Rows of a source, tokenised; bad ones counted and reported."""
        file = open_rows(source, self.wanted)
        load = Loading(name, source, file, partial(self._work, source), self.on_bad_row, self.workers)
        if source.is_stream:
            # A block is a whole number of batches.
            buffer = max(1, self.stream_buffer // self.batch_size) * self.batch_size
            self.stream = Stream(load, buffer, self.completed)
            rows = self.stream.first()
            say(
                f"train: {source.label} is streamed: it has no length, its rows are shuffled among {buffer} at a time, "
                "and the bad ones are counted in the first of these alone"
            )
            self._say(name, load.report)
            return rows
        settings = (*code_of(type(self)), self.chat.fingerprint, self.max_length, self.truncation, *self.settings)
        key = key_of(file, source, settings)
        stored = tokenised(load, key, self.cache)
        report = RowReport.from_json(stored.summary, source.label)
        if self.on_bad_row == "error" and report.first_bad is not None:
            raise UserError(stopped(source, *report.first_bad))
        place = place_of(name, source, self.sources[name])
        self.identities[place] = f"{len(stored)} rows with the digest {key[:12]}"
        self.reports[place] = report
        self._say(place, report)
        return stored

    def _work(self, source: Source, first_rows: list[Any]) -> Work:
        reader = self.reader(first_rows, source)
        return Work(reader, self.encode, self.conversations, self.row, schema_of(self.columns))

    def _say(self, name: str, report: RowReport) -> None:
        for line in (report.summary(), *report.remarks()):
            say(f"{name}: {line}")

    # Loaders

    def _loader(self, name: str) -> BatchLoader | list[Any]:
        return self._batches(name, self.examples.get(name) or [], self.collate)

    def order(self) -> Order:
        """Of the training rows in each epoch."""
        return self._order or shuffled(len(self.examples["train"]))

    def _batches(
        self, name: str, examples: Sequence[Any], collate: Callable[[list[Any]], Record], order: Order | None = None
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
        return BatchLoader(examples, self._batch_size(name), collate, order, rank, world)

    def _batch_size(self, name: str) -> int:
        """Rows of a split's batch. In an evaluation ranks add their numbers up together, so that each must have some: a
        row of the first batch at least."""
        return max(self.batch_size, self._rank()[1]) if name in ("validation", "test") else self.batch_size

    def _rank(self) -> tuple[int, int]:
        assert self.trainer is not None
        return self.trainer.global_rank, self.trainer.world_size

    def train_dataloader(self) -> Any:
        if self.stream is not None:
            return StreamLoader(self.stream, self.batch_size, self.collate, self._steps(), *self._rank())
        return self._batches("train", self.examples.get("train") or [], self.collate, self.order())

    def _steps(self) -> int:
        """Of the run, as far as a stream must know."""
        assert self.trainer is not None
        if self.trainer.max_steps < 0:
            raise UserError("data.train.streaming: a stream has no length; set trainer.max_steps")
        return self.trainer.max_steps

    def val_dataloader(self) -> Any:
        return self._loader("validation")

    def test_dataloader(self) -> Any:
        return self._loader("test")

    def predict_dataloader(self) -> Any:
        return self._loader("predict")

    def batches_in_order(self, limit: int) -> Iterator[Record]:
        """The first ``limit`` training rows in the file's order."""
        rows = self.examples["train"][:limit]
        for start in range(0, len(rows), self.batch_size):
            yield self.collate(rows[start : start + self.batch_size])

    def rows_seen(self, name: str) -> Sequence[Mapping[str, Any]]:
        """The rows of a split that the trainer's limits leave to the present run, however far it has come.

        Raises:
            UserError: the rows are streamed.
        """
        if name == "train" and self.stream is not None:
            raise UserError(
                "reference.precompute: rows that are streamed are not known beforehand; set it to false, or leave "
                "data.train.streaming out"
            )
        assert self.trainer is not None
        trainer = self.trainer
        rows: Sequence[Any] = self.examples.get(name) or []
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
            order = self.order()(0)
            seen *= trainer.max_epochs if trainer.max_epochs not in (None, -1) else batches
            seen = seen if trainer.max_steps < 0 else min(seen, trainer.max_steps)
        return rows if seen >= batches else [rows[i] for i in order[: seen * size].tolist()]

    def sample_prompts(self) -> PromptBatch | None:
        """A few held-out prompts (training ones where nothing is held out) to watch the policy by."""
        found: Sequence[Any] = self.examples.get("validation") or self.examples.get("train") or []
        rows = [row for row in found[:SHOWN_SAMPLES] if row["prompt"]]
        return self.prompt_batch([(row, i, 0) for i, row in enumerate(rows)]) if rows else None

    def prompt_batch(self, items: Sequence[tuple[Mapping[str, Any], int, int]]) -> PromptBatch:
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

    def cut_prompt(self, tokens: list[int]) -> list[int]:
        """The prompt to be answered, cut like a row's; empty where a row has none (plain text)."""
        fitted = truncate_prompt(tokens, [False] * len(tokens), self.max_length, self.truncation, self._bos)
        return fitted[0] if fitted else tokens

    def prompt_loader(self, name: str) -> BatchLoader | list[Any]:
        """Prompts of a split, to be answered."""
        rows: Sequence[Any] = self.examples.get(name) or []
        items = [(row, i, 0) for i, row in enumerate(rows) if row["prompt"]]
        return self._batches(name, items, self.prompt_batch)
