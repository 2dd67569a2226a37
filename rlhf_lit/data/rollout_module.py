"""The data module of on-policy training: prompts, answered by the running policy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from rlhf_lit.batches import ExperienceBatch, PromptBatch
from rlhf_lit.data import records
from rlhf_lit.data.chat import Conversation, Encoded
from rlhf_lit.data.records import RowReader, RowReport, stopped
from rlhf_lit.data.sources import Source, place_of
from rlhf_lit.data.store import ColumnTypes, Rows
from rlhf_lit.data.text_module import TextDataModule
from rlhf_lit.data.truncation import truncate_prompt
from rlhf_lit.errors import UserError, say
from rlhf_lit.rollout.loop import RolloutLoader

# What Lightning makes of a max_epochs that nobody set.
UNSET_EPOCHS = 1000
# Rows whose gold answers the reward is asked about together.
GOLDS_AT_ONCE = 10_000


class RolloutDataModule(TextDataModule):
    """Prompts, answered by the running policy: PPO's data.

    An epoch is one pass over the prompts. The length of a run is set by ``episodes`` (then leave `trainer.max_epochs`
    alone) or by the trainer's own limits, in optimizer steps or passes.

    Args:
        train: training rows; the first argument, as of every data module.
        rows: the other arguments of ``TextDataModule``, by name.
        rollout_size: prompts answered per rollout, over all ranks.
        samples_per_prompt: responses to each prompt of a rollout.
        batch_size: responses per optimizer step, over all ranks.
        ppo_epochs: passes over each rollout.
        episodes: responses sampled over the whole run, rounded up to whole rollouts; null leaves the length to the
            trainer.
        max_length: longest prompt in tokens.
    """

    gives = ExperienceBatch
    wanted = "prompts"
    columns: ClassVar[ColumnTypes] = {"prompt": "tokens", "text": "text"}

    def __init__(
        self,
        train: Source | list[Source] | None = None,
        *,
        rollout_size: int = 128,
        samples_per_prompt: int = 1,
        batch_size: int = 64,
        ppo_epochs: int = 4,
        episodes: int | None = None,
        max_length: int = 512,
        **rows: Any,
    ) -> None:
        super().__init__(train, batch_size=batch_size, max_length=max_length, **rows)
        if rollout_size < 1 or samples_per_prompt < 1 or ppo_epochs < 1:
            raise UserError("data.rollout_size, data.samples_per_prompt and data.ppo_epochs must be at least 1")
        if rollout_size * samples_per_prompt % batch_size:
            raise UserError(
                f"data.batch_size: {batch_size} does not divide the {rollout_size * samples_per_prompt} episodes of a "
                "rollout (rollout_size × samples_per_prompt)"
            )
        if any(source.is_stream for source in self.sources["train"]):
            raise UserError("data.train.streaming: a rollout needs its prompts at hand; leave it out, or set a limit")
        self.rollout_size = rollout_size
        self.samples_per_prompt = samples_per_prompt
        self.ppo_epochs = ppo_epochs
        self.episodes = episodes

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage == "fit" and self.episodes is not None:
            self._limit_steps(self.episodes)

    def _rows(self, name: str, source: Source) -> Rows:
        """As in the base class, without the rows whose gold answer the running module's reward cannot read.

        Raises:
            UserError: it can read none, or there is one where ``on_bad_row`` is ``error``.
        """
        rows = super()._rows(name, source)
        # Not every module that answers prompts has a reward.
        judge = getattr(getattr(self._module(), "reward", None), "all_unreadable", None)
        if judge is None:
            return rows
        place = place_of(name, source, self.sources[name])
        golds = RowReport(source.label, len(rows), len(rows))
        kept = []
        for start in range(0, len(rows), GOLDS_AT_ONCE):
            block = rows[start : start + GOLDS_AT_ONCE]
            for i, (row, reason) in enumerate(zip(block, judge([row["source"] for row in block]), strict=True), start):
                if reason is None:
                    kept.append(i)
                    continue
                if self.on_bad_row == "error":
                    raise UserError(stopped(source, row["row"], f"{reason}, where model.reward reads the gold answer"))
                golds.drop(reason, row["row"])
                self.reports[place].drop(reason, row["row"])
        if not kept:
            raise UserError(
                f"data.{name}: model.reward can read no gold answer of {golds.summary()}; name the column that holds "
                "them, or take a reward that reads them"
            )
        if len(kept) == len(rows):
            return rows
        say(f"{place}: gold answers that model.reward can read: {golds.summary()}")
        return rows.select(np.asarray(kept))

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

    def reader(self, first_rows: Sequence[Any], source: Source) -> RowReader[Any]:
        return records.prompt_reader(first_rows, source)

    def conversations(self, record: records.Prompt) -> list[Conversation]:
        return [Conversation(record.prompt, len(record.prompt), tools=record.tools)]

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded | str]:
        return self.chat.prompts(conversations)

    def row(self, record: records.Prompt, encoded: Sequence[Encoded]) -> dict[str, Any] | str:
        (whole,) = encoded
        if not whole.prompt:
            return "empty prompt"
        no_answer = [False] * len(whole.prompt)
        fitted = truncate_prompt(whole.prompt, no_answer, self.max_length, self.truncation, self._bos)
        return "over-long" if fitted is None else {"prompt": fitted[0], "text": whole.text}

    def first_seen(self, rows: Sequence[Mapping[str, Any]], places: Sequence[int]) -> PromptBatch:
        return self.prompt_batch([(row, place, 0) for row, place in zip(rows, places, strict=True)])

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
            self.order(),
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
