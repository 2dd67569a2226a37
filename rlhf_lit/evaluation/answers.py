"""Responses to the same prompts, sampled from a model or read from a file, and how they are judged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.batches import Sequences
from rlhf_lit.data import records
from rlhf_lit.data.chat import ChatFormat, Template
from rlhf_lit.data.records import Demonstration, Message, OnBadRow, Prompt, RowReport, Source
from rlhf_lit.errors import UserError
from rlhf_lit.evaluation.estimates import Array
from rlhf_lit.evaluation.sampling import draw, prompt_text
from rlhf_lit.models.anatomy import context_length, unwrapped
from rlhf_lit.models.rope import first_context
from rlhf_lit.preflight.sampler import prompts_of, sampler
from rlhf_lit.rollout.rewards import RewardSource, shown


@dataclass(frozen=True)
class Answers:
    """Responses to prompts, as many to each.

    Attributes:
        texts: by prompt, then by sample.
        sequences: prompt + response, prompt by prompt, the mask on the response.
        ended: [prompts, samples] whether each closed itself; None for those of a file.
    """

    texts: list[list[str]]
    sequences: Sequences
    ended: Array | None

    @property
    def samples(self) -> int:
        """Responses to each prompt."""
        return len(self.texts[0])

    @property
    def lengths(self) -> Array:
        """[prompts, samples] tokens, EOS included."""
        counts: Array = self.sequences.mask.sum(-1).double().numpy().reshape(len(self.texts), -1)
        return counts


def read_prompts(source: Source, on_bad_row: OnBadRow) -> tuple[list[Prompt], RowReport]:
    """Distinct prompts: one that comes again would count twice, and is no new evidence.

    Args:
        source: a file, a hub data set, or `playground`.
        on_bad_row: what a bad row leads to.

    Raises:
        UserError: nothing to be read, a bad row where that is an error, or no usable row.
    """
    found, report = records.prompts(records.rows_of(source, "prompts"), source, on_bad_row=on_bad_row)
    distinct: dict[tuple[tuple[Message, ...], str], Prompt] = {}
    for prompt in found:
        if distinct.setdefault((prompt.prompt, str(prompt.tools)), prompt) is not prompt:
            report.drop("repeated prompt", prompt.row)
    return list(distinct.values()), report


def fitting(prompts: Sequence[Prompt], module: SFT, template: Template, report: RowReport) -> list[Prompt]:
    """Those that leave room for a response in the model's context; the others are counted.

    Raises:
        UserError: none does.
    """
    policy = module.roles.policy
    chat, kept = ChatFormat(module.tokenizer, template), []
    for prompt in prompts:
        if not module.leaves_room(len(chat.prompt(prompt.prompt, prompt.tools))):
            report.drop("over-long", prompt.row)
        else:
            kept.append(prompt)
    if not kept:
        fewest = module.sampling.max_new_tokens or 1
        raise UserError(
            f"sampling.max_new_tokens: {fewest} new tokens leave no prompt of {report.file} "
            f"room in the model's context of {first_context(unwrapped(policy)) or context_length(policy)}"
        )
    return kept


def with_readable_gold(prompts: Sequence[Prompt], judges: Sequence[Judge], report: RowReport) -> list[Prompt]:
    """Those whose gold answers every judge can read; the others are counted.

    Raises:
        UserError: a judge can read none.
    """
    kept = list(prompts)
    for judge in judges:
        with judge.complaining():
            reasons = judge.source.all_unreadable([prompt.source for prompt in kept])
        for prompt, reason in zip(kept, reasons, strict=True):
            if reason is not None:
                report.drop(reason, prompt.row)
        kept = [prompt for prompt, reason in zip(kept, reasons, strict=True) if reason is None]
        if not kept:
            raise UserError(f"{judge.name}: no gold answer can be read: {report.summary()}")
    return kept


def sampled(module: SFT, prompts: Sequence[Prompt], samples: int, template: Template, stream: int) -> Answers:
    """A model's own responses; see ``draw``.

    Raises:
        UserError: what the model generates is not drawn from its own distribution.
    """
    turns, tools = [prompt.prompt for prompt in prompts], [prompt.tools for prompt in prompts]
    drawn, texts = draw(module, turns, samples, stream, template, tools)
    require_own_distribution(module, drawn.sequences.select(torch.arange(0, len(drawn.sequences), samples)))
    ended = drawn.ended.cpu().double().numpy().reshape(len(prompts), samples)
    return Answers(texts, drawn.sequences.to("cpu"), ended)


def require_own_distribution(module: SFT, sequences: Sequences) -> None:
    """Refuse a model whose generation is broken: its scores would be those of another one.

    Args:
        module: in eval mode.
        sequences: rows with prompts; the first few are answered once more.

    Raises:
        UserError: the sampler's log-probs are not the training forward's.
    """
    check = sampler(module, prompts_of(sequences))
    if check.verdict == "warning":
        raise UserError(f"{module.base.name}: sampler: {check.found}; {check.advice}")


def read_answers(
    source: Source, prompts: Sequence[str], chat: ChatFormat, on_bad_row: OnBadRow
) -> tuple[Answers, RowReport]:
    """Responses of a file of any supervised shape, found by their prompts; several rows to a prompt are its samples.

    Args:
        source: the file, given as ``baseline``.
        prompts: what is to be answered, as text.
        chat: how conversations become text and tokens, in which the responses are measured and judged.
        on_bad_row: what a bad row leads to.

    Raises:
        UserError: a prompt without a response, or not as many to each.
    """
    found, report = records.demonstrations(records.read_rows(source), source, on_bad_row=on_bad_row)
    by_prompt: dict[str, list[Demonstration]] = {}
    for record in found:
        if len(record.messages) > 1:
            by_prompt.setdefault(prompt_text(chat, record.messages[:-1]), []).append(record)
    missing = [prompt for prompt in prompts if prompt not in by_prompt]
    if missing:
        raise UserError(
            f"baseline: {source.label} has no response to {len(missing)} of the {len(prompts)} prompts; the first is "
            f"{shown(missing[0])}"
        )
    chosen = [by_prompt[prompt] for prompt in prompts]
    if len(set(map(len, chosen))) > 1:
        raise UserError(
            f"baseline: {source.label} has {min(map(len, chosen))} responses to some prompts and "
            f"{max(map(len, chosen))} to others; give every prompt as many"
        )
    encoded = [
        chat.answers(record.messages[:-1], [record.messages[-1:]], record.tools)[0]
        for records_of in chosen
        for record in records_of
    ]
    sequences = Sequences.pad([one.tokens for one in encoded], [one.mask for one in encoded])
    texts = [[record.messages[-1].content.strip() for record in records_of] for records_of in chosen]
    return Answers(texts, sequences, None), report


class Judge:
    """A reward source that scores responses, under the name of its option.

    Args:
        name: what its complaints begin with: `judge` or `gold`.
        source: where scores come from.
        budget: padded tokens that go through the device at once. Changes no result.
        device: where a model that judges works.
    """

    def __init__(self, name: str, source: RewardSource, budget: int, device: torch.device) -> None:
        self.name = name
        self.source = source
        self.budget = budget
        self.device = device
        self._vocabulary: dict[str, int] | None = None

    def prepare(self, tokenizer: Any) -> None:
        """Load what is needed; once for each tokenizer whose tokens will be judged.

        Raises:
            UserError: a model judges, and has another vocabulary.
        """
        with self.complaining():
            if self._vocabulary is None:
                self.source.prepare(tokenizer)
                self.source.to(self.device).eval()
                self._vocabulary = tokenizer.get_vocab()
            elif self.source.critic_base() is not None and tokenizer.get_vocab() != self._vocabulary:
                raise UserError(
                    "reward: a reward model judges tokens, and the models compared have different vocabularies; "
                    "judge by a function"
                )

    @torch.no_grad()
    def scores(self, answers: Answers, texts: Sequence[str], rows: Sequence[dict[str, Any]]) -> Array:
        """[prompts, samples] scores.

        Args:
            answers: what is judged.
            texts: the prompts as text.
            rows: the prompts' rows of their file.

        Raises:
            UserError: what the source raises, or a score that is NaN or infinite.
        """
        count, samples = len(answers.texts), answers.samples
        responses = [text for row in answers.texts for text in row]
        with self.complaining():
            found = self.source(
                answers.sequences.to(self.device),
                [texts[i] for i in range(count) for _ in range(samples)],
                responses,
                [rows[i] for i in range(count) for _ in range(samples)],
                self.budget,
            )
        result: Array = found.cpu().double().numpy()
        bad = np.flatnonzero(~np.isfinite(result))
        if len(bad):
            raise UserError(
                f"{self.name}: the response {shown(responses[bad[0]])} has the score {result[bad[0]]}; the reward "
                "model is broken, or too wide for its dtype"
            )
        return result.reshape(count, samples)

    @contextmanager
    def complaining(self) -> Iterator[None]:
        """Sources call themselves `reward`, their key in a training run: here they have another."""
        try:
            yield
        except UserError as error:
            message = str(error)
            if message.startswith("reward"):
                message = self.name + message.removeprefix("reward")
            raise UserError(message) from error
