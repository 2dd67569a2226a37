"""The worst step that a configuration allows, as rows of random tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from lightning import LightningDataModule
from torch import Tensor, nn

from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.algorithms.offline import OfflineAlgorithm
from rlhf_lit.algorithms.on_policy import OnPolicy
from rlhf_lit.batches import Batch, PromptBatch, Record, Sequences
from rlhf_lit.batches.micro_batches import SCORING_BUDGET
from rlhf_lit.data.modules import RolloutDataModule, TextDataModule
from rlhf_lit.errors import UserError
from rlhf_lit.memory.measurement import Measurement
from rlhf_lit.models.anatomy import context_length, unwrapped
from rlhf_lit.randomness import derive_seed, row_keys
from rlhf_lit.rollout.engine import Samples, sample
from rlhf_lit.rollout.rewards import RewardFromModel, RewardSource, RewardSum

# The second step finds the optimizer's state in place, and a rollout the first step's.
STEPS = 2


@dataclass(frozen=True)
class Shape:
    """A micro-batch: rows (or pairs, or lists of answers) of one length, in tokens."""

    rows: int
    length: int


def worst_shapes(length: int, sides: int, budget: int, rows: int) -> list[Shape]:
    """The two micro-batches that need most: of the longest rows, then the fullest, with gradients already in place.

    Args:
        length: of the longest row.
        sides: 2 for pairs, of ranked lists the most answers that one may have.
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


def _answer(length: int, vocabulary: int, generator: torch.Generator) -> tuple[list[int], list[bool]]:
    """Random tokens, every one but the first supervised."""
    return torch.randint(vocabulary, (length,), generator=generator).tolist(), [False] + [True] * (length - 1)


class WorstCase(LightningDataModule):
    """Random rows as long as a configuration allows, in as few micro-batches as set the peak.

    Args:
        module: the algorithm; its models need not be there yet.
        data: the configuration's data module, of which only the settings are read.
        budget: padded tokens of a micro-batch.
        measurement: is told when a rollout samples and when it scores.

    Raises:
        UserError: one of the two is on-policy, and the other is not.
    """

    def __init__(self, module: Algorithm, data: TextDataModule, budget: int, measurement: Measurement) -> None:
        super().__init__()
        if isinstance(data, RolloutDataModule) != isinstance(module, OnPolicy):
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
        return self.data.answers_per_row

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence: prompt and response, as far as the model's context reaches."""
        answer = self.module.sampling.limit if isinstance(self.module, OnPolicy) else 0
        length = self.data.max_length + answer
        return min(length, context_length(self._model) or length)

    @property
    def row_tokens(self) -> int:
        """Padded tokens of the longest row, both sides of a pair and all answers of a list counted."""
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

    def batch(self, step: int) -> Batch:
        """What one optimizer step sees; made by a rollout where the algorithm learns from its own samples."""
        shapes = worst_shapes(self.longest, self.sides, self.budget, self.data.batch_size)
        if isinstance(self.module, OnPolicy):
            return self._experience(self.module, shapes, step)
        generator = torch.Generator().manual_seed(0)
        # Answers that begin differently: no prompt to share, which is the most that a row may need.
        rows = [
            self.data.row_of([_answer(shape.length, self._vocabulary, generator) for _ in range(self.sides)])
            for shape in shapes
            for _ in range(shape.rows)
        ]
        batch: Any = self.data.collate(rows)
        return replace(batch, micro_batch_tokens=self.budget)

    def _experience(self, module: OnPolicy, shapes: list[Shape], step: int) -> Batch:
        """A rollout of enough rows to fill a sampling batch, a scoring pass and the update's micro-batches."""
        room = module.sampling.limit
        if module.sampling.max_new_tokens is None:  # what the context leaves after one token
            room = min(room, self.longest - 1)
            module.sampling = replace(module.sampling, max_new_tokens=room)
        if self.longest <= room:
            raise UserError(f"model.sampling.max_new_tokens: {room} leave no room for a prompt in the model's context")
        scored = SCORING_BUDGET * self.budget // self.longest
        full = max(shapes[0].rows, min(self._rollout_rows, max(scored, module.sampling.rows_at_once)))
        others = [shape for shape in shapes[1:] if shape.length > room]
        lengths = [self.longest] * full + [shape.length for shape in others for _ in range(shape.rows)]
        lengths += [self.longest] * (-len(lengths) % self.samples_per_prompt)
        generator = torch.Generator().manual_seed(0)
        answers = [_answer(length - room, self._vocabulary, generator) for length in lengths]
        prompts = Sequences.pad([tokens for tokens, _ in answers], [mask for _, mask in answers])
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


def prepare(module: Algorithm, measurement: Measurement) -> None:
    """Make every response as long as it may be, the critic's warm-up over, a reference computed beforehand gone,
    and functions score without their data."""
    with_critic: Any = module
    if hasattr(module, "critic"):
        with_critic.critic = replace(with_critic.critic, warmup=0)
    if isinstance(module, OfflineAlgorithm) and module.reference.precompute:
        module.reference, module.compares = replace(module.reference, precompute=False, complete=False), False
    if not isinstance(module, OnPolicy):
        return
    if module.vllm is not None:
        raise UserError(
            "model.vllm: vLLM takes the share that model.vllm.gpu_memory_utilization names; measure the rest with "
            "model.vllm null"
        )

    def respond(prompts: PromptBatch, stream: int = 0) -> Samples:
        measurement.enter("rollout")
        keys = row_keys(derive_seed("sampling", stream), prompts.index, prompts.sample)
        with module.roles.acting("policy") as model:
            never = int(unwrapped(model).config.get_text_config().vocab_size)  # past the last token: is never drawn
            samples = sample(model, prompts.prompts, keys, module.sampling, (never,))
        measurement.enter("score")
        return samples

    module.respond = respond  # type: ignore[method-assign, assignment]
    for source in module.reward.modules():
        is_model = isinstance(source, RewardFromModel | RewardSum) or any(True for _ in source.parameters())
        if isinstance(source, RewardSource) and not is_model:
            source.forward = _no_score  # type: ignore


def _no_score(sequences: Sequences, *rest: object) -> Tensor:
    """What a function would return, whose rows are not read here."""
    return torch.zeros(len(sequences), device=sequences.tokens.device)
