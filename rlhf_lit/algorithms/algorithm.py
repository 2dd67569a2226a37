"""What an algorithm is, and the one optimisation step that all of them share.

A batch is what one optimizer step sees on this rank. ``training_step`` cuts it into length-sorted micro-batches, sums
the losses over denominators of the whole batch on all ranks, and steps once: a Lightning step is an optimizer step,
accumulation is exact by construction, and ``micro_batch_tokens`` changes no result beyond float rounding.

Left out: automatic optimisation, gradient accumulation as a setting of its own, and several optimizers.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from rlhf_lit.batches import Record
from rlhf_lit.errors import UserError
from rlhf_lit.models.compilation import compile_layers
from rlhf_lit.models.flops import Pass, flops, peak_flops
from rlhf_lit.models.loading import Base, load_tokenizer, require_embeddings
from rlhf_lit.models.packing import packs
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.randomness import reseed
from rlhf_lit.training import checkpoint as checkpoints
from rlhf_lit.training import reduction
from rlhf_lit.training.averages import Averages
from rlhf_lit.training.malloc import keep_freed_memory
from rlhf_lit.training.optimizer import Optimizer, Schedule, apply_settings

__all__ = ["Algorithm", "Optimizer", "Schedule", "StepLoss"]


@dataclass(frozen=True)
class StepLoss:
    """What a micro-batch adds to the loss of a step: over all micro-batches and ranks these sum up to the batch's own.

    Attributes:
        loss: scalar with a gradient, already divided by the whole batch's denominator.
        metrics: scalars without one, divided likewise.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Algorithm(LightningModule):
    """A model that learns from batches, one optimizer step each.

    A subclass says what models it needs (``build``), what a batch's losses are divided by (``denominators``), and what
    a micro-batch adds to them (``losses``).

    Args:
        base: the model to start from.
        learning_rate: peak learning rate.
        optimizer: which optimizer.
        schedule: learning rate over time.
    """

    # The kinds of batches it learns from, which data modules ask for; empty where it does not say.
    learns_from: ClassVar[tuple[type[Record], ...]] = ()
    # Metrics shown in the progress bar, beside loss and tokens per second.
    progress_metrics: ClassVar[tuple[str, ...]] = ()
    # The denominator by which validation averages over batches, and that of metrics which have another.
    averaged_over: ClassVar[str]
    metrics_averaged_over: ClassVar[dict[str, str]] = {}
    # Whether ``trained_model`` scores sequences; else it is a language model.
    trains_scorer: ClassVar[bool] = False

    def __init__(self, base: Base, learning_rate: float, optimizer: Optimizer, schedule: Schedule) -> None:
        super().__init__()
        if not learning_rate > 0:
            raise UserError(f"model.learning_rate must be greater than 0, not {learning_rate}")
        self.automatic_optimization = False
        # Checkpoints hold trainable weights only; the frozen base comes from `base` again.
        self.strict_loading = False
        self.base = base
        self.learning_rate = learning_rate
        self.optimizer_settings = optimizer
        self.schedule_settings = schedule
        self.averages = Averages()
        self._built = False
        # Whether the present micro-batch is a dummy, whose losses count for nothing (see ``parallel.sharding``).
        self.on_dummy = False

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

    def model_passes(self, batch: Any) -> Iterable[Pass]:
        """The passes that a step over a batch makes through models, for ``train/tflops_per_s``; where there are none
        it is not logged."""
        return ()

    def micro_batches(self, batch: Any) -> Iterator[Any]:
        """The pieces of a batch that go through the device at once."""
        yield from batch.micro_batches(self.packed)

    def sample_completions(self) -> list[dict[str, Any]]:
        """A few completions for people to read; none where the algorithm does not write."""
        return []

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """One record per row of the batch."""
        raise NotImplementedError

    # Setup

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer; data modules ask for it before the model is built."""
        return load_tokenizer(self.base)

    def configure_model(self) -> None:
        """Build the models, once."""
        if self._built:
            return
        self.build()
        require_embeddings(self, len(self.tokenizer))
        if self.base.compile:
            compile_layers(self)
        self._built = True

    @property
    def packed(self) -> bool:
        """Whether the sequences of a micro-batch stand in one row, so that it is filled without padding."""
        from transformers import PreTrainedModel

        return all(packs(module) for module in self.modules() if isinstance(module, PreTrainedModel))

    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        self.set_train_mode()

    def on_train_start(self) -> None:
        """Put a run that starts from a checkpoint exactly where it was, and let its own settings have the last word."""
        checkpoints.restore_loader(self.trainer.fit_loop)
        apply_settings(self.optimizers(), self.lr_schedulers(), self.optimizer_settings, self.parameter_groups())

    # The step

    def training_step(self, batch: Any, batch_idx: int) -> None:
        """One optimizer step over one batch."""
        started = time.perf_counter()
        reseed("step", self.global_step, self.global_rank)
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        denominators = {name: self.sum_over_ranks(count) for name, count in self.denominators(batch).items()}
        self.prepare(batch)
        totals: dict[str, Tensor] = {}
        with reduction.local_gradients(self.trainer):
            for micro_batch in self.in_step(batch):
                for term in self.losses(micro_batch, denominators):
                    self.manual_backward(0 * term.loss if self.on_dummy else term.loss)
                    self._add(totals, term)
        norm = reduction.reduce_and_clip(self, self.moving_parameters(), self.optimizer_settings.max_grad_norm)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()  # now, not before the next backward pass: a rollout or a validation may come in between
        if self.trainer.global_step == self.trainer.max_steps:
            # Lightning validates when an epoch ends or a run is told to stop, but not at the last of max_steps.
            self.trainer.should_stop = True
        self.log_step(reduction.sum_metrics(self, totals), norm)
        scheduler.step()  # after what was logged, which is the rates this step was made with
        tokens = sum(int(sequences.lengths.sum()) for sequences in batch.answers())
        seconds = time.perf_counter() - started
        self.log("train/tokens_per_s", tokens / seconds, prog_bar=True)
        self._log_flops(list(self.model_passes(batch)), seconds)

    def in_step(self, batch: Any) -> Iterator[Any]:
        """The micro-batches of a batch, and dummies where all ranks must run the same number of passes."""
        for micro_batch, counts in sharding_of(self).passes(self.micro_batches(batch), batch.dummy):
            self.on_dummy = not counts
            yield micro_batch
        self.on_dummy = False

    def _add(self, totals: dict[str, Tensor], term: StepLoss) -> None:
        if self.on_dummy:
            return
        for name, value in {"loss": term.loss.detach(), **term.metrics}.items():
            totals[name] = totals[name] + value if name in totals else value

    def log_step(self, totals: dict[str, Tensor], grad_norm: Tensor) -> None:
        """Log a step's numbers; on-policy algorithms have names of their own."""
        for name, total in totals.items():
            self.log(f"train/{name}", total, prog_bar=name == "loss" or name in self.progress_metrics)
        self.log("train/grad_norm", grad_norm)

    def _log_flops(self, passes: list[Pass], seconds: float) -> None:
        """This rank's rate, and its part of what the device could do. The count stays a tensor, not to wait for it."""
        if not passes:
            return
        rate = flops(passes) / seconds
        self.log("train/tflops_per_s", rate / 1e12)
        if peak := peak_flops(self.device, self.base, str(self.trainer.precision)):
            self.log("train/mfu", rate / peak)

    sum_over_ranks = reduction.sum_over_ranks
    max_over_ranks = reduction.max_over_ranks

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def moving_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters that the next step moves: all of them, where a subclass says nothing else."""
        return self.trainable_parameters()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer steps, with peak learning rates."""
        return [{"params": self.trainable_parameters(), "lr": self.learning_rate}]

    def configure_optimizers(self) -> Any:
        if not self.trainable_parameters():
            raise UserError(f"base.name: nothing of {self.base.name} is trainable")
        optimizer = self.optimizer_settings.build(self.parameter_groups())
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("trainer.max_epochs, trainer.max_steps: one of them must say how long the run is")
        return {"optimizer": optimizer, "lr_scheduler": self.schedule_settings.build(optimizer, int(steps))}

    # Checkpoints

    def saved_names(self) -> set[str]:
        """The weights that a checkpoint holds: those that move in training."""
        return {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoints.keep_trained(checkpoint, self.saved_names())
        checkpoint["base"] = self.base.address

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raises UserError where a checkpoint does not fit this model, or continues a run from another base."""
        if self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING:
            checkpoints.require_same_base(checkpoint, self.base.address)
        checkpoints.require_fitting(checkpoint, self.saved_names())

    # Evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Losses and metrics on held-out rows (none where the last batch is smaller than the number of ranks)."""
        self._evaluation_step(batch, batch_idx, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same on the test rows."""
        self._evaluation_step(batch, batch_idx, "test")

    def _evaluation_step(self, batch: Any, batch_idx: int, stage: str) -> None:
        self.prepare(batch)
        reseed("validation", self.global_step, batch_idx, self.global_rank)
        self.evaluate(batch, stage)

    def evaluate(self, batch: Any, stage: str) -> None:
        """Average the batch's numbers into the stage's, weighted by what the batch is counted in."""
        denominators = self.denominators(batch)
        totals: dict[str, Tensor] = {}
        for micro_batch in self.in_step(batch):
            for term in self.losses(micro_batch, denominators):
                self._add(totals, term)
        for name, total in totals.items():
            weight = denominators[self.metrics_averaged_over.get(name, self.averaged_over)]
            self.log_averages(stage, {name: total}, weight, batch_size=len(batch))

    def log_averages(self, stage: str, values: dict[str, Tensor], weight: Tensor, batch_size: int) -> None:
        """Log means over a whole evaluation, over all ranks."""
        for name, value in values.items():
            key = f"{stage}/{name}"
            shown = name == "loss" or name in self.progress_metrics
            mean = self.averages.add(key, value, weight)
            self.log(key, mean, prog_bar=shown, batch_size=batch_size, metric_attribute=f"averages.{key}")


def require_no_dropout(base: Base, algorithm: str) -> None:
    """PPO, DPO and KTO compare log-probs of the same tokens in different passes: dropout would make them differ."""
    if base.lora and base.lora.dropout:
        raise UserError(f"base.lora.dropout: {algorithm} runs without dropout; set it to 0")
