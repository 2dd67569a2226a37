"""What is in memory when: the byte counter by hand, the worst step, and the discipline that keeps PPO small."""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning.pytorch import Trainer
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))  # experiments are not part of the installed package

from experiments.benchmarks.memory import run
from rlhf_lit.algorithms import DPO, SFT
from rlhf_lit.batches import ExperienceBatch, PromptBatch
from rlhf_lit.data.modules import PreferenceDataModule, RolloutDataModule, SFTDataModule
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.memory.bench import Bench, Machine
from rlhf_lit.memory.gauges import LiveBytes
from rlhf_lit.memory.measurement import Held, Measurement
from rlhf_lit.memory.worst_case import Shape, WorstCase, worst_shapes
from rlhf_lit.models import logprobs
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.packing import without_sharing
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.loop import RolloutLoader

# --- the counter, by hand --------------------------------------------------------------------------------------------


def test_a_tensor_counts_while_it_or_a_view_of_it_lives() -> None:
    with LiveBytes() as counter:
        whole = torch.zeros(1000)
        assert counter.live == 4000
        view = whole[10:].view(9, 110)
        assert counter.live == 4000
        del whole
        assert counter.live == 4000
        del view
        assert counter.live == 0
    assert counter.peak == 4000


def test_the_peak_of_a_sum() -> None:
    """a and b, 400 bytes each; a + b makes 400 more; then the sum of it 4 more."""
    with LiveBytes() as counter:
        a, b = torch.ones(100), torch.ones(100)
        counter.reset()
        total = (a + b).sum()
        assert counter.live == 804
        assert counter.peak == 1204
        counter.reset()
        assert counter.peak == 804
    assert float(total) == 200


def test_what_a_backward_pass_keeps_counts() -> None:
    """Linear (no bias) and exp: exp's result is kept for the backward pass, Linear's is not."""
    with LiveBytes() as counter:
        layer = nn.Linear(100, 100, bias=False)
        x = torch.ones(50, 100)
        assert counter.live == 40_000 + 20_000
        loss = layer(x).exp().sum()
        gc.collect()
        assert counter.live == 40_000 + 20_000 + 20_000 + 4
        loss.backward()
        del loss
        assert counter.live == 40_000 + 20_000 + 40_000  # the gradient of the weight has come, the activations gone
        layer.zero_grad()
        assert counter.live == 40_000 + 20_000


def test_nothing_is_kept_without_a_gradient() -> None:
    layer = nn.Linear(100, 100, bias=False)
    x = torch.ones(50, 100)
    with LiveBytes() as counter, torch.no_grad():
        total = layer(x).exp().sum()
        gc.collect()
        assert counter.live == 40_000 + 4  # the weight was seen as an operation's result, its transpose
        assert counter.peak == 40_000 + 40_000  # Linear's result beside exp's
    assert total.item() > 0


def test_a_storage_that_grows_is_counted_anew() -> None:
    with LiveBytes() as counter:
        x = torch.zeros(10)
        x.resize_(1000)
        assert counter.live == 4000


def test_tensors_of_before_count_once_they_are_seen() -> None:
    x = torch.zeros(1000)
    counter = LiveBytes()
    counter.see([x, x[:10], torch.empty(5, device="meta")])
    assert counter.live == 4000
    del x
    assert counter.live == 0


def test_the_limit_is_a_full_device_once() -> None:
    with LiveBytes() as counter:
        counter.restrict(4000)
        kept = torch.zeros(1000)
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(1)
        assert len(torch.zeros(1000)) == len(kept)


# --- the worst step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "sides", "budget", "rows", "expected"),
    [
        (768, 1, 8192, 64, [Shape(10, 768), Shape(11, 744)]),  # 7680 tokens, then 8184
        (768, 1, 7680, 64, [Shape(10, 768), Shape(10, 768)]),  # already full
        (768, 1, 100, 64, [Shape(1, 768), Shape(1, 768)]),  # a single row is longer than the budget
        (768, 2, 8192, 64, [Shape(5, 768), Shape(6, 682)]),
        (768, 1, 8192, 10, [Shape(10, 768)]),  # the whole batch
        (768, 1, 8192, 12, [Shape(10, 768), Shape(2, 744)]),
    ],
)
def test_worst_shapes(length: int, sides: int, budget: int, rows: int, expected: list[Shape]) -> None:
    assert worst_shapes(length, sides, budget, rows) == expected


def bench(module: Any, data: Any, limit: int | None = None) -> Bench:
    return Bench(module, data, Machine("cpu", "32-true", limit))


def test_what_is_held_is_what_the_numbers_of_weights_say(llama: str) -> None:
    """Full fine-tuning in float32: 4 bytes a weight, as many for its gradient, twice as many for Adam."""
    module = SFT(Base(name=llama))
    found = bench(module, SFTDataModule(batch_size=4, max_length=16)).measure(32)
    count = sum(p.numel() for p in module.parameters())
    buffers = sum(buffer.nbytes for buffer in module.buffers())
    steps = 4 * len(list(module.parameters()))  # Adam's count of steps, one for each tensor
    assert found.held == Held(4 * count + buffers, 0, 4 * count, 8 * count + steps)
    assert found.peak > found.held.total
    assert list(found.peaks) == ["load", "update"]


# --- the discipline --------------------------------------------------------------------------------------------------

LENGTH, ROWS = 64, 4


def make(kind: str, folder: str, lora: LoRA | None = LoRA(rank=2)) -> Any:
    """An algorithm on a model in a folder."""
    base = Base(name=folder, lora=lora)
    if kind == "SFT":
        return SFT(base)
    if kind == "DPO":
        return DPO(base, DPOLoss(0.1))
    return tiny.make_ppo(base, sampling=Sampling(max_new_tokens=LENGTH // 2, rows_at_once=ROWS))


def peaks(kind: str, folder: str, lora: LoRA | None = LoRA(rank=2)) -> tuple[dict[str, int], Held]:
    """Peaks of the phases after loading; one micro-batch of four rows of 64 tokens (two pairs)."""
    data = {
        "SFT": lambda: SFTDataModule(batch_size=ROWS, max_length=LENGTH),
        "DPO": lambda: PreferenceDataModule(batch_size=ROWS // 2, max_length=LENGTH),
        "PPO": lambda: RolloutDataModule(batch_size=ROWS, rollout_size=ROWS, max_length=LENGTH // 2),
    }[kind]()
    found = bench(make(kind, folder, lora), data).measure(ROWS * LENGTH)
    assert found.held is not None
    return {str(phase): size for phase, size in found.peaks.items() if phase != "load"}, found.held


def growth(kind: str, small: str, large: str) -> dict[str, int]:
    """By phase, what a larger model needs more beside what it holds more (gradients in the update alone)."""
    (before, held_before), (after, held_after) = peaks(kind, small), peaks(kind, large)
    more = held_after.total - held_before.total
    gradients = held_after.gradients - held_before.gradients
    return {phase: after[phase] - before[phase] - more + (0 if phase == "update" else gradients) for phase in after}


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Models of 4 000 and 8 000 tokens."""
    folder = tmp_path_factory.mktemp("vocabularies")
    return [tiny.save_model(folder / str(size), vocab_size=size) for size in (4000, 8000)]


FULL_LOGITS = ROWS * LENGTH * 4000 * 4
"""Bytes by which float32 logits [rows, length, vocabulary] grow from the one to the other."""


@pytest.mark.parametrize("kind", ["SFT", "DPO", "PPO"])
def test_logits_never_stand_in_memory_at_once(
    kind: str, vocabularies: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the vocabulary at the same width costs far less than twice the logits, in every phase."""
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 2**15)
    for phase, more in growth(kind, *vocabularies).items():
        assert more < FULL_LOGITS / 4, phase


def test_the_measurement_would_see_them(vocabularies: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "CHUNK_LOGITS", 2**40)
    assert growth("SFT", *vocabularies)["update"] > FULL_LOGITS
    more = growth("PPO", *vocabularies)
    assert more["update"] > FULL_LOGITS / 2  # half of the tokens are responses
    assert more["score"] > FULL_LOGITS / 2


def test_scoring_keeps_no_activations(tmp_path: Path) -> None:
    """Four more layers: the update keeps what they computed, the score pass and the sampler's cache do not."""
    folders = [tiny.save_model(tmp_path / str(layers), num_hidden_layers=layers) for layers in (2, 6)]
    more = growth("PPO", *folders)
    one = ROWS * LENGTH * 32 * 4  # one activation [rows, length, width] in float32
    assert more["update"] > 4 * 4 * one
    assert more["score"] < one / 4


def test_a_rollout_holds_no_gradients(tmp_path: Path) -> None:
    """Full fine-tuning: those of the last step were freed before the next rollout."""
    folder = tiny.save_model(tmp_path, hidden_size=256, intermediate_size=512)
    found, held = peaks("PPO", folder, lora=None)
    assert held.gradients > 2**22
    for phase in ("rollout", "score"):
        assert found[phase] < held.total - held.gradients / 2
    assert found["update"] > held.total


PLACES: list[str] = []


class Moved(ExperienceBatch):
    """Notes where it is sent."""

    def to(self, device: Any, non_blocking: bool = False) -> Any:
        PLACES.append(str(device))
        return super().to(device, non_blocking)


def test_rollouts_wait_on_the_cpu(llama: str) -> None:
    module = tiny.make_ppo(Base(name=llama))

    def collect(prompts: PromptBatch, rollout: int) -> ExperienceBatch:
        return Moved(**vars(module.rollout(prompts, rollout)))

    loader = RolloutLoader([0] * 4, lambda items: tiny.prompts(4), collect, lambda: False, 4, 1, 2, 1)
    next(iter(loader))
    assert PLACES == ["cpu"]
    assert loader.buffer is not None
    assert all(column.device.type == "cpu" for column in loader.buffer.columns().values())


def test_nothing_but_the_experience_is_left_of_a_rollout(llama: str) -> None:
    module = tiny.make_ppo(Base(name=llama))
    prompts = tiny.prompts(4)
    with LiveBytes() as counter:
        module.rollout(prompts, 0)  # the weights have been seen, the caches of the first call are made
        gc.collect()
        before = counter.live
        experience = module.rollout(prompts, 1)
        gc.collect()
        kept = [*vars(experience.sequences).values(), *experience.columns().values()]
        own = {x.untyped_storage()._cdata: x.untyped_storage().nbytes() for x in kept}
        assert counter.live - before == sum(own.values())
        assert not any(column.requires_grad for column in experience.columns().values())


def test_a_pair_is_measured_with_two_prompts(llama: str) -> None:
    """Real pairs may have little in common: a measurement on sides that share their tokens would promise too much."""
    data = PreferenceDataModule(batch_size=ROWS // 2, max_length=LENGTH)
    module = DPO(Base(name=llama), DPOLoss(0.1))
    shared = bench(module, data).measure(ROWS * LENGTH).peak
    with without_sharing():
        apart = bench(DPO(Base(name=llama), DPOLoss(0.1)), data).measure(ROWS * LENGTH).peak
    assert shared == pytest.approx(apart, rel=0.02)


# --- the search ------------------------------------------------------------------------------------------------------


def test_the_search_finds_the_edge(llama: str) -> None:
    """What it names fits; one row more does not, as measured without a limit."""
    data = SFTDataModule(batch_size=64, max_length=64)
    free = bench(SFT(Base(name=llama)), data)
    limit = free.measure(5 * 64 + 30).peak
    tight = bench(SFT(Base(name=llama)), data, limit)
    first = tight.measure(64)
    before = tight.gauge.live
    assert not tight.measure(8 * 64).fits
    assert tight.gauge.live == before  # an attempt that failed leaves nothing behind
    most, found = tight.largest(first, 64)
    assert found.peak <= limit
    assert most % 64 == 0
    assert free.measure(most).peak == found.peak
    assert free.measure(most + 64).peak > limit


# --- one base --------------------------------------------------------------------------------------------------------

# Rank against width as in an 8 B model with rank 16 to 32.
SMALL = replace(run.CPU, lora=2, length=4, budget=16, dtype="float32")
SHAPE = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 2, "num_attention_heads": 4,
         "vocab_size": 1200}  # fmt: skip


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> run.Stages:
    """QLoRA's stages, and four models, on a small Llama."""
    folder = tmp_path_factory.mktemp("stages")
    return run.Stages(run.save_llama(folder / "base", SHAPE, torch.float32, "cpu"), folder, SMALL)


def test_four_roles_cost_little_more_than_one(stages: run.Stages) -> None:
    """PPO in 4 bits on one base: at most 1.3 × what QLoRA SFT holds; four models: at least 3 ×."""
    held: dict[str, int] = {}
    for title, build, data, keep in stages.rows():
        if keep is not None or title.startswith("PPO"):
            found = stages.measure(build, data, keep).held
            assert found is not None
            held[title] = found.total
    sft = held["SFT, QLoRA"]
    assert sft < held["PPO, QLoRA: four roles on one base"] <= 1.3 * sft
    assert held["PPO, QLoRA: the reward on a base of its own"] > 1.3 * sft
    assert held["PPO, all weights: four models"] >= 3 * sft


def test_a_checkpoint_is_a_few_times_the_adapters(stages: run.Stages, tmp_path: Path) -> None:
    """Adapters that train, and Adam's two moments of each: no base, no reference, no reward model."""
    module = stages.ppo()
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False,
                      enable_progress_bar=False, num_sanity_val_steps=0)  # fmt: skip
    rows = WorstCase(module, stages.prompts, SMALL.budget, Measurement(LiveBytes()))
    trainer.fit(module, datamodule=rows)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    adapters = sum(p.nbytes for p in module.trainable_parameters())
    assert adapters < (tmp_path / "last.ckpt").stat().st_size < 5 * adapters
