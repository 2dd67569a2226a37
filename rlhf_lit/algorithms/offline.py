"""What DPO and KTO share: a policy that learns from answers in a file, and the reference it is held to.

The reference π₀ is the base as it was loaded: the adapters off with fresh LoRA, a frozen copy otherwise. Its log-probs
of a row depend on nothing that a sweep varies, so they may be computed once and read from a cache by every run
(``rlhf_lit.reference_cache``); or the reference may follow the policy (TR-DPO).

Left out: a reference from another model than the base.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from rlhf_lit.algorithms.algorithm import Algorithm, Optimizer, Schedule
from rlhf_lit.algorithms.policy import Writer
from rlhf_lit.batches import PromptBatch, Record, Sequences
from rlhf_lit.batches.micro_batches import SCORING_BUDGET
from rlhf_lit.errors import UserError, say
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.base import Base, require_no_dropout
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.roles import Roles
from rlhf_lit.parallel.sharding import sharding_of
from rlhf_lit.rollout.engine import Sampling

if TYPE_CHECKING:
    from rlhf_lit.reference_cache.store import ReferenceCache


@dataclass(frozen=True)
class ReferenceUpdate:
    """The reference follows the policy: π₀ ← mix·π + (1 − mix)·π₀ on the weights, every so many optimizer steps.

    TR-DPO, Gorbatovski et al. 2024, arXiv 2404.09656: `mix: 1` is its hard update, `every: 1` its soft one.

    With LoRA the adapter's two factors are mixed each for itself, which for `mix` below 1 only approximates mixing the
    updates they stand for; `mix: 1` is exact.

    Args:
        every: optimizer steps between updates.
        mix: α in (0, 1], the policy's share.
    """

    every: int
    mix: float = 1.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"reference.update.every must be at least 1 step, not {self.every}")
        if not 0 < self.mix <= 1:
            raise ValueError(f"reference.update.mix must lie in (0, 1], not {self.mix}")


@dataclass(frozen=True)
class Reference:
    """The reference π₀.

    Args:
        free: no reference: log π₀ counts as 0, and nothing holds the policy back but the loss itself.
        precompute: its log-probs are computed before the first step, or found in the cache, and no reference is run or
            held in memory while training.
        complete: with `precompute`, refuse to start unless the cache holds every row already, where the arms of a sweep
            must not compute it each for itself.
        cache: folder of the cache. Changes no result.
        update: let it follow the policy; null keeps it as it is.
    """

    free: bool = False
    precompute: bool = False
    complete: bool = False
    cache: str = "~/.cache/rlhf_lit"
    update: ReferenceUpdate | None = None

    def __post_init__(self) -> None:
        if self.free and (self.precompute or self.update):
            raise UserError("reference.free: without a reference there is none to precompute or update")
        if self.precompute and self.update:
            raise UserError("reference.precompute: a reference that moves has no log-probs to keep; set it to false")
        if self.complete and not self.precompute:
            raise UserError("reference.complete asks for a complete cache, which reference.precompute: true reads")


class OfflineAlgorithm(Writer, Algorithm):
    """A policy that learns from the answers of a data file, held to a reference.

    Args:
        base, learning_rate, optimizer, schedule, sampling: see ``Algorithm`` and ``Writer``.
        reference: see ``Reference``.
        compares: whether the loss reads the reference's log-probs at all.
    """

    def __init__(
        self,
        base: Base,
        reference: Reference,
        compares: bool,
        learning_rate: float,
        optimizer: Optimizer,
        schedule: Schedule,
        sampling: Sampling,
    ) -> None:
        super().__init__(base, learning_rate, optimizer, schedule)
        self.sampling = sampling
        require_no_dropout(base, type(self).__name__)
        self.reference = reference
        self.compares = compares and not reference.free
        self.cache: ReferenceCache | None = None  # of the reference's log-probs, once they were computed beforehand

    def build(self) -> None:
        self.roles = Roles(self.base)
        if not self.compares:
            if self.reference.precompute:  # as for one loss of a sweep over several
                say("reference: none is read; nothing to compute beforehand")
            return
        if not self.reference.precompute or self.trainer.state.fn == TrainerFn.PREDICTING:
            self.roles.add_reference(own=self.reference.update is not None)
            return
        if self.roles.shared:  # an adapter at most; whole models are copied where they are needed
            self.roles.add_reference()
        self.cache = self._open_cache()
        rows = self._rows_to_compare()
        if self.reference.complete:
            self.cache.require(rows)
        # One decision for all ranks: they will compute what is missing together.
        if self.trainer.strategy.broadcast(not self.cache.missing(rows)):
            say(f"reference: all {len(rows)} responses are in {self.cache.folder}; no reference pass")
            self.roles.drop_reference()
        elif not self.roles.shared:
            self.roles.add_reference()

    def set_train_mode(self) -> None:
        self.roles.without_dropout()

    # The reference's log-probs

    @property
    def runs_reference(self) -> bool:
        """Whether a reference model is there to be asked."""
        return self.compares and self.roles.has_reference

    def reference_sums(self, sequences: Sequences, known: Tensor | None) -> Tensor:
        """[rows] Σ_t log π₀(y_t) over the response, without a gradient; 0 where there is no reference.

        Args:
            sequences: prompt + response, the mask on the response.
            known: [rows, time] per-token log-probs, where they were computed beforehand.
        """
        if not self.compares:
            return torch.zeros(len(sequences), device=sequences.tokens.device)
        if known is None:
            with torch.no_grad(), self.roles.acting("reference") as model:
                known = token_logprobs(model, sequences)
        return row_sums(known, sequences.mask)

    def with_reference(self, batch: Any, logprobs: Callable[[Sequences], Tensor]) -> Record:
        """A batch of the kind it learns from, with the reference's log-probs of its responses.

        Args:
            batch: on the CPU.
            logprobs: what finds them: sequences → [rows, time].
        """
        raise NotImplementedError

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Add what the cache knows, while the batch is still on the CPU. Prompts have nothing to compare."""
        if self.cache is None or isinstance(batch, PromptBatch):
            return batch
        return self.with_reference(batch, self.cache.read)

    def known_logprobs(self, sequences: Sequences) -> Tensor:
        """[rows, time] the cache's log-probs of responses, on their device."""
        assert self.cache is not None
        return self.cache.read(sequences.to("cpu")).to(sequences.tokens.device)

    def value_at_start(self, batch: Any) -> float | None:
        """A batch's loss while policy = reference; None where that is not known."""
        raise NotImplementedError

    def on_fit_start(self) -> None:
        self._precompute()
        super().on_fit_start()

    def on_validation_start(self) -> None:
        self._precompute()

    def on_test_start(self) -> None:
        self._precompute()

    def _open_cache(self) -> ReferenceCache:
        from rlhf_lit.reference_cache.identity import identify
        from rlhf_lit.reference_cache.store import ReferenceCache  # with Arrow, which a wrong key need not wait for

        role = "reference" if self.roles.has_reference else "policy"  # they are the same model still
        with self.trainer.precision_plugin.forward_context(), self.roles.acting(role) as model:
            return ReferenceCache(self.reference.cache, identify(model))

    def _rows_to_compare(self) -> list[tuple[list[int], list[bool]]]:
        """Tokens and masks of all responses that this run will compare.

        Raises:
            UserError: the rows come from loaders of the caller's own.
        """
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        if datamodule is None or not hasattr(datamodule, "responses"):
            raise UserError("reference.precompute: needs a data module of ours, whose rows are known beforehand")
        return list(datamodule.responses())

    @torch.no_grad()
    def _precompute(self) -> None:
        """Fill the cache, and let the reference go."""
        if self.cache is None or not self.roles.has_reference:
            return
        datamodule: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        rows = self._rows_to_compare()
        training = {name: module.training for name, module in self.named_modules()}
        self.eval()

        def compute(sequences: Sequences) -> Tensor:
            return token_logprobs(model, sequences.to(self.device)).cpu()

        context = self.trainer.precision_plugin.forward_context()
        with (
            context,
            self.roles.acting("reference") as model,
            sharding_of(model).whole(),
        ):  # each rank computes rows of its own
            self.cache.build(
                rows,
                compute,
                SCORING_BUDGET * datamodule.micro_batch_tokens,
                self.global_rank,
                self.trainer.world_size,
                self.trainer.strategy.barrier,
            )
        for name, module in self.named_modules():
            module.training = training[name]
        self.roles.drop_reference()

    # A reference that follows the policy

    def training_step(self, batch: Any, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        update = self.reference.update
        if update and self.global_step % update.every == 0:
            self.roles.move_reference(update.mix)

    def saved_names(self) -> set[str]:
        """A reference that moves is part of the run's state."""
        moving = self.roles.reference_pairs() if self.reference.update else ()
        return super().saved_names() | {f"roles.{name}" for name, _, _ in moving}
