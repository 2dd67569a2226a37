"""How weights are spread over ranks, as one of two ranks sees it; what is gathered is in tests/distributed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear4bit
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from rlhf_lit.algorithms import SFT
from rlhf_lit.batches import SupervisedBatch
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.flops import count_body, count_flops, count_head
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.parallel.sharding import FSDP2, Unsharded, shard, sharding_of


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of two ranks, of which this is the first and the other is not there."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_the_two_ways_answer_the_same_questions() -> None:
    ways = [{name for name in vars(way) if not name.startswith("_")} for way in (Unsharded, FSDP2)]
    assert ways[0] == ways[1]


def test_unsharded_weights_are_left_as_they_are() -> None:
    model = nn.Linear(2, 3)
    sharding = sharding_of(model)
    assert not sharding.is_sharded
    assert list(sharding.passes([1, 2], lambda: 0)) == [(1, True), (2, True)]
    sharding.assign(model.bias, torch.arange(3.0))
    assert sharding.gathered(model.bias).tolist() == [0, 1, 2]
    assert sharding.whole_weights(keep=True) is None
    model.weight.grad, model.bias.grad = torch.zeros(3, 2), torch.tensor([0.0, 3.0, 4.0])
    sharding.sum_gradients(list(model.parameters()))
    assert float(sharding.clip_grad_norm([model.bias], 1.0)) == 5
    assert model.bias.grad.tolist() == pytest.approx([0, 0.6, 0.8], abs=1e-5)


@pytest.mark.parametrize("shape", [(4,), (2, 2), (4, 1)])
def test_replicas_times_shards(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A rank holds one part of as many as there are shards in a replica; sharding twice changes nothing."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        module = tiny.build(SFT(Base(tiny.save_model(tmp_path))))
        sizes = {name: weight.shape for name, weight in module.named_parameters()}
        values = {name: weight.detach().clone() for name, weight in module.named_parameters()}
        for _ in range(2):
            shard(module, init_device_mesh("cpu", shape, mesh_dim_names=("replica", "shard")[-len(shape) :]))
        sharding = sharding_of(module)
        assert sharding.is_sharded
        for name, weight in module.named_parameters():
            assert isinstance(weight, DTensor)
            assert weight.shape == sizes[name]
            own = values[name].chunk(shape[-1])[0]
            assert torch.equal(weight.to_local(), own)
            assert torch.equal(sharding.spread(values[name], weight).to_local(), own)  # type: ignore[attr-defined]
    finally:
        dist.destroy_process_group()


def flops_of(module: SFT, batch: SupervisedBatch) -> float:
    """Operations of a forward and a backward pass, by the shapes of the weights alone: nothing is run on two ranks."""
    with count_flops() as counted, module.roles.acting("policy") as model:
        count_body(model, batch.sequences.lengths)
        count_head(model, int(batch.sequences.mask.sum()))
    assert counted.total is not None
    return float(counted.total)


def test_of_a_4_bit_base_a_rank_holds_half_of_the_bytes(mesh: DeviceMesh, tmp_path: Path) -> None:
    base = Base(tiny.save_model(tmp_path), lora=LoRA(rank=4), quantization=Quantization())
    module = tiny.build(SFT(base))
    batch: SupervisedBatch = tiny.supervised()
    layers = [part for part in module.modules() if isinstance(part, Linear4bit)]
    whole = [layer.weight.numel() for layer in layers]
    before = flops_of(module, batch)
    unpacked = tiny.build(SFT(Base(base.name, lora=base.lora)))
    assert before == flops_of(unpacked, batch)
    shard(module, mesh)
    assert len(layers) == 14
    for layer, count in zip(layers, whole, strict=True):
        assert isinstance(layer.weight, DTensor)
        assert layer.weight.to_local().numel() == count // 2
        assert 2 * count == layer.in_features * layer.out_features
    fresh = tiny.build(SFT(base))
    shard(fresh, mesh)
    assert flops_of(fresh, batch) == before, "a weight counts what it stands for"
