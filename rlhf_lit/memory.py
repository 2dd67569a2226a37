"""``memory``: what a configuration needs, measured by the worst step it allows, before a run finds out by itself.

No data are read: the rows are random tokens, as long as the configuration lets them be. Everything else is the run's
own: its models, its precision, its optimizer, ``training_step``, and for PPO, RLOO and GRPO ``rollout``. Two optimizer
steps are made, the second with the optimizer's state in place, and the module is thrown away.

On CUDA the peaks are the allocator's. Elsewhere the bytes of live tensors are counted (``LiveBytes``), without what an
operation allocates inside itself.
"""

from __future__ import annotations

import gc
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Self

import psutil  # type: ignore[import-untyped]  # peft needs it too
import torch
from lightning import LightningDataModule
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_lit.algorithms.base import Algorithm
from rlhf_lit.algorithms.on_policy import SCORING_BUDGET, OnPolicy
from rlhf_lit.algorithms.ppo import PPO
from rlhf_lit.batches import PreferenceBatch, PromptBatch, Record, Sequences, SupervisedBatch
from rlhf_lit.cli import RunCLI
from rlhf_lit.cli import main as run_command
from rlhf_lit.cli_errors import Phase, is_out_of_memory, out_of_memory
from rlhf_lit.data.modules import PreferenceDataModule, RolloutDataModule, SFTDataModule, TextDataModule
from rlhf_lit.errors import UserError
from rlhf_lit.models.loading import context_length, unwrapped
from rlhf_lit.randomness import derive_seed, row_keys
from rlhf_lit.rollout.engine import Samples, sample
from rlhf_lit.rollout.rewards import RewardFromModel, RewardSource, RewardSum

# The second step finds the optimizer's state in place, and a rollout the first step's.
STEPS = 2
GIB = 2**30


# --- gauges ----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, by their storages, while it is in force.

    Every operation's results pass through ``__torch_dispatch__``; a storage is counted once, whatever looks at it
    (views, saved activations, gradients), until its memory is given back. Exact for what torch hands out as a tensor in
    this thread; blind to an operation's own scratch space, and to tensors made before unless they are shown to ``see``.

    Args:
        device: its type, for the name.

    Attributes:
        live, peak: bytes now, and at most since ``reset``.
    """

    def __init__(self, device: str = "cpu") -> None:
        super().__init__()
        self.name = f"{device} (tensors counted)"
        self.limit: int | None = None
        self._exceeded = False
        self.live = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}

    @property
    def room(self) -> int:
        """Bytes of the machine's memory that are free now."""
        return int(psutil.virtual_memory().available)

    def reset(self) -> None:
        """Forget the peak; what is alive stays counted."""
        self.peak = self.live

    def restrict(self, limit: int) -> None:
        """Raise as a full device does, once, when more than this was alive."""
        self.limit, self._exceeded = limit, False

    def see(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors that were made elsewhere.

        Raises:
            torch.OutOfMemoryError: more than the limit is alive.
        """
        for tensor in tensors:
            if tensor.device.type != "meta":
                self._count(tensor.untyped_storage())
        self.peak = max(self.peak, self.live)
        self._exceeded |= self.limit is not None and self.live > self.limit
        # Raised in the middle of a backward pass it would leave the graph behind: then it waits for the next operation.
        if self._exceeded and torch._C._current_graph_task_id() == -1:
            allowed, self.limit, self._exceeded = self.limit, None, False  # once: cleaning up needs a little too
            raise torch.OutOfMemoryError(f"more than the {allowed} bytes that are allowed were alive")

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._sizes:
            self._sizes[address] = 0
            # The Python object lives as long as its memory, also where only the autograd graph holds it.
            weakref.finalize(storage, self._forget, address).atexit = False
        self.live += size - self._sizes[address]  # a storage may have been resized since
        self._sizes[address] = size

    def _forget(self, address: int) -> None:
        self.live -= self._sizes.pop(address)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.see(leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


class CudaBytes:
    """The same of a CUDA device, from its allocator.

    Args:
        device: which.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = torch.cuda.get_device_name(device)

    def __enter__(self) -> Self:
        self.reset()
        return self

    def __exit__(self, *error: object) -> None:
        torch.cuda.empty_cache()

    @property
    def room(self) -> int:
        """Bytes of the whole device."""
        return torch.cuda.get_device_properties(self.device).total_memory

    @property
    def peak(self) -> int:
        """Bytes at most since ``reset``."""
        return torch.cuda.max_memory_allocated(self.device)

    def reset(self) -> None:
        """Forget the peak."""
        torch.cuda.reset_peak_memory_stats(self.device)

    def restrict(self, limit: int) -> None:
        """Let this process have no more than so many bytes, as if the card were smaller."""
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / self.room), self.device)

    def see(self, tensors: Iterable[Tensor]) -> None:
        """The allocator has seen them."""


Gauge = LiveBytes | CudaBytes


def tensors_of(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of all that a module holds: parameters, buffers, and the constants of 4-bit weights."""
    for name, parameter in module.named_parameters():
        yield name, parameter
        yield from ((name, constant) for constant in _constants(getattr(parameter, "quant_state", None)))
    yield from module.named_buffers()


def _constants(state: Any) -> Iterator[Tensor]:
    """The tensors of bitsandbytes' ``QuantState``, which holds another one where its constants are quantised too."""
    for value in vars(state).values() if state is not None else ():
        if isinstance(value, Tensor):
            yield value
        elif type(value) is type(state):
            yield from _constants(value)


# --- what is measured ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Held:
    """Bytes that stay from step to step.

    Attributes:
        weights: of all models: the base, and what stands beside it.
        adapters: LoRA matrices and scalar heads, of all roles.
        gradients: while a step accumulates; freed with it.
        optimizer: the optimizer's state.
    """

    weights: int
    adapters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.adapters + self.gradients + self.optimizer

    @classmethod
    def by(cls, module: nn.Module, optimizer: Optimizer) -> Held:
        """What a module and its optimizer hold at this moment; memory that two tensors share counts once."""
        seen: set[int] = set()

        def size(tensors: Iterable[Tensor]) -> int:
            storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
            fresh = storages.keys() - seen
            seen.update(fresh)
            return sum(storages[address] for address in fresh)

        state = [x for slot in optimizer.state.values() for x in tree_leaves(slot) if isinstance(x, Tensor)]
        return cls(
            weights=size(tensor for name, tensor in tensors_of(module) if not _is_added(name)),
            adapters=size(tensor for name, tensor in tensors_of(module) if _is_added(name)),
            gradients=size(p.grad for p in module.parameters() if p.grad is not None),
            optimizer=size(state),
        )


def _is_added(name: str) -> bool:
    """Whether a tensor came with LoRA or is a head."""
    return any(part.startswith("lora_") or part in ("heads", "modules_to_save") for part in name.split("."))


class Measurement:
    """The peaks of one worst-case run, phase by phase.

    Attributes:
        phase: the one that is under way.
        peaks: bytes at most, by phase, in the order in which they came.
        held: what stays; None until an optimizer step was reached.
        fits: whether memory sufficed; if not, ``phase`` is the one in which it ran out.
    """

    def __init__(self, gauge: Gauge) -> None:
        self.gauge = gauge
        self.phase: Phase = "load"
        self.peaks: dict[Phase, int] = {}
        self.held: Held | None = None
        self.fits = True
        gauge.reset()

    def enter(self, phase: Phase) -> None:
        """The phase under way ends, and another begins."""
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.gauge.peak)
        self.gauge.reset()
        self.phase = phase

    @property
    def peak(self) -> int:
        """Of all phases after loading."""
        return max(size for phase, size in self.peaks.items() if phase != "load")


class _Watch(Callback):
    """Tells a measurement where the trainer stands."""

    def __init__(self, measurement: Measurement, limit: int) -> None:
        self.measurement = measurement
        self.limit = limit

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The models are loaded: now they count, those that other threads read from disk too."""
        gauge = self.measurement.gauge
        gauge.restrict(self.limit)
        gauge.see(tensor for _, tensor in tensors_of(pl_module))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """After a rollout, if there was one."""
        self.measurement.enter("update")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Gradients are complete; from the second step on there is state too."""
        self.measurement.held = Held.by(pl_module, optimizer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last phase's peak."""
        self.measurement.enter(self.measurement.phase)


# --- the worst step --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A micro-batch: rows (or pairs) of one length, in tokens."""

    rows: int
    length: int


def worst_shapes(length: int, sides: int, budget: int, rows: int) -> list[Shape]:
    """The two micro-batches that need most: of the longest rows, then the fullest, with gradients already in place.

    Args:
        length: of the longest row.
        sides: 2 for pairs.
        budget: padded tokens of a micro-batch.
        rows: of the whole batch.
    """
    longest = Shape(max(1, budget // (sides * length)), length)
    if rows <= longest.rows:
        return [Shape(rows, length)]
    more = longest.rows + 1
    fuller = Shape(more, budget // (sides * more))
    second = fuller if fuller.rows * fuller.length > longest.rows * length and fuller.length > 1 else longest
    return [longest, Shape(min(second.rows, rows - longest.rows), second.length)]


def _sequences(lengths: list[int], vocabulary: int) -> Sequences:
    """Random tokens, every one but the first supervised."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(vocabulary, (length,), generator=generator).tolist() for length in lengths]
    return Sequences.pad(tokens, [[False] + [True] * (length - 1) for length in lengths])


class WorstCase(LightningDataModule):
    """Random rows as long as a configuration allows, in as few micro-batches as set the peak.

    Args:
        module: the algorithm; its models need not be there yet.
        data: the configuration's data module, of which only the settings are read.
        budget: padded tokens of a micro-batch.
        measurement: is told when a rollout samples and when it scores.

    Raises:
        UserError: a data module or an algorithm of a kind that is not known here.
    """

    def __init__(self, module: Algorithm, data: TextDataModule, budget: int, measurement: Measurement) -> None:
        super().__init__()
        kinds = (SFTDataModule, PreferenceDataModule, RolloutDataModule)
        if not isinstance(data, kinds) or isinstance(data, RolloutDataModule) != isinstance(module, OnPolicy):
            raise UserError(f"data: memory does not know what {type(module).__name__} makes of {type(data).__name__}")
        self.module = module
        self.data = data
        self.budget = budget
        self.measurement = measurement

    @property
    def samples_per_prompt(self) -> int:
        """As configured; RLOO and GRPO ask for it."""
        return self.data.samples_per_prompt if isinstance(self.data, RolloutDataModule) else 1

    @property
    def sides(self) -> int:
        """Sequences of one row."""
        return 2 if isinstance(self.data, PreferenceDataModule) else 1

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: prompt and response, as far as the model's context reaches."""
        answer = self.module.sampling.max_new_tokens if isinstance(self.module, OnPolicy) else 0
        length = self.data.max_length + answer
        return min(length, context_length(self._model) or length)

    @property
    def row_tokens(self) -> int:
        """Padded tokens of the longest row, both sides of a pair counted."""
        return self.sides * self.longest

    @property
    def useful_rows(self) -> int:
        """Rows beyond which a larger micro-batch changes nothing: all of them are in it."""
        if not isinstance(self.data, RolloutDataModule):
            return self.data.batch_size
        return max(self.data.batch_size, -(-self._rollout_rows // SCORING_BUDGET))

    @property
    def _model(self) -> nn.Module:
        module: Any = self.module
        return module.roles.policy if hasattr(module, "roles") else module.scorer

    @property
    def _vocabulary(self) -> int:
        return int(unwrapped(self._model).config.get_text_config().vocab_size)

    @property
    def _rollout_rows(self) -> int:
        assert isinstance(self.data, RolloutDataModule)
        return self.data.rollout_size * self.data.samples_per_prompt

    def train_dataloader(self) -> _Steps:
        return _Steps(self.batch)

    def batches_in_order(self, limit: int) -> Iterator[Record]:
        """What a reward model is centred on."""
        yield self.batch(0)

    def batch(self, step: int) -> Record:
        """What one optimizer step sees; made by a rollout where the algorithm learns from its own samples."""
        shapes = worst_shapes(self.longest, self.sides, self.budget, self.data.batch_size)
        if isinstance(self.module, OnPolicy):
            return self._experience(self.module, shapes, step)
        rows = _sequences([shape.length for shape in shapes for _ in range(shape.rows)], self._vocabulary)
        if isinstance(self.data, PreferenceDataModule):
            return PreferenceBatch(rows, rows, torch.zeros(len(rows)), self.budget)
        return SupervisedBatch(rows, self.budget)

    def _experience(self, module: OnPolicy, shapes: list[Shape], step: int) -> Record:
        """A rollout of enough rows to fill a sampling batch, a scoring pass and the update's micro-batches."""
        room = module.sampling.max_new_tokens
        if self.longest <= room:
            raise UserError(f"model.sampling.max_new_tokens: {room} leave no room for a prompt in the model's context")
        scored = SCORING_BUDGET * self.budget // self.longest
        full = max(shapes[0].rows, min(self._rollout_rows, max(scored, module.sampling.rows_at_once)))
        others = [shape for shape in shapes[1:] if shape.length > room]
        lengths = [self.longest] * full + [shape.length for shape in others for _ in range(shape.rows)]
        lengths += [self.longest] * (-len(lengths) % self.samples_per_prompt)
        prompts = _sequences([length - room for length in lengths], self._vocabulary)
        numbers = torch.arange(len(lengths))
        index, sample = numbers // self.samples_per_prompt, numbers % self.samples_per_prompt
        nothing: tuple[dict[str, Any], ...] = ({},) * len(lengths)
        batch = PromptBatch(prompts, index, sample, ("",) * len(lengths), nothing, self.budget)
        assert self.trainer is not None
        with self.trainer.precision_plugin.forward_context():
            experience = module.rollout(batch.to(module.device), step).to("cpu")
        update = [*range(shapes[0].rows), *range(full, full + sum(shape.rows for shape in others))]
        return experience.select(torch.tensor(update))


class _Steps:
    """A sized loader, whose batches are made when they are asked for."""

    def __init__(self, make: Callable[[int], Record]) -> None:
        self.make = make

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Iterator[Record]:
        for step in range(STEPS):
            yield self.make(step)


def _prepare(module: Algorithm, measurement: Measurement) -> None:
    """Make every response as long as it may be, the critic's warm-up over, and functions score without their data."""
    if isinstance(module, PPO):
        module.critic = replace(module.critic, warmup=0)
    if not isinstance(module, OnPolicy):
        return

    def respond(prompts: PromptBatch, stream: int = 0) -> Samples:
        measurement.enter("rollout")
        keys = row_keys(derive_seed("sampling", stream), prompts.index, prompts.sample)
        with module.roles.acting("policy") as model:
            never = int(unwrapped(model).config.get_text_config().vocab_size)  # past the last token: is never drawn
            samples = sample(model, prompts.prompts, keys, module.sampling, (never,))
        measurement.enter("score")
        return samples

    module.respond = respond  # type: ignore[method-assign]
    for source in module.reward.modules():
        is_model = isinstance(source, RewardFromModel | RewardSum) or any(True for _ in source.parameters())
        if isinstance(source, RewardSource) and not is_model:
            source.forward = _no_score  # type: ignore


def _no_score(sequences: Sequences, *rest: object) -> Tensor:
    """What a function would return, whose rows are not read here."""
    return torch.zeros(len(sequences), device=sequences.tokens.device)


# --- measuring -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """Where and how a worst case is carried out.

    Attributes:
        accelerator, precision: as the trainer takes them.
        limit: bytes that may be in use; None is all of a GPU, or what is free of the host's.
    """

    accelerator: str = "auto"
    precision: Any = None
    limit: int | None = None


class Bench:
    """A module and its data's settings, measured at one micro-batch size after another.

    Args:
        module: the algorithm; it is of no use for training afterwards.
        data: the data module, of which only the settings are read.
        machine: where to measure.
    """

    def __init__(self, module: Algorithm, data: TextDataModule, machine: Machine) -> None:
        self.module = module
        self.data = data
        self.machine = machine
        # Threads of their own would load weights past the counter.
        os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"
        device = self.trainer([]).strategy.root_device
        self.gauge: Gauge = CudaBytes(device) if device.type == "cuda" else LiveBytes(device.type)
        self.limit = self.gauge.room if machine.limit is None else machine.limit

    def trainer(self, callbacks: list[Callback]) -> Trainer:
        return Trainer(
            accelerator=self.machine.accelerator,
            devices=1,
            precision=self.machine.precision,
            max_steps=STEPS,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            inference_mode=False,
        )

    def measure(self, budget: int) -> Measurement:
        """The worst case at ``budget`` padded tokens per micro-batch."""
        with self.gauge:
            measurement = Measurement(self.gauge)
            _prepare(self.module, measurement)
            worst = WorstCase(self.module, self.data, budget, measurement)
            try:
                self.trainer([_Watch(measurement, self.limit)]).fit(self.module, datamodule=worst)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                measurement.fits = False
                measurement.enter(measurement.phase)
        # Out here the traceback, which held the step's tensors, is gone; the trainer holds the optimizer's state.
        del worst
        self.module.trainer = None
        self.module.zero_grad(set_to_none=True)
        gc.collect()
        return measurement

    def worst(self, budget: int) -> WorstCase:
        """The rows of a measurement at ``budget``, to be asked about once the models are built."""
        return WorstCase(self.module, self.data, budget, Measurement(self.gauge))

    def largest(self, first: Measurement, budget: int) -> tuple[int, Measurement]:
        """The largest micro-batch that fits: exact up to 8 of the longest rows, then to an eighth.

        Args:
            first: what was measured at ``budget``.
            budget: padded tokens per micro-batch.

        Returns:
            Padded tokens per micro-batch, and what was measured with them.

        Raises:
            OutOfMemory: not even one row fits, or memory runs out where micro-batches have no say.
        """
        if not first.fits and first.phase in ("load", "rollout"):
            raise OutOfMemory(first.phase)
        worst = self.worst(budget)
        useful = worst.useful_rows
        rows = min(useful, max(1, budget // worst.row_tokens))
        failed = None if first.fits else rows
        most, best, fitting = (budget, first, rows) if first.fits else (0, None, 0)
        while (failed or useful + 1) - fitting > max(1, fitting // 8 if failed else 1):
            trial = min(2 * fitting, useful) if failed is None else (fitting + failed) // 2
            found = self.measure(trial * worst.row_tokens)
            if found.fits:
                most, best, fitting = trial * worst.row_tokens, found, trial
            else:
                failed = trial
        if best is None:
            raise OutOfMemory(first.phase)
        return most, best


class OutOfMemory(Exception):
    """Nothing fits.

    Args:
        phase: in which memory ran out.
    """

    def __init__(self, phase: Phase) -> None:
        super().__init__(phase)
        self.phase = phase


# --- the command -----------------------------------------------------------------------------------------------------


class MemoryCLI(RunCLI):
    """``fit``'s command line, which measures instead of training and writes nothing."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One key more than ``fit`` has."""
        super().add_arguments_to_parser(parser)
        parser.add_argument(
            "--limit_gb",
            type=float | None,
            default=None,
            help="Search as if the device had this many GiB (null: what it has; on a CPU, what is free now).",
        )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Where to measure is all that is taken of the trainer's settings; no folder is made."""
        settings = self._get(self.config_init, "trainer")
        wanted = self.config[self.subcommand].limit_gb
        if wanted is not None and not wanted > 0:
            raise UserError(f"limit_gb must be greater than 0 or null, not {wanted}")
        machine = Machine(settings.accelerator, settings.precision, None if wanted is None else round(wanted * GIB))
        self.bench = Bench(self.model, self.datamodule, machine)
        return self.bench.trainer([])

    def _run_subcommand(self, subcommand: str) -> None:
        budget = self.datamodule.micro_batch_tokens
        first = self.bench.measure(budget)
        show(self.bench, first, budget)
        try:
            most, found = self.bench.largest(first, budget)
        except OutOfMemory as full:
            config = self.config[subcommand]
            config.data.init_args.micro_batch_tokens = 1  # the search has been there
            raise UserError(out_of_memory(full.phase, config)) from None
        print(verdict(self.bench, most, found))


def show(bench: Bench, found: Measurement, budget: int) -> None:
    """What was measured: a peak for each phase, and what stays."""
    from rich.console import Console
    from rich.table import Table

    worst = bench.worst(budget)
    lines: list[tuple[str, int]] = [(f"peak, {_PHASES[phase]}", size) for phase, size in found.peaks.items()]
    if held := found.held:
        lines += [
            ("held: weights", held.weights),
            ("held: adapters and heads", held.adapters),
            ("held: gradients, within a step", held.gradients),
            ("held: optimizer state", held.optimizer),
        ]
    table = Table.grid(padding=(0, 2))
    table.add_column()
    table.add_column(justify="right")
    for name, size in lines:
        table.add_row(name, in_words(size))
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{type(bench.module).__name__} on {bench.gauge.name}: rows of {worst.longest} tokens, "
        f"micro-batches of {budget} tokens"
    )
    console.print(table)


_PHASES: dict[Phase, str] = {
    "load": "loading",
    "rollout": "rollout (sampling)",
    "score": "score pass",
    "update": "update",
}


def verdict(bench: Bench, most: int, found: Measurement) -> str:
    """The line that the search ends with."""
    worst = bench.worst(most)
    whole = most // worst.row_tokens >= worst.useful_rows
    return (
        f"largest data.micro_batch_tokens within {in_words(bench.limit)}: {most}"
        + (" (the whole batch at once; more changes nothing)" if whole else "")
        + f", peak {in_words(found.peak)}"
    )


def in_words(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / 2**20:.1f} MiB"


def main(argv: list[str]) -> int:
    """Run ``memory``. Raises as ``fit`` does."""
    warnings.filterwarnings("ignore", message="You defined a `validation_step` but have no")
    return run_command(["fit", *argv], MemoryCLI)
