"""The three data modules, one for each kind of batch: demonstrations, preference pairs, and rollouts of prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from rlhf_lit import playground
from rlhf_lit.batches import ExperienceBatch, PreferenceBatch, PromptBatch, Sequences, SupervisedBatch, UnpairedBatch
from rlhf_lit.data import records
from rlhf_lit.data.chat import Template
from rlhf_lit.data.ranking_module import RankingDataModule
from rlhf_lit.data.records import OnBadRow, RowReport, Source
from rlhf_lit.data.text_module import TextDataModule
from rlhf_lit.data.truncation import Truncation, truncate_pair, truncate_prompt
from rlhf_lit.errors import UserError
from rlhf_lit.rollout.loop import RolloutLoader

SPLITS = ("train", "validation", "test")
# What Lightning makes of a max_epochs that nobody set.
UNSET_EPOCHS = 1000

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
        if source.path == "playground" and source.split != "train":
            raise UserError(
                f"data: the built-in world has demonstrations in the split train alone, not {source.split!r}: "
                "hold some of them out with data.validation_fraction"
            )
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
            "prompt": self.prompt_tokens(prompt),
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

    gives = PreferenceBatch

    def read(self, source: Source) -> tuple[list[Any], RowReport]:
        _require_file(source)
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

    def responses(self) -> Iterator[tuple[list[int], list[bool]]]:
        """Tokens and masks of both sides of every pair that the run at hand compares."""
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
        _require_file(source)
        return records.judged(records.read_rows(source), source, on_bad_row=self.on_bad_row)

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

    def responses(self) -> Iterator[tuple[list[int], list[bool]]]:
        """Tokens and masks of every response, and of every mismatched one, that the run at hand compares."""
        for row in (row for name in SPLITS for row in self.rows_seen(name)):
            yield row["tokens"], row["mask"]
            yield row["mismatched"], row["mismatched_mask"]

    def predict_dataloader(self) -> Any:
        return self.prompt_loader("predict")


class RolloutDataModule(TextDataModule):
    """Prompts, answered by the running policy: PPO's data.

    An epoch is one pass over the prompts. The length of a run is set by ``episodes`` (then leave `trainer.max_epochs`
    alone) or by the trainer's own limits, in optimizer steps or passes.

    Args:
        train, validation, validation_fraction, test, predict, micro_batch_tokens: see ``TextDataModule``.
        max_length, truncation, template, on_bad_row, world, workers, cache: likewise; `max_length` limits the prompt
            alone.
        rollout_size: prompts answered per rollout, over all ranks.
        samples_per_prompt: responses to each prompt of a rollout.
        batch_size: responses per optimizer step, over all ranks.
        ppo_epochs: passes over each rollout.
        episodes: responses sampled over the whole run, rounded up to whole rollouts; null leaves the length to the
            trainer.
    """

    gives = ExperienceBatch

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
        steps = self._steps_for(episodes)
        if self.trainer.max_steps > steps or self.trainer.max_epochs not in (None, -1, UNSET_EPOCHS):
            raise UserError(
                "data.episodes sets the length of the run: leave trainer.max_epochs at -1, and trainer.max_steps too "
                f"(or below the {steps} steps of these episodes, for a trial)"
            )
        if self.trainer.max_steps == -1:
            self.trainer.fit_loop.epoch_loop.max_steps = steps
        self.trainer.fit_loop.max_epochs = -1  # unset is a thousand, which may be fewer

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
            lambda: self._module().rollout_spent,
            self.rollout_size,
            self.samples_per_prompt,
            self.batch_size,
            self.ppo_epochs,
            *self._rank(),
        )

    def _collect(self, prompts: PromptBatch, rollout: int) -> ExperienceBatch:
        assert self.trainer is not None
        module = self._module()
        with self.trainer.precision_plugin.forward_context():
            return module.rollout(prompts.to(module.device), rollout)

    def _module(self) -> Any:
        """The running algorithm: `data` knows none by name."""
        assert self.trainer is not None
        return self.trainer.lightning_module

    def val_dataloader(self) -> Any:
        return self.prompt_loader("validation")

    def test_dataloader(self) -> Any:
        return self.prompt_loader("test")

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


def _require_file(source: Source) -> None:
    """The built-in world has no pairs before there is a policy. Raises UserError."""
    if source.path == "playground":
        raise UserError(
            "data: the built-in world's pairs are drawn from a policy's own samples: "
            "make a file with `python -m rlhf_lit playground --model RUN --to FILE` and name it here"
        )


def playground_rows(
    source: Source, world: playground.World, generate: Callable[[playground.World], list[dict[str, Any]]]
) -> list[Any]:
    """The built-in world's rows where the path is `playground`, else the file's."""
    return generate(world) if source.path == "playground" else list(records.read_rows(source))


def _split(source: Source) -> Any:
    if source.split not in ("train", "held_out"):
        raise UserError(f"data: the built-in world has the splits train and held_out, not {source.split!r}")
    return source.split
