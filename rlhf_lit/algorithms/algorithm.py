"""The one optimisation step that all algorithms share.

A batch is what one optimizer step sees on this rank. ``training_step`` cuts it into length-sorted micro-batches, sums
the losses over denominators of the whole batch on all ranks, and steps once: a Lightning step is an optimizer step,
accumulation is exact by construction, and ``micro_batch_tokens`` changes no result beyond float rounding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn
from torchmetrics import MeanMetric

from rlhf_lit.batches import ExperienceBatch, PreferenceBatch, RankedBatch, Record, SupervisedBatch, UnpairedBatch
from rlhf_lit.errors import UserError
from rlhf_lit.models.compilation import compile_layers
from rlhf_lit.models.flat import drawn, flat_of, plain_name
from rlhf_lit.models.flops import Pass, flops
from rlhf_lit.models.loading import Base, load_tokenizer
from rlhf_lit.models.packing import packs
from rlhf_lit.parallel.sharding import gathered, is_sharded, passes, shard
from rlhf_lit.randomness import reseed
from rlhf_lit.training.malloc import keep_freed_memory

Batch = SupervisedBatch | PreferenceBatch | RankedBatch | UnpairedBatch | ExperienceBatch


@dataclass(frozen=True)
class Optimizer:
    """AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101), in float32 or with 8-bit state through bitsandbytes.

    Args:
        name: adamw, adamw_8bit, or paged_adamw_8bit (state that moves to the host when the device is full).
        betas: decay rates of the two moments.
        eps: added to the denominator.
        weight_decay: decoupled decay per step, times the learning rate.
        max_grad_norm: clip the gradient's global L2 norm to this; null only measures it.
    """

    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    max_grad_norm: float | None = 1.0

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer over groups of parameters (``params``), each with its learning rate (``lr``)."""
        options: dict[str, Any] = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        if self.name == "adamw":
            return torch.optim.AdamW(groups, fused=True, **options)  # one pass over weight, gradient and moments
        import bitsandbytes

        kinds = {"adamw_8bit": "AdamW8bit", "paged_adamw_8bit": "PagedAdamW8bit"}
        return getattr(bitsandbytes.optim, kinds[self.name])(groups, **options)


@dataclass(frozen=True)
class Schedule:
    """Learning rate over the steps of the run.

    Args:
        name: constant; or linear or cosine decay to 0 at the run's last step.
        warmup: steps of linear rise from 0; below 1, a fraction of the run's steps.
    """

    name: Literal["constant", "linear", "cosine"] = "linear"
    warmup: float = 0.0

    def build(self, optimizer: torch.optim.Optimizer, steps: int) -> Any:
        """The scheduler, stepped once per optimizer step."""
        from transformers import get_scheduler

        warmup = round(self.warmup * steps) if self.warmup < 1 else int(self.warmup)
        name = "constant_with_warmup" if self.name == "constant" else self.name
        return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=steps)


@dataclass(frozen=True)
class Share:
    """A micro-batch's share of the step: the shares of a batch, over all ranks, add up to the batch's own numbers.

    Attributes:
        loss: scalar with a gradient, already divided by the whole batch's denominator.
        metrics: scalars without one, divided likewise.
    """

    loss: Tensor
    metrics: dict[str, Tensor]


class Algorithm(LightningModule):
    """What all algorithms have in common.

    A subclass says what it needs (``build``), what a batch is counted in (``units``), and what a micro-batch
    contributes (``shares``).

    Args:
        base: the model to start from.
        learning_rate: peak learning rate.
        optimizer: which optimizer.
        schedule: learning rate over time.
    """

    # The kinds of batches it learns from, which data modules ask for; empty where it does not say.
    learns_from: tuple[type[Record], ...] = ()
    # Metrics shown in the progress bar, beside loss and tokens per second.
    progress_metrics: tuple[str, ...] = ()
    # Metrics that validation averages by another unit than ``weight_of``: metric → unit.
    metric_units: dict[str, str] = {}  # noqa: RUF012 - read, never written

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
        self.averages = nn.ModuleDict()
        self._built = False
        # Whether the micro-batch at hand is a blank, which counts for nothing (see ``models.sharding``).
        self.keeping_step = False

    # What a subclass says

    def build(self) -> None:
        """Load the models. Called once, before anything else."""
        raise NotImplementedError

    @property
    def trained_model(self) -> nn.Module:
        """What is exported at the end: the policy, where a subclass says nothing else."""
        policy: nn.Module = self.roles.policy  # type: ignore[union-attr, assignment]
        return policy

    def modes(self) -> None:
        """Set train or eval mode of the models for training."""
        raise NotImplementedError

    def prepare(self, batch: Any) -> None:
        """What a loss must know of a whole batch, on all ranks, before its first micro-batch (KTO's z). Called on every
        rank, whatever its share of the batch; without gradients."""

    def units(self, batch: Any) -> dict[str, Tensor]:
        """Denominators of the losses: how many tokens, or pairs, this rank's batch holds. Float scalars."""
        raise NotImplementedError

    def shares(self, batch: Any, units: dict[str, Tensor]) -> Iterator[Share]:
        """The shares of one micro-batch; each is followed backwards before the next is asked for."""
        raise NotImplementedError

    def model_passes(self, batch: Any) -> Iterable[Pass]:
        """The passes that a step over a batch makes through models, for ``train/tflops_per_s``; where there are none
        it is not logged."""
        return ()

    def micro_batches(self, batch: Any) -> Iterator[Any]:
        """The pieces of a batch that go through the device at once."""
        yield from batch.micro_batches(self.packed)

    def in_step(self, batch: Any) -> Iterator[Any]:
        """The same; and, where models are spread over the ranks, blanks as long as another rank has more of them."""
        for micro_batch, counts in passes(self, self.micro_batches(batch), batch.blank):
            self.keeping_step = not counts
            yield micro_batch
        self.keeping_step = False

    def _add(self, totals: dict[str, Tensor], share: Share) -> None:
        if self.keeping_step:
            return
        for name, value in {"loss": share.loss.detach(), **share.metrics}.items():
            totals[name] = totals[name] + value if name in totals else value

    @property
    def weight_of(self) -> str:
        """The unit by which validation averages over batches."""
        raise NotImplementedError

    def sample_completions(self) -> list[dict[str, Any]]:
        """A few completions for people to read; none where the algorithm does not write."""
        return []

    # The step

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer; data modules ask for it before the model is built."""
        return load_tokenizer(self.base)

    def configure_model(self) -> None:
        """Build the models, once, and spread them over the ranks where the strategy says so (it set a mesh)."""
        if not self._built:
            self.build()
            self._check_vocabulary()
            if self.base.compile:
                compile_layers(self)
            if self._device_mesh is not None:
                shard(self, self._device_mesh["data_parallel"])
            self._built = True

    def _check_vocabulary(self) -> None:
        """Every token of the tokenizer must have an embedding; a token without one would end a run in its middle."""
        from transformers import PreTrainedModel

        for module in self.modules():
            if isinstance(module, PreTrainedModel):
                rows = module.get_input_embeddings().weight.shape[0]
                if len(self.tokenizer) > rows:
                    raise UserError(
                        f"base.tokenizer: it has {len(self.tokenizer)} tokens, and the model only {rows} embeddings"
                    )

    @property
    def packed(self) -> bool:
        """Whether the sequences of a micro-batch stand in one row, so that it is filled without padding."""
        from transformers import PreTrainedModel

        return all(packs(module) for module in self.modules() if isinstance(module, PreTrainedModel))

    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            keep_freed_memory()
        self.modes()

    def on_train_start(self) -> None:
        """Put a run that starts from a checkpoint exactly where it was, and let its own settings have the last word."""
        # `configure_optimizers` asks for the number of steps, which makes Lightning set the training loader up before
        # it reads the checkpoint; it then never hands the loader its state, and mid-epoch batches would be repeated.
        # Nor does it after a whole epoch, which is no restart to it: a longer run would begin with the first epoch's.
        loop = self.trainer.fit_loop
        if loop._combined_loader is not None and loop._combined_loader_states_to_load:
            loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
            loop._combined_loader_states_to_load = []
        self._apply_settings()

    def _apply_settings(self) -> None:
        """A restored optimizer and schedule come with the rates they were saved with: set those of this run."""
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        settings = self.optimizer_settings
        scheduler.base_lrs = [group["lr"] for group in self.parameter_groups()]
        factors = [factor(scheduler.last_epoch) for factor in scheduler.lr_lambdas]
        scheduler._last_lr = [rate * factor for rate, factor in zip(scheduler.base_lrs, factors, strict=True)]
        for group, rate in zip(optimizer.param_groups, scheduler._last_lr, strict=True):
            group.update(lr=rate, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        """One optimizer step over one batch."""
        started = time.perf_counter()
        reseed("step", self.global_step, self.global_rank)
        optimizer: Any = self.optimizers()
        scheduler: Any = self.lr_schedulers()
        units = {name: self.sum_over_ranks(count) for name, count in self.units(batch).items()}
        self.prepare(batch)
        totals: dict[str, Tensor] = {}
        with self._local_gradients():
            for micro_batch in self.in_step(batch):
                for share in drawn(self, self.shares(micro_batch, units)):
                    self.manual_backward(0 * share.loss if self.keeping_step else share.loss)
                    self._add(totals, share)
        norm = self._reduce_and_clip()
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"])
        optimizer.step()
        optimizer.zero_grad()  # now, not before the next backward pass: a rollout or a validation may come in between
        if self.trainer.global_step == self.trainer.max_steps:
            # Lightning validates when an epoch ends or a run is told to stop, but not at the last of max_steps.
            self.trainer.should_stop = True
        self.log_step(self._sum_metrics(totals), norm)
        scheduler.step()  # after what was logged, which is the rates this step was made with
        tokens = float(self.tokens_in(batch))
        seconds = time.perf_counter() - started
        self.log("train/tokens_per_s", tokens / seconds, prog_bar=True)
        self._log_flops(list(self.model_passes(batch)), seconds)

    def log_step(self, totals: dict[str, Tensor], grad_norm: Tensor) -> None:
        """Log a step's numbers; PPO has names of its own."""
        for name, total in totals.items():
            self.log(f"train/{name}", total, prog_bar=name == "loss" or name in self.progress_metrics)
        self.log("train/grad_norm", grad_norm)

    def tokens_in(self, batch: Batch) -> int:
        """Real tokens this rank's batch holds, prompts included."""
        if isinstance(batch, RankedBatch):
            return int(batch.answers.lengths.sum())
        sides = (batch.chosen, batch.rejected) if isinstance(batch, PreferenceBatch) else (batch.sequences,)
        return sum(int(side.lengths.sum()) for side in sides)

    def _log_flops(self, passes: list[Pass], seconds: float) -> None:
        """This rank's rate, and its part of what the device could do. The count stays a tensor, not to wait for it."""
        if not passes:
            return
        rate = flops(passes) / seconds
        self.log("train/tflops_per_s", rate / 1e12)
        if self._peak_flops:
            self.log("train/mfu", rate / self._peak_flops)

    @cached_property
    def _peak_flops(self) -> int | None:
        """Operations per second the device is made for, in the dtype of the matrix products; None where not known."""
        from lightning.fabric.utilities.throughput import get_available_flops

        quantization = self.base.quantization
        dtype = quantization.compute_dtype if quantization else self.base.dtype
        if self.trainer.precision == "bf16-mixed":
            dtype = "bfloat16"
        return get_available_flops(self.device, getattr(torch, dtype))

    def sum_over_ranks(self, value: Tensor) -> Tensor:
        """Σ over ranks of a scalar; itself on one rank, and outside a trainer."""
        if self._trainer is None or self.trainer.world_size == 1:
            return value
        reduced = self.trainer.strategy.reduce(value.clone(), reduce_op="sum")
        assert isinstance(reduced, Tensor)
        return reduced

    def max_over_ranks(self, value: Tensor) -> Tensor:
        """The largest of the ranks' scalars; itself on one rank, and outside a trainer."""
        if self._trainer is None or self.trainer.world_size == 1:
            return value
        reduced = self.trainer.strategy.reduce(value.clone(), reduce_op="max")
        assert isinstance(reduced, Tensor)
        return reduced

    def _sum_metrics(self, totals: dict[str, Tensor]) -> dict[str, Tensor]:
        """Σ over ranks of a step's numbers. A rank whose share of the batch is empty has none, and adds zeros."""
        if self.trainer.world_size == 1:
            return totals
        names: list[list[str]] = [[] for _ in range(self.trainer.world_size)]
        torch.distributed.all_gather_object(names, list(totals))
        every = max(names, key=len)
        zero = torch.zeros((), device=self.device)
        sums = self.sum_over_ranks(torch.stack([totals.get(name, zero).float() for name in every]))
        return dict(zip(every, sums, strict=True))

    def _local_gradients(self) -> AbstractContextManager[None]:
        """No gradient synchronisation inside: ranks may hold different numbers of micro-batches."""
        block = getattr(self.trainer.strategy, "block_backward_sync", None)
        return block() if self.trainer.world_size > 1 and block else nullcontext()

    def _reduce_and_clip(self) -> Tensor:
        """Add the ranks' gradients up (denominators are global already), clip, and return the norm before clipping."""
        parameters = self.moving_parameters()
        moving = set(parameters)
        for parameter in self.trainable_parameters():
            if parameter not in moving:
                parameter.grad = None  # the optimizer passes over it: no decay, no moments, no count of steps
        flat = flat_of(self)
        if self.trainer.world_size > 1 and (flat or not is_sharded(self)):
            for parameter in parameters:
                if parameter.grad is None:  # the optimizer shall count the same steps on all ranks
                    parameter.grad = torch.zeros_like(parameter)
                if not flat:  # sharded ones were added up on the way
                    torch.distributed.all_reduce(parameter.grad)
        limit = self.optimizer_settings.max_grad_norm
        limit = float("inf") if limit is None else limit
        return flat.clip_grad_norm(parameters, limit) if flat else gathered(nn.utils.clip_grad_norm_(parameters, limit))

    def forward(self, function: Callable[[], Any]) -> Any:
        """What is called inside the algorithm's own pass (see ``models.flat``)."""
        return function()

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Under the names that they have where no strategy adds its own."""
        for name, parameter in super().named_parameters(prefix, recurse, remove_duplicate):
            yield plain_name(name), parameter

    def trainable_parameters(self) -> list[nn.Parameter]:
        """What the optimizer steps."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def moving_parameters(self) -> list[nn.Parameter]:
        """Those of them that the step at hand moves."""
        return self.trainable_parameters()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer steps, with peak learning rates."""
        return [{"params": self.trainable_parameters(), "lr": self.learning_rate}]

    def configure_optimizers(self) -> Any:
        if not self.trainable_parameters():
            raise UserError(f"base.name: nothing of {self.base.name} is trainable")
        if is_sharded(self) and self.optimizer_settings.name != "adamw":
            raise UserError(
                f"model.optimizer.name: {self.optimizer_settings.name} knows no sharded weights; set it to adamw, "
                "whose state is spread over the ranks too"
            )
        optimizer = self.optimizer_settings.build(self.parameter_groups())
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise UserError("trainer.max_epochs, trainer.max_steps: one of them must say how long the run is")
        return {"optimizer": optimizer, "lr_scheduler": self.schedule_settings.build(optimizer, int(steps))}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep trainable weights only: a LoRA run's checkpoint is megabytes."""
        kept = self.saved_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["base"] = self.base.address

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse what ``strict_loading=False`` would take for a checkpoint and load nothing, or a part, of.

        Raises:
            UserError: other trainable weights than this model's; or a run to be continued began from another version of
                its base (a run name means its newest), which would change the frozen weights and the reference.
        """
        fitting = self._trainer is not None and self.trainer.state.fn == TrainerFn.FITTING
        if fitting and checkpoint["base"] != self.base.address:
            raise UserError(
                f"--ckpt_path: this run began from {checkpoint['base']}, but model.base.name now means "
                f"{self.base.address}; name the first one to continue it"
            )
        saved, own = set(checkpoint["state_dict"]), self.saved_names()
        if saved != own:
            missing, strange = sorted(own - saved), sorted(saved - own)
            found = f"it lacks {missing[0]}" if missing else f"it holds {strange[0]}"
            raise UserError(
                f"--ckpt_path: the checkpoint is of another model or another base.lora: {found}, and "
                f"{len(missing) + len(strange) - 1} more names differ"
            )

    def saved_names(self) -> set[str]:
        """The weights that a checkpoint holds: those that move in training."""
        return {name for name, p in self.named_parameters(remove_duplicate=False) if p.requires_grad}

    # Evaluation

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Losses and metrics on held-out rows (none where the last batch is smaller than the number of ranks)."""
        self.prepare(batch)
        if len(batch) or is_sharded(self):
            reseed("validation", self.global_step, batch_idx, self.global_rank)
            self.evaluate(batch, "val")

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """The same on the test rows."""
        self.prepare(batch)
        if len(batch) or is_sharded(self):
            reseed("validation", self.global_step, batch_idx, self.global_rank)
            self.evaluate(batch, "test")

    def evaluate(self, batch: Any, stage: str) -> None:
        """Average the batch's numbers into the stage's, weighted by what the batch is counted in."""
        units = self.units(batch)
        totals: dict[str, Tensor] = {}
        for micro_batch in self.in_step(batch):
            for share in self.shares(micro_batch, units):
                self._add(totals, share)
        for name, total in totals.items():
            weight = units[self.metric_units.get(name, self.weight_of)]
            self.log_averages(stage, {name: total}, weight, batch_size=len(batch))

    def log_averages(self, stage: str, values: dict[str, Tensor], weight: Tensor, batch_size: int) -> None:
        """Log means over a whole evaluation, over all ranks."""
        for name, value in values.items():
            key = f"{stage}/{name}"
            if key not in self.averages:
                self.averages[key] = MeanMetric().to(self.device)
            average = self.averages[key]
            assert isinstance(average, MeanMetric)
            average.update(value, weight)
            shown = name == "loss" or name in self.progress_metrics
            self.log(key, average, prog_bar=shown, batch_size=batch_size, metric_attribute=f"averages.{key}")

    def average(self, key: str) -> Tensor:
        """The mean of an evaluation so far, over all ranks."""
        average = self.averages[key]
        assert isinstance(average, MeanMetric)
        return average.compute()

    def predict_step(self, batch: Any, batch_idx: int) -> list[dict[str, Any]]:
        """One record per row of the batch."""
        raise NotImplementedError


def require_no_dropout(base: Base, algorithm: str) -> None:
    """PPO, DPO and KTO compare log-probs of the same tokens in different passes: dropout would make them differ."""
    if base.lora and base.lora.dropout:
        raise UserError(f"base.lora.dropout: {algorithm} runs without dropout; set it to 0")
