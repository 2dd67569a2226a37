"""In the loop: after each validation, how often the running policy beats where it began."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor

from rlhf_lit.algorithms.policy import EVALUATION, Writer
from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.batches import PromptBatch
from rlhf_lit.batches.micro_batches import SCORING_BUDGET
from rlhf_lit.data.records import Source
from rlhf_lit.data.sources import is_local_file
from rlhf_lit.errors import UserError
from rlhf_lit.evaluation.answers import Answers, Judge, read_answers
from rlhf_lit.evaluation.divergence import kl_per_response
from rlhf_lit.evaluation.win_rate import wins
from rlhf_lit.models.base import Base
from rlhf_lit.rollout.rewards import RewardSource
from rlhf_lit.training.reduction import sum_over_ranks

# Streams of sampling noise, apart from each other and from every rollout's and validation's.
POLICY, BASELINE = EVALUATION + 1, EVALUATION + 2


@dataclass(frozen=True)
class _Contest:
    """What stays the same over a run: this rank's prompts, and the baseline's responses to them.

    Attributes:
        prompts: on the CPU.
        judge: ready to score.
        scores, lengths: [prompts, 1] of the baseline's.
        budget: padded tokens that go through the device at once.
    """

    prompts: PromptBatch
    judge: Judge
    scores: Any
    lengths: Any
    budget: int


class WinRate(Callback):
    """``val/win_rate`` and its company (docs/evaluation.md) after each validation: SFT, DPO, KTO, PPO, RLOO, GRPO.

    The running policy and a fixed baseline answer the same held-out prompts; a judge scores both. What is sampled and
    judged draws no random number of the training's, and leaves no trace in it.

    Args:
        judge: what scores responses: a reward model, any function, or a sum.
        baseline: another model with the same vocabulary, or a file of prompts and responses; null is the policy as this
            run began, that is `model.base`.
        prompts: how many of the validation rows' prompts, over all ranks; the first that differ from each other.
    """

    def __init__(self, judge: RewardSource, baseline: str | None = None, prompts: int = 128) -> None:
        if prompts < 1:
            raise ValueError(f"WinRate: prompts must be at least 1, not {prompts}")
        self.judge = judge
        self.baseline = baseline
        self.prompts = prompts
        self._contest: _Contest | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Before the first step, while the policy is still what it begins as."""
        self._contest = self._begin(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Of the command ``validate``."""
        if self._contest is None and not trainer.sanity_checking:
            self._contest = self._begin(trainer, pl_module)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Answer, judge and log."""
        if trainer.sanity_checking:
            return
        assert self._contest is not None
        assert isinstance(pl_module, Writer)
        with self._aside(trainer, pl_module):
            metrics = _metrics(pl_module, self._contest)
        for name, value in metrics.items():
            # Every rank has the same number; its mean over them is what Lightning asks for.
            pl_module.log(f"val/{name}", value, prog_bar=name == "win_rate", sync_dist=True)

    def _begin(self, trainer: Trainer, module: LightningModule) -> _Contest:
        """The baseline's responses and their scores.

        Raises:
            UserError: an algorithm that does not write, no held-out prompts, or a baseline or judge that does not fit.
        """
        if not isinstance(module, Writer):
            raise UserError(f"WinRate: {type(module).__name__} writes no responses; leave the callback out")
        datamodule: Any = getattr(trainer, "datamodule", None)
        prompts = self._held_out(trainer, module, datamodule)
        budget = SCORING_BUDGET * datamodule.micro_batch_tokens
        judge = Judge("WinRate.judge", self.judge, budget, module.device)
        with self._aside(trainer, module):
            judge.prepare(module.tokenizer)
            answers = self._baseline_answers(trainer, module, prompts, datamodule)
            scores = judge.scores(answers, prompts.texts, prompts.rows)
        return _Contest(prompts, judge, scores, answers.lengths, budget)

    def _held_out(self, trainer: Trainer, module: Writer, datamodule: Any) -> PromptBatch:
        """This rank's share of the prompts."""
        rows = datamodule.examples.get("validation") if hasattr(datamodule, "examples") else None
        if not rows:
            raise UserError("WinRate: it needs held-out prompts: name data.validation, or set data.validation_fraction")
        distinct = {tuple(row["prompt"]): row for row in reversed(rows) if row["prompt"]}
        fitting = [row for row in reversed(distinct.values()) if module.leaves_room(len(row["prompt"]))][: self.prompts]
        if len(fitting) < trainer.world_size:
            raise UserError(
                f"WinRate: {len(fitting)} of the validation rows have a prompt that leaves room for a response "
                "(model.sampling.max_new_tokens); every rank needs one"
            )
        items = [(row, i, 0) for i, row in enumerate(fitting)]
        share: PromptBatch = datamodule.prompt_batch(items[trainer.global_rank :: trainer.world_size])
        return share

    def _baseline_answers(self, trainer: Trainer, module: Writer, prompts: PromptBatch, datamodule: Any) -> Answers:
        if self.baseline is not None and is_local_file(self.baseline):
            answers, _ = read_answers(Source(self.baseline), prompts.texts, datamodule.chat, datamodule.on_bad_row)
            if answers.samples > 1:
                raise UserError(f"WinRate.baseline: {self.baseline} has several responses to a prompt; leave one")
            return answers
        if self.baseline is None and trainer.ckpt_path is None:
            return _answers(module, prompts, BASELINE)
        # A run that goes on is no more what it began as: that is loaded again, and let go.
        base = module.base if self.baseline is None else Base(name=self.baseline, dtype=module.base.dtype)
        other = SFT(base, sampling=module.sampling)
        if other.tokenizer.get_vocab() != module.tokenizer.get_vocab():
            raise UserError(
                f"WinRate.baseline: {self.baseline} has another vocabulary than the policy; let it write a file "
                "(python -m rlhf_lit predict) and name that"
            )
        other.configure_model()
        return _answers(other.to(module.device).eval(), prompts, BASELINE)

    @contextmanager
    def _aside(self, trainer: Trainer, module: LightningModule) -> Iterator[None]:
        """In eval mode, without gradients, in the run's precision; modes and random states restored."""
        training = {name: part.training for name, part in module.named_modules()}
        module.eval()
        try:
            with isolate_rng(), torch.no_grad(), trainer.precision_plugin.forward_context():
                yield
        finally:
            for name, part in module.named_modules():
                part.training = training.get(name, part.training)


def _answers(module: Writer, prompts: PromptBatch, stream: int) -> Answers:
    samples = module.respond(prompts.to(module.device), stream)
    texts = [[text] for text in module.response_texts(samples)]
    return Answers(texts, samples.sequences.to("cpu"), samples.ended.cpu().double().numpy()[:, None])


def _metrics(module: Writer, contest: _Contest) -> dict[str, Tensor]:
    """Means over the prompts of all ranks."""
    answers = _answers(module, contest.prompts, POLICY)
    scores = contest.judge.scores(answers, contest.prompts.texts, contest.prompts.rows)
    won, tied = wins(scores, contest.scores)
    points = (won + tied / 2).ravel()
    columns = {
        "win_rate": points,
        "win_rate_square": points**2,
        "tie_rate": tied.ravel(),
        "judge_score": scores.ravel(),
        "judge_score_baseline": contest.scores.ravel(),
        "response_length": answers.lengths.ravel(),
        "response_length_baseline": contest.lengths.ravel(),
    }
    if module.roles.has_reference:
        columns["kl_to_reference"] = kl_per_response(module, answers.sequences, contest.budget)[0]
    sums = torch.tensor([[float(len(points))], *([float(x.sum())] for x in columns.values())], device=module.device)
    count, *totals = sum_over_ranks(module, sums.squeeze(-1))
    means = {name: total / count for name, total in zip(columns, totals, strict=True)}
    variance = (means.pop("win_rate_square") - means["win_rate"].square()).clamp(min=0)
    return {**means, "win_rate_error": (variance / count).sqrt()}
