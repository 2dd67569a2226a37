"""The operations that a step's passes count, against PyTorch's own count of the same step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from rlhf_lit.algorithms import DPO, GRPO, KTO, SFT, RewardModel
from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.algorithms.offline import Reference
from rlhf_lit.algorithms.ppo import Critic
from rlhf_lit.batches import ExperienceBatch, PreferenceBatch, RankedBatch, Sequences, SupervisedBatch, UnpairedBatch
from rlhf_lit.losses.kl import FixedKL
from rlhf_lit.losses.preference import DPOLoss, KTOLoss
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.flops import FlopCount, count_flops, uncounted
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.packing import sequence_states, without_sharing
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.training.utilisation import log_rate
from tests.unit.tiny import EVERYTHING, Step, build, make_on_policy, make_ppo, save_model, sequences

ROWS, LENGTH, LAYERS, WIDTH = 4, 12, 2, 32
RANK = 4
TOLERANCE = 1e-4  # the rotary angles, which the counter counts and we do not
ROW = (5, 3)  # with its special tokens 12 long: no padding, which the counter would count


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {kind: save_model(tmp_path_factory.mktemp(kind), kind) for kind in ("llama", "gpt2", "qwen2")}


def counted(module: Algorithm, batch: Any) -> int:
    with without_sharing(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        Step(module, batch)
    return counter.get_total_flops()


def second_half(forwards: int, backwards: int) -> int:
    """What the counter sees of attention and we do not: the half of the context that causal order hides."""
    return 2 * LAYERS * WIDTH * ROWS * LENGTH**2 * (forwards + 2 * backwards)


def needless(rows: int) -> int:
    """Gradients of the first layer's q, k and v, and of their adapters, for embeddings that are not trained."""
    return 2 * rows * LENGTH * 3 * (WIDTH * WIDTH + RANK * WIDTH)


def scalar_head(positions: int) -> int:
    """Forwards and backwards, which is not worth counting in a run."""
    return 6 * positions * WIDTH


def rows(seed: int = 0) -> Any:
    found = sequences([ROW] * ROWS, seed)
    assert found.lengths.tolist() == [LENGTH] * ROWS
    return found


def pairs() -> PreferenceBatch:
    return PreferenceBatch(rows(), rows(1), torch.zeros(ROWS), EVERYTHING)


def of(module: Algorithm, batch: Any) -> float:
    """The count of a step, prompts shared."""
    with count_flops() as counted:
        Step(module, batch)
    assert counted.total is not None
    return float(counted.total)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2"])
def test_sft(folders: dict[str, str], kind: str) -> None:
    module, batch = build(SFT(Base(folders[kind]))), SupervisedBatch(rows(), EVERYTHING)
    assert of(module, batch) + second_half(1, 1) == pytest.approx(counted(module, batch), rel=TOLERANCE)


def test_sft_through_a_frozen_base(folders: dict[str, str]) -> None:
    module = build(SFT(Base(folders["llama"], lora=LoRA(rank=RANK))))
    batch = SupervisedBatch(rows(), EVERYTHING)
    expected = of(module, batch) + second_half(1, 1) - needless(ROWS)
    assert expected == pytest.approx(counted(module, batch), rel=TOLERANCE)


@pytest.mark.parametrize("lora", [None, LoRA(rank=RANK)])
def test_dpo_with_its_reference(folders: dict[str, str], lora: LoRA | None) -> None:
    module = build(DPO(Base(folders["llama"], lora=lora), DPOLoss(0.1)))
    expected = of(module, pairs()) + second_half(4, 2) - (needless(2 * ROWS) if lora else 0)
    assert expected == pytest.approx(counted(module, pairs()), rel=TOLERANCE)


def test_a_reference_that_is_known_or_not_read_costs_nothing(folders: dict[str, str]) -> None:
    base, zeros = Base(folders["llama"]), torch.zeros(ROWS, LENGTH)
    module = build(DPO(base, DPOLoss(0.1)))
    known = PreferenceBatch(rows(), rows(1), torch.zeros(ROWS), EVERYTHING, zeros, zeros)
    free = build(DPO(base, DPOLoss(0.1), Reference(free=True)))
    assert of(module, known) == of(free, pairs()) == pytest.approx(of(module, pairs()) * 3 / 4)


def test_kto_with_its_mismatched_responses(folders: dict[str, str]) -> None:
    module = build(KTO(Base(folders["llama"]), KTOLoss(0.1)))
    batch = UnpairedBatch(rows(), rows(1), torch.tensor([True, False] * (ROWS // 2)), EVERYTHING)
    assert of(module, batch) + second_half(4, 1) == pytest.approx(counted(module, batch), rel=TOLERANCE)


def test_a_reward_model(folders: dict[str, str]) -> None:
    module = build(RewardModel(Base(folders["llama"])))
    expected = of(module, pairs()) + second_half(2, 2) + scalar_head(2 * ROWS)
    assert expected == pytest.approx(counted(module, pairs()), rel=TOLERANCE)


def test_a_reward_model_on_ranked_lists(folders: dict[str, str]) -> None:
    """Each answer once, however many pairs it is in."""
    module, two = build(RewardModel(Base(folders["llama"]))), pairs()
    counts, rank = torch.tensor([4, 4]), torch.arange(4).repeat(2)
    lists = RankedBatch(two.sides(), counts, rank, torch.zeros(2 * ROWS), EVERYTHING)
    assert of(module, lists) == of(module, two)


def test_without_a_critic_the_policy_counts_alone(folders: dict[str, str]) -> None:
    zeros = torch.zeros(ROWS, LENGTH)
    batch = ExperienceBatch(rows(), *[zeros] * 4, zeros + 1, zeros, kl_coefficient=0.2, micro_batch_tokens=EVERYTHING)
    module = make_on_policy(GRPO, Base(folders["llama"]))
    assert of(module, batch) + second_half(1, 1) == pytest.approx(counted(module, batch), rel=TOLERANCE)


@pytest.mark.parametrize("lora", [None, LoRA(rank=RANK)])
def test_ppo_with_adapters_counts_each_pass_with_its_own(folders: dict[str, str], lora: LoRA | None) -> None:
    """Policy and critic on one base, or whole: the same pass but for the LM head."""
    zeros = torch.zeros(ROWS, LENGTH)
    batch = ExperienceBatch(rows(), *[zeros] * 6, kl_coefficient=0.2, micro_batch_tokens=EVERYTHING)
    module = make_ppo(Base(folders["llama"], lora=lora))
    expected = of(module, batch) + second_half(2, 2) + scalar_head(ROWS * (LENGTH - 1))
    expected -= 2 * needless(ROWS) if lora else 0
    assert expected == pytest.approx(counted(module, batch), rel=TOLERANCE)


@pytest.mark.parametrize(
    ("settings", "forwards", "backwards"),
    [
        ({}, 2, 2),
        ({"critic": Critic(init="policy", trunk=True)}, 1, 1),
        ({"kl": FixedKL(0.2, estimator="full", placement="loss")}, 4, 3),
    ],
)
def test_ppo(folders: dict[str, str], settings: dict[str, Any], forwards: int, backwards: int) -> None:
    module = make_ppo(Base(folders["llama"]), **settings)
    zeros = torch.zeros(ROWS, LENGTH)
    batch = ExperienceBatch(rows(), *[zeros] * 6, kl_coefficient=0.2, micro_batch_tokens=EVERYTHING)
    expected = of(module, batch) + second_half(forwards, backwards) + scalar_head(ROWS * (LENGTH - 1))
    assert expected == pytest.approx(counted(module, batch), rel=TOLERANCE)


def test_neither_padding_nor_recomputation_nor_sharing_counts(folders: dict[str, str]) -> None:
    plain, again = (
        build(SFT(Base(folders["llama"], gradient_checkpointing=checkpointing))) for checkpointing in (False, True)
    )
    batch = SupervisedBatch(rows(), EVERYTHING)
    assert of(again, batch) == of(plain, batch)
    assert counted(again, batch) > 1.2 * counted(plain, batch)
    ragged = sequences([ROW, (5, 40)])
    each = [SupervisedBatch(ragged.select(torch.tensor([i])), EVERYTHING) for i in range(2)]
    assert of(plain, SupervisedBatch(ragged, EVERYTHING)) == pytest.approx(sum(of(plain, one) for one in each))
    module = build(DPO(Base(folders["llama"]), DPOLoss(0.1)))
    alike = replace(pairs(), rejected=pairs().chosen)
    with without_sharing():
        apart = of(module, alike)
    assert of(module, alike) == apart


def forward(model: nn.Module, sequences: Sequences) -> float:
    """The count of a pass without gradients."""
    with torch.no_grad(), count_flops() as counted:
        token_logprobs(model, sequences)
    assert counted.total is not None
    return float(counted.total)


def test_a_critic_that_warms_up_counts_alone(folders: dict[str, str]) -> None:
    """On the trunk: the policy's body forwards and backwards, without its LM head."""
    zeros = torch.zeros(ROWS, LENGTH)
    batch = ExperienceBatch(rows(), *[zeros] * 6, kl_coefficient=0.2, micro_batch_tokens=EVERYTHING)
    found = []
    for critic in (Critic(init="policy", warmup=1), Critic(init="policy", trunk=True, warmup=1)):
        module = make_ppo(Base(folders["llama"]), critic=critic)
        with count_flops() as body, module.roles.acting("value") as model:
            sequence_states(model, batch.sequences)
        assert body.total is not None
        found.append(of(module, batch))
        assert found[-1] == float(body.total) > 0
    assert found[0] == found[1]


def test_with_adapters_the_reference_is_the_bare_base(folders: dict[str, str]) -> None:
    module = build(DPO(Base(folders["llama"], lora=LoRA(rank=RANK)), DPOLoss(0.1)))
    with module.roles.acting("policy") as model:
        policy = forward(model, rows())
    with module.roles.acting("reference") as model:
        reference = forward(model, rows())
    adapters = sum(p.numel() for p in module.trainable_parameters())
    assert policy - reference == 2 * adapters * ROWS * LENGTH


def test_of_a_module_that_an_adapter_trains_in_full_one_counts(folders: dict[str, str]) -> None:
    """A pass costs the same with a copy in the place of a module, in either role."""
    costs = []
    for parts in (None, ["lm_head", "layers.0.mlp.up_proj", "norm"]):
        lora = LoRA(rank=RANK, targets=["q_proj"], modules_to_save=parts)
        module = build(DPO(Base(folders["llama"], lora=lora), DPOLoss(0.1)))
        for role in ("policy", "reference"):
            with module.roles.acting(role) as model, torch.no_grad():
                costs.append(forward(model, rows()))
    assert costs[:2] == costs[2:]


def test_what_is_paused_or_outside_is_not_counted(folders: dict[str, str]) -> None:
    model = build(SFT(Base(folders["llama"]))).roles.policy
    with count_flops() as counted:
        with uncounted():
            token_logprobs(model, rows())
        assert counted.total is None
        counted.paused = True
        token_logprobs(model, rows())
        assert counted.total is None
        counted.paused = False
        with uncounted(False), torch.no_grad():
            token_logprobs(model, rows())
        total = counted.total
        assert total is not None
    token_logprobs(model, rows())
    assert counted.total is total
    assert float(total) == forward(model, rows())


def test_of_experts_those_that_a_token_is_sent_to(tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 4, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2}
    from transformers import AutoConfig, AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", vocab_size=40, **sizes, **experts))
    one = rows().select(torch.tensor([0]))
    body = 4 * 32 * 32 + 4 * 32 + 2 * 3 * 32 * 16  # attention, router, two experts of three matrices
    attention = 4 * 32 * LENGTH**2 // 2
    head = 2 * 32 * 40 * int(one.mask.sum())
    assert forward(model, one) == 2 * body * LENGTH + attention + head


def test_of_a_model_without_attention_the_matrices() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "state_size": 4, "time_step_rank": 2, "conv_kernel": 4}
    model = MambaForCausalLM(MambaConfig(vocab_size=40, **sizes))
    one = rows().select(torch.tensor([0]))
    inner = 2 * 32
    body = 32 * 2 * inner + inner * 4 + inner * 4  # in, convolution, A
    body += inner * (2 + 2 * 4) + 2 * inner + inner * 32  # x, Δ, out
    head = 2 * 32 * 40 * int(one.mask.sum())
    assert forward(model, one) == 2 * body * LENGTH + head


@pytest.mark.parametrize(
    ("precision", "base", "dtype"),
    [
        ("32-true", {}, torch.float32),
        ("bf16-mixed", {}, torch.bfloat16),
        ("32-true", {"dtype": "bfloat16"}, torch.bfloat16),
        ("32-true", {"lora": LoRA(), "quantization": Quantization()}, torch.bfloat16),
    ],
)
def test_utilisation_is_of_the_peak_in_the_dtype_of_the_products(
    folders: dict[str, str], monkeypatch: pytest.MonkeyPatch, precision: Any, base: dict[str, Any], dtype: torch.dtype
) -> None:
    peaks = {dtype: 4_000_000}
    monkeypatch.setattr(
        "lightning.fabric.utilities.throughput.get_available_flops", lambda device, dtype: peaks.get(dtype)
    )
    model = build(SFT(Base(folders["llama"])))
    module = SFT(Base(folders["llama"], **base))
    trainer = Trainer(accelerator="cpu", precision=precision, logger=False, enable_checkpointing=False)
    module.trainer = trainer
    logged: dict[str, float] = {}
    monkeypatch.setattr(module, "log", lambda name, value: logged.update({name: float(value)}))
    total = of(model, SupervisedBatch(rows(), EVERYTHING))
    log_rate(module, FlopCount(torch.tensor(total, dtype=torch.float64)), seconds=2.0)
    assert logged == pytest.approx({"train/tflops_per_s": total / 2e12, "train/mfu": total / 2 / 4_000_000})
