"""The three data modules: files → records → tokens → typed batches.

``batch_size`` belongs to the experiment: what one optimizer step sees, over all ranks. ``micro_batch_tokens`` belongs
to the machine: what goes through the device at once; it changes no result.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_only

from rlhf_lit.batches import ExperienceBatch, PreferenceBatch, PromptBatch, Record, Sequences, SupervisedBatch
from rlhf_lit.data import playground, records
from rlhf_lit.data.batching import BatchLoader, RolloutLoader
from rlhf_lit.data.chat import ChatFormat, Template
from rlhf_lit.data.records import OnBadRow, RowReport, Source
from rlhf_lit.data.truncation import Truncation, truncate_pair, truncate_prompt
from rlhf_lit.errors import UserError

# Part of the tokenisation cache's key: raise it when the same text would give other tokens.
TOKENISATION_VERSION = 1
SHOWN_SAMPLES = 8


class TextDataModule(LightningDataModule):
    """What the three share: reading, validating, tokenising with a cache, splitting, batching.

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
        world: the built-in world, where a path is `playground`.
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
        world: playground.World = playground.World(),
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
        self.validation_fraction = validation_fraction
        self.batch_size = batch_size
        self.micro_batch_tokens = micro_batch_tokens
        self.max_length = max_length
        self.truncation = truncation
        self.template: Template = template
        self.on_bad_row: OnBadRow = on_bad_row
        self.world = world
        self.workers = workers
        self.cache = cache
        self.examples: dict[str, list[Any]] = {}
        self.reports: dict[str, RowReport] = {}
        self._chat: ChatFormat | None = None

    # What a subclass says

    def read(self, source: Source) -> tuple[list[Any], RowReport]:
        """Validated records of a source."""
        raise NotImplementedError

    def encode(self, record: Any) -> dict[str, Any] | str:
        """A record's tokens (plain lists), or in a few words why it has none."""
        raise NotImplementedError

    def collate(self, examples: list[dict[str, Any]]) -> Record:
        """A typed batch."""
        raise NotImplementedError

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
        """Read and tokenise what the stage needs, once."""
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
        encoded = self._encode_all(found, name)
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
        _report(f"{name}: {report.summary()}")
        if moved := sum(bool(row.get("moved")) for row in kept):
            _report(
                f"{name}: in {moved} rows the prompt's own tokens are not a prefix of the row's; the response starts "
                "at the common prefix"
            )
        if not kept:
            raise UserError(f"data.{name}: no usable row is left of {report.summary()}")
        return kept

    def _encode_all(self, found: Sequence[Any], name: str) -> list[dict[str, Any] | str]:
        """Tokens of each record, through `datasets`: in parallel, with progress, found again by content."""
        import datasets

        rows = [json.dumps(_content(record), ensure_ascii=False, default=str) for record in found]
        digest = xxhash.xxh3_128()
        options = [type(self).__name__, self.chat.fingerprint, self.max_length, self.truncation, TOKENISATION_VERSION]
        for piece in (json.dumps(options), *rows):
            digest.update(piece.encode())
        key = digest.hexdigest()
        file = Path(self.cache).expanduser() / f"{key}.arrow" if self.cache else None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            if file.exists():
                return [json.loads(tokens) for tokens in datasets.Dataset.from_file(str(file))["tokens"]]
        progress = datasets.Dataset.from_dict({"index": list(range(len(found)))})
        mapped = progress.map(
            lambda row: {"tokens": json.dumps(self._encoded_or_reason(found[row["index"]]))},
            num_proc=self.workers if self.workers > 1 else None,
            desc=f"Tokenising {name}",
            new_fingerprint=key,
            remove_columns=["index"],
            keep_in_memory=True,
        )
        encoded = mapped["tokens"]
        if file is not None:
            partial = file.with_suffix(f".{torch.randint(2**62, ()).item()}.partial")
            _write_arrow(mapped, partial)
            partial.replace(file)
        return [json.loads(tokens) for tokens in encoded]

    def _encoded_or_reason(self, record: Any) -> dict[str, Any] | str:
        try:
            return self.encode(record)
        except UserError as error:  # a chat template that refuses this conversation
            return str(error)

    # Loaders

    def _loader(self, name: str, shuffle: bool) -> BatchLoader | list[Any]:
        examples = self.examples.get(name)
        if not examples:
            return []
        return BatchLoader(examples, self.batch_size, self.collate, shuffle, *self._rank())

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

    def sample_prompts(self) -> PromptBatch | None:
        """A few held-out prompts (training ones where nothing is held out) to watch the policy by."""
        rows = (self.examples.get("validation") or self.examples.get("train") or [])[:SHOWN_SAMPLES]
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

    def prompt_text(self, messages: Sequence[records.Message]) -> str:
        """The prompt as a reward function and a reader see it: a single turn bare, a dialogue rendered."""
        return messages[0].content if len(messages) == 1 else self.chat.render_prompt(messages)

    def prompt_loader(self, name: str) -> BatchLoader | list[Any]:
        """Prompts of a split, to be answered."""
        rows = self.examples.get(name)
        if not rows:
            return []
        items = [(row, i, 0) for i, row in enumerate(rows)]
        return BatchLoader(items, self.batch_size, self.prompt_batch, False, *self._rank())


class SFTDataModule(TextDataModule):
    """Demonstrations, in any of the supervised shapes. Arguments: see ``TextDataModule``."""

    def read(self, source: Source) -> tuple[list[Any], RowReport]:
        rows = playground_rows(source, self.world, playground.demonstrations)
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
            "prompt": self.chat.prompt(prompt),
            "text": self.prompt_text(prompt),
            "moved": encoded.boundary_moved,
        }

    def collate(self, examples: list[dict[str, Any]]) -> SupervisedBatch:
        sequences = Sequences.pad([row["tokens"] for row in examples], [row["mask"] for row in examples])
        return SupervisedBatch(sequences, self.micro_batch_tokens)

    def predict_dataloader(self) -> Any:
        return self.prompt_loader("predict")


class PreferenceDataModule(TextDataModule):
    """Preference pairs, in any of the paired shapes. Arguments: see ``TextDataModule``."""

    def read(self, source: Source) -> tuple[list[Any], RowReport]:
        if source.path == "playground":
            raise UserError(
                "data: the built-in world's pairs are drawn from a policy's own samples: "
                "make a file with `python -m rlhf_lit playground --model RUN --to FILE` and name it here"
            )
        return records.preferences(records.read_rows(source), source, on_bad_row=self.on_bad_row)

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
            "prompt": self.chat.prompt(record.prompt),
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

    def predict_dataloader(self) -> Any:
        """Pairs for a reward model to score, prompts for a policy to answer."""
        assert self.trainer is not None
        writes = hasattr(self.trainer.lightning_module, "respond")
        return self.prompt_loader("predict") if writes else self._loader("predict", shuffle=False)


class RolloutDataModule(TextDataModule):
    """Prompts, answered by the running policy: PPO's data.

    An epoch is one pass over the prompts. The length of a run is set by ``episodes`` (then leave `trainer.max_epochs`
    at -1) or by the trainer's own limits, in optimizer steps or passes.

    Args:
        train, validation, validation_fraction, test, predict, micro_batch_tokens, max_length, truncation, template,
            on_bad_row, world, workers, cache: see ``TextDataModule``; `max_length` limits the prompt alone.
        rollout_size: prompts answered per rollout, over all ranks.
        samples_per_prompt: responses to each prompt of a rollout.
        batch_size: responses per optimizer step, over all ranks.
        ppo_epochs: passes over each rollout.
        episodes: responses sampled over the whole run, rounded up to whole rollouts; null leaves the length to the
            trainer.
    """

    def __init__(
        self,
        train: Source | None = None,
        validation: Source | None = None,
        validation_fraction: float = 0.0,
        test: Source | None = None,
        predict: Source | None = None,
        rollout_size: int = 128,
        samples_per_prompt: int = 1,
        batch_size: int = 64,
        ppo_epochs: int = 4,
        episodes: int | None = None,
        micro_batch_tokens: int = 8192,
        max_length: int = 512,
        truncation: Truncation = "keep_end",
        template: Template = "auto",
        on_bad_row: OnBadRow = "skip",
        world: playground.World = playground.World(),
        workers: int = 1,
        cache: str | None = "~/.cache/rlhf_lit",
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
        if rollout_size < 1 or samples_per_prompt < 1 or ppo_epochs < 1:
            raise UserError("data.rollout_size, data.samples_per_prompt and data.ppo_epochs must be at least 1")
        if rollout_size * samples_per_prompt % batch_size:
            raise UserError(
                f"data.batch_size: {batch_size} does not divide the {rollout_size * samples_per_prompt} episodes of a "
                "rollout (rollout_size × samples_per_prompt)"
            )
        self.rollout_size = rollout_size
        self.samples_per_prompt = samples_per_prompt
        self.ppo_epochs = ppo_epochs
        self.episodes = episodes

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.episodes is not None:
            self._limit_steps(self.episodes)

    def _limit_steps(self, episodes: int) -> None:
        assert self.trainer is not None
        if self.trainer.max_steps not in (-1, self._steps_for(episodes)) or (self.trainer.max_epochs or -1) != -1:
            raise UserError(
                "data.episodes sets the length of the run: leave trainer.max_epochs and trainer.max_steps at -1"
            )
        self.trainer.fit_loop.epoch_loop.max_steps = self._steps_for(episodes)

    def _steps_for(self, episodes: int) -> int:
        per_rollout = self.rollout_size * self.samples_per_prompt
        return math.ceil(episodes / per_rollout) * self.ppo_epochs * (per_rollout // self.batch_size)

    def read(self, source: Source) -> tuple[list[Any], RowReport]:
        rows = playground_rows(source, self.world, lambda world: playground.prompts(world, _split(source)))
        return records.prompts(rows, source, on_bad_row=self.on_bad_row)

    def encode(self, record: records.Prompt) -> dict[str, Any] | str:
        tokens = self.chat.prompt(record.prompt)
        if not tokens:
            return "empty prompt"
        fitted = truncate_prompt(tokens, [False] * len(tokens), self.max_length, self.truncation, self._bos)
        if fitted is None:
            return "over-long"
        return {"prompt": fitted[0], "text": self.prompt_text(record.prompt)}

    def train_dataloader(self) -> RolloutLoader:
        return RolloutLoader(
            self.examples["train"],
            self.prompt_batch,
            self._collect,
            self.rollout_size,
            self.samples_per_prompt,
            self.batch_size,
            self.ppo_epochs,
            *self._rank(),
        )

    def _collect(self, prompts: PromptBatch, rollout: int) -> ExperienceBatch:
        assert self.trainer is not None
        module: Any = self.trainer.lightning_module
        with self.trainer.precision_plugin.forward_context():
            return module.rollout(prompts.to(module.device), rollout)

    def val_dataloader(self) -> Any:
        return self.prompt_loader("validation")

    def test_dataloader(self) -> Any:
        return self.prompt_loader("test")

    def predict_dataloader(self) -> Any:
        return self.prompt_loader("predict")


def playground_rows(
    source: Source, world: playground.World, generate: Callable[[playground.World], list[dict[str, Any]]]
) -> list[Any]:
    """The built-in world's rows where the path is `playground`, else the file's."""
    return generate(world) if source.path == "playground" else list(records.read_rows(source))


def _split(source: Source) -> Any:
    if source.split not in ("train", "held_out"):
        raise UserError(f"data: the built-in world has the splits train and held_out, not {source.split!r}")
    return source.split


@rank_zero_only
def _report(line: str) -> None:
    print(line, file=sys.stderr)


def _content(record: Any) -> Any:
    """What a record's tokens depend on: everything but the row it came from."""
    return {k: v for k, v in vars(record).items() if k not in ("source", "row")}


def _write_arrow(dataset: Any, file: Path) -> None:
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=str(file), features=dataset.features) as writer:
        writer.write_table(dataset.data.table)
        writer.finalize()
