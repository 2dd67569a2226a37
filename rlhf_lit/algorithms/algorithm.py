"""What an algorithm is, and the one optimisation step that all of them share.

A batch is what one optimizer step sees on this rank. ``step`` cuts it into length-sorted micro-batches, sums the losses
over denominators of the whole batch on all ranks, and moves the weights once: a Lightning step is an optimizer step,
accumulation is exact by construction, and ``micro_batch_tokens`` changes no result beyond float rounding.

Left out: automatic optimisation, gradient accumulation as a setting, several optimizers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import cached_property
from typing import Any, ClassVar

from lightning import LightningModule
from torch import Tensor, nn

from rlhf_lit.batches import Record
from rlhf_lit.errors import UserError
from rlhf_lit.models.base import Base
from rlhf_lit.models.compilation import compile_layers
from rlhf_lit.models.flops import count_flops, uncounted
from rlhf_lit.models.loading import load_tokenizer, require_embeddings
from rlhf_lit.models.packing import layout_of
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.randomness import reseed
from rlhf_lit.training import checkpoint as checkpoints
from rlhf_lit.training import evaluation, reduction
from rlhf_lit.training.malloc import keep_freed_memory
from rlhf_lit.training.optimizer import Optimizer, Schedule, apply_settings, configure
from rlhf_lit.training.reduction import StepLoss
from rlhf_lit.training.router_loss import RouterLoss
from rlhf_lit.training.utilisation import log_rate

__all__ = ["Algorithm", "Optimizer", "Schedule", "StepLoss"]


class Algorithm(LightningModule):
    """A model that learns from batches, one optimizer step each.

    A subclass says what models it needs (``build``), what a batch's losses are divided by (``denominators``), and what
    a micro-batch adds to them (``losses``). Evaluation and checkpoints are told in ``training/``.

    Args:
        base: the model to start from.
        learning_rate: peak learning rate.
        optimizer: which optimizer.
        schedule: learning rate over time.
    """

    learns_from: ClassVar[tuple[type[Record], ...]] = ()  # kinds of batches; empty where it does not say
    progress_metrics: ClassVar[tuple[str, ...]] = ()  # shown in the bar, beside loss and tokens per second
    # The denominator by which validation averages over batches, and that of metrics which have another.
    averaged_over: ClassVar[str]
    metrics_averaged_over: ClassVar[dict[str, str]] = {}
    trains_scorer: ClassVar[bool] = False  # whether ``trained_model`` scores sequences; else it is a language model

    def __init__(self, base: Base, learning_rate: float, optimizer: Optimizer, schedule: Schedule) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise UserError(f"model.learning_rate must be greater than 0, not {learning_rate}")
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold trainable weights only: the frozen base comes from `base` again
        self.base = base.trainable()
        self.learning_rate = learning_rate
        self.optimizer_settings, self.schedule_settings = optimizer, schedule
        self.averages, self.router_loss = evaluation.Averages(), RouterLoss()
        self._built = False
        self.on_dummy = False  # whether the present micro-batch only makes the passes that another rank needs

    # The contract

    def build(self) -> None:
        """Load the models. Called once, before anything else."""
        raise NotImplementedError

    @property
    def trained_model(self) -> nn.Module:
        """What is exported at the end: the policy, where a subclass says nothing else."""
        policy: nn.Module = self.roles.policy  # type: ignore[union-attr, assignment]
        return policy

    def set_train_mode(self) -> None:
        """Set train or eval mode of the models for training."""
        raise NotImplementedError

    def prepare(self, batch: Any) -> None:
        """Compute what a loss must know of a whole batch, on all ranks, before its first micro-batch (KTO's z). Called
        on every rank, however many rows it has; without gradients."""

    def denominators(self, batch: Any) -> dict[str, Tensor]:
        """What the losses are divided by: how many tokens, or pairs, this rank's batch holds. Float scalars."""
        raise NotImplementedError

    def losses(self, batch: Any, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        """The losses of one micro-batch; the backward pass of each runs before the next is asked for.

        Args:
            batch: a micro-batch.
            denominators: of the whole batch, summed over all ranks.
        """
        raise NotImplementedError

    def sample_completions(self) -> list[dict[str, Any]]:
        """A few completions for people to read; none where the algorithm does not write."""
        return []

    # The step

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One optimizer step over one batch, and its numbers."""
        started = time.perf_counter()
        reseed("step", self.global_step, self.global_rank)
        scheduler: Any = self.lr_schedulers()
        with count_flops() as counted:
            totals = self.step(batch)
        self.log("train/learning_rate", scheduler.optimizer.param_groups[0]["lr"])
        if self.trainer.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True  # else Lightning would not validate at the last of max_steps
        self.log_step(totals, totals.pop("grad_norm"))
        scheduler.step()  # after what was logged, which is the rates this step was made with
        tokens = sum(int(sequences.lengths.sum()) for sequences in batch.answers())
        seconds = time.perf_counter() - started
        self.log("train/tokens_per_s", tokens / seconds, prog_bar=True)
        log_rate(self, counted, seconds)

    def step(self, batch: Any) -> dict[str, Tensor]:
        """Sum the losses of a batch's micro-batches, on all ranks, and move the weights once.

        Returns:
            The step's metrics over all ranks, with ``loss``, and ``grad_norm`` before clipping.
        """
        optimizer: Any = self.optimizers()
        counts = self.denominators(batch) | self.router_loss.denominators(batch)
        denominators = {name: self.sum_over_ranks(count) for name, count in counts.items()}
        self.prepare(batch)
        totals: dict[str, Tensor] = {}
        with reduction.local_gradients(self.trainer):
            for term in self.step_losses(batch, denominators):
                self.manual_backward(term.loss)
                term.add_to(totals)
        norm = reduction.reduce_and_clip(self, self.moving_parameters(), self.optimizer_settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()  # now, not before the next backward pass: a rollout or a validation may come in between
        return {**reduction.sum_metrics(self, totals), "grad_norm": norm}

    def step_losses(self, batch: Any, denominators: dict[str, Tensor]) -> Iterator[StepLoss]:
        """The losses of all micro-batches of a batch, those of dummies without a weight."""
        parts = batch.micro_batches(layout_of(self))
        for micro_batch, counts in sharding_of(self).passes(parts, batch.dummy):
            self.on_dummy = not counts
            with uncounted(self.on_dummy):
                for term in self.router_loss.added(self.losses(micro_batch, denominators), denominators):
                    yield term if counts else StepLoss(0 * term.loss, {})
        self.on_dummy = False

    def log_step(self, totals: dict[str, Tensor], grad_norm: Tensor) -> None:
        """Log a step's numbers; on-policy algorithms have names of their own."""
        for name, total in totals.items():
            self.log(f"train/{name}", total, prog_bar=name == "loss" or name in self.progress_metrics)
        self.log("train/grad_norm", grad_norm)

    sum_over_ranks = reduction.sum_over_ranks
    max_over_ranks = reduction.max_over_ranks

    # Setup

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer; data modules ask for it before the model is built."""
        return load_tokenizer(self.base)

    def configure_model(self) -> None:
        """Build the models, once. A sharding strategy takes them from here."""
        if self._built:
            return
        self.build()
        require_embeddings(self, len(self.tokenizer))
        self.router_loss = RouterLoss(self.trained_model, self.base.router_loss)
        if self.base.compile:
            compile_layers(self)
        self._built = True

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def moving_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters that the next step moves: all of them, where a subclass says nothing else."""
        return self.trainable_parameters()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer steps, with peak learning rates."""
        return [{"params": self.trainable_parameters(), "lr": self.learning_rate}]

    configure_optimizers = configure

    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        self.router_loss.tell()
        self.set_train_mode()

    def on_train_start(self) -> None:
        """Put a run that starts from a checkpoint exactly where it was, and let its own settings have the last word."""
        checkpoints.restore_loader(self.trainer.fit_loop)
        apply_settings(self)

    def saved_names(self) -> set[str]:
        """The weights that a checkpoint holds: those that move in training."""
        return {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}

    on_save_checkpoint = checkpoints.keep_trained
    on_load_checkpoint = checkpoints.require_fitting
    evaluate = evaluation.evaluate
    log_averages = evaluation.log_averages
    validation_step = evaluation.validation_step
    test_step = evaluation.test_step
