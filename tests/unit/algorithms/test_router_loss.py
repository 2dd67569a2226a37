"""The loss of a mixture of experts' routers: transformers' own for each sequence, however a batch is cut."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from torch import Tensor

from rlhf_lit.algorithms import DPO, GRPO, KTO, PPO, RLOO, SFT, RewardModel
from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.batches import Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.losses.balance import sequence_balance
from rlhf_lit.losses.kl import FixedKL
from rlhf_lit.losses.preference import DPOLoss, KTOLoss
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.packing import layout_of, without_sharing
from rlhf_lit.models.roles import Critic

SMALL: dict[str, Any] = {**tiny.SIZES["llama"], "num_key_value_heads": 2, "max_position_embeddings": 128}
EXPERTS = {"num_local_experts": 4, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
KINDS: dict[str, dict[str, Any]] = {
    "mixtral": SMALL | EXPERTS,
    "qwen2_moe": SMALL | EXPERTS | {"shared_expert_intermediate_size": 16, "decoder_sparse_step": 1},
    "qwen3_moe": SMALL | EXPERTS | {"head_dim": 8, "mlp_only_layers": [0], "num_hidden_layers": 3},
    "olmoe": SMALL | EXPERTS,
    "phimoe": SMALL | EXPERTS | {"router_jitter_noise": 0.0},
    "gpt_oss": SMALL | EXPERTS | {"head_dim": 8, "layer_types": ["full_attention"] * 2},
    "granitemoe": SMALL | EXPERTS,
    "minimax_m2": SMALL | EXPERTS | {"head_dim": 8, "rotary_dim": 8},
    "ernie4_5_moe": SMALL | EXPERTS | {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "flex_olmo": SMALL | EXPERTS,
    "jamba": SMALL
    | EXPERTS
    | {"attn_layer_period": 2, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0,
       "use_mamba_kernels": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("mixtral"), "mixtral")


def save(folder: Path, kind: str, **overrides: Any) -> str:
    tiny.SIZES[kind] = KINDS[kind]
    return tiny.save_model(folder, kind, **overrides)


def by_transformers(model: Any, sequences: Sequences) -> list[float]:
    """transformers' loss of each row in a batch of its own."""
    rows = zip(sequences.tokens, sequences.lengths.tolist(), strict=True)
    return [float(model(row[None, :n], output_router_logits=True, use_cache=False).aux_loss) for row, n in rows]


def without(base: Base) -> Base:
    return replace(base, router_loss=0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_transformers_own_for_each_sequence(kind: str, tmp_path: Path) -> None:
    base = Base(name=save(tmp_path, kind), router_loss=0.5)
    batch = tiny.supervised()
    module, plain = tiny.build(SFT(base)).eval(), tiny.build(SFT(without(base))).eval()
    step, expected = tiny.Step(module, batch), tiny.Step(plain, batch)
    balance = by_transformers(plain.roles.policy, batch.sequences)
    assert max(balance) - min(balance) > 0.01
    mean = sum(balance) / len(balance)
    assert step.totals["router_loss"] == pytest.approx(mean, rel=2e-5)
    assert step.totals["loss"] == pytest.approx(expected.totals["loss"] + 0.5 * mean, rel=2e-5)
    assert "router_loss" not in expected.totals
    # The gradient of the difference, against that of transformers' loss.
    plain.zero_grad()
    for row, n in zip(batch.sequences.tokens, batch.sequences.lengths.tolist(), strict=True):
        loss = plain.roles.policy(row[None, :n], output_router_logits=True, use_cache=False).aux_loss
        (0.5 * loss / len(batch)).backward()
    norm = sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None) ** 0.5
    assert norm > 1e-3
    for name, parameter in plain.named_parameters():
        if parameter.grad is not None and name in step.gradients:
            difference = step.gradients[name] - expected.gradients.get(name, torch.zeros_like(parameter))
            assert float((difference - parameter.grad).norm()) < 2e-4 * (norm + expected.norm), name


def test_the_equation() -> None:
    """k with all experts alike, and more where the same ones are chosen; a place may belong to several sequences."""
    even = torch.eye(4) * 1e-6 + torch.eye(4).roll(1, 0) * 1e-7  # each expert is chosen at two of the four places
    same = torch.tensor([[9.0, 8.0, 0.0, 0.0]]).repeat(2, 1)
    place, row = torch.tensor([0, 1, 2, 3, 4, 5, 0, 4]), torch.tensor([0, 0, 0, 0, 1, 1, 2, 2])
    found = sequence_balance([torch.cat([even, same])], 2, place, row, torch.tensor([4, 2, 2]))
    p = same[0].softmax(-1)
    assert found[0] == pytest.approx(2.0, abs=1e-5)
    assert found[1] == pytest.approx(float(4 * (p[0] + p[1])), rel=1e-6)
    used = torch.tensor([1.0, 0.5, 0.0, 0.5])  # by the third sequence: 0 and 3, then 0 and 1
    assert found[2] == pytest.approx(float(4 * (used * (p + 0.25) / 2).sum()), rel=1e-5)


Make = Callable[[Base], tuple[Algorithm, Any]]


def on_policy(kind: Any, **settings: Any) -> Make:
    def make(base: Base) -> tuple[Algorithm, Any]:
        module = tiny.make_on_policy(kind, base, **settings)
        return module, module.rollout(tiny.repeated(tiny.prompts(4), 2), 0)

    return make


CASES: dict[str, Make] = {
    "sft": lambda base: (tiny.build(SFT(base)), tiny.supervised()),
    "dpo": lambda base: (tiny.build(DPO(base, DPOLoss(beta=0.5))), tiny.preferences()),
    "kto": lambda base: (tiny.build(KTO(base, KTOLoss(beta=0.5))), tiny.unpaired()),
    "reward": lambda base: (tiny.build(RewardModel(base)), tiny.preferences()),
    "ranked": lambda base: (tiny.build(RewardModel(base)), tiny.rankings()),
    "rloo": on_policy(RLOO),
    "grpo, exact KL": on_policy(GRPO, kl=FixedKL(0.3, "full", "loss")),
    "ppo": on_policy(PPO, critic=Critic(init="policy")),
    "ppo, trunk": on_policy(PPO, critic=Critic(init="policy", trunk=True)),
}


def learned_from(batch: Any) -> Sequences:
    first, *others = batch.answers()
    for other in others:
        first = first.join(other)
    return first


@pytest.mark.parametrize("lora", [None, LoRA(rank=4, targets=["q_proj", "o_proj"])], ids=["full", "lora"])
@pytest.mark.parametrize("case", CASES)
def test_every_algorithm_has_it_and_no_cut_changes_it(case: str, lora: LoRA | None, mixtral: str) -> None:
    """Packed, with prompts shared, cut into single rows, padded: of what the policy learns from, each sequence once;
    nothing of the critic's or the reference's passes, nor of the second one that the exact KL takes."""
    module, batch = CASES[case](Base(name=mixtral, lora=lora, router_loss=0.3))
    tiny.disturb(module, 0.02)
    assert layout_of(module) == "shared"
    step = tiny.Step(module, batch)
    if not module.trains_scorer:  # of which transformers says no such thing
        with torch.no_grad():
            balance = by_transformers(module.trained_model.eval(), learned_from(batch))
        assert step.totals["router_loss"] == pytest.approx(sum(balance) / len(balance), rel=1e-5)
    module.set_train_mode()
    step.assert_equals(tiny.Step(module, replace(batch, micro_batch_tokens=1)), 2e-5)
    step.assert_equals(tiny.Step(module, replace(batch, micro_batch_tokens=60)), 2e-5)
    with without_sharing():
        step.assert_equals(tiny.Step(module, batch), 2e-5)
    module.router_loss.coefficient = 0.0
    assert step.distance(tiny.Step(module, batch)) > 1e-4


def test_rows_are_padded_where_they_are_not_packed(mixtral: str) -> None:
    steps = []
    for attention in (None, "eager"):
        module = tiny.build(SFT(Base(name=mixtral, router_loss=0.3, attention=attention)))  # type: ignore[arg-type]
        assert (layout_of(module) == "padded") == (attention == "eager")
        steps.append(tiny.Step(module, tiny.widen(tiny.supervised(), 5), cut=False))
    steps[0].assert_equals(steps[1], 1e-5)


@pytest.mark.parametrize("make", [CASES["sft"], CASES["dpo"], CASES["reward"]])
def test_with_gradient_checkpointing_it_keeps_its_gradient(make: Make, mixtral: str) -> None:
    steps = []
    for checkpointing in (False, True):
        module, batch = make(Base(name=mixtral, router_loss=0.7, gradient_checkpointing=checkpointing))
        tiny.disturb(module, 0.02)
        steps.append(tiny.Step(module, batch))
    steps[0].assert_equals(steps[1], 1e-5)


@pytest.mark.soak
def test_compiled_layers_are_heard_too(mixtral: str) -> None:
    torch.compiler.reset()
    steps = []
    for compiled in (False, True):
        module = tiny.build(SFT(Base(name=mixtral, router_loss=0.7, compile=compiled)))
        steps.append(tiny.Step(module, tiny.supervised()))
    steps[0].assert_equals(steps[1], 1e-5)
    torch.compiler.reset()


@pytest.mark.parametrize("asked", [None, 0.0, 0.4])
def test_null_is_what_the_models_config_says(asked: float | None, tmp_path: Path, capsys: Any) -> None:
    """As in TRL: ``router_aux_loss_coef``, where ``output_router_logits`` is true."""
    wants = save(tmp_path / "wants", "mixtral", output_router_logits=True, router_aux_loss_coef=0.25)
    plain = save(tmp_path / "plain", "mixtral", router_aux_loss_coef=0.25)
    for folder, own in ((wants, 0.25), (plain, 0.0)):
        module = tiny.build(SFT(Base(name=folder, router_loss=asked)))
        expected = own if asked is None else asked
        assert module.router_loss.coefficient == expected
        assert ("router_loss" in tiny.Step(module, tiny.supervised()).totals) == (expected > 0)
        module.router_loss.tell()
        said = capsys.readouterr().err
        assert ("note: model.base.router_loss: 0.25, as the model's config says" in said) == (asked is None and own > 0)


def test_a_config_that_asks_for_routers_neither_crashes_nor_slows_sampling(tmp_path: Path) -> None:
    """It did: the loss was computed at each new token, with a mask of the whole prompt. The config stays as it was."""
    folder = save(tmp_path, "mixtral", output_router_logits=True)
    module = tiny.build(SFT(Base(name=folder)))
    expected = tiny.build(SFT(Base(name=save(tmp_path / "plain", "mixtral"))))
    found = module.respond(tiny.prompts())
    assert found.sequences.tokens.equal(expected.respond(tiny.prompts()).sequences.tokens)
    assert module.roles.policy.config.output_router_logits is True
    rollout = tiny.make_on_policy(RLOO, Base(name=folder)).rollout(tiny.repeated(tiny.prompts(4), 2), 0)
    assert len(rollout) == 8


def test_nothing_is_collected_without_gradients(mixtral: str) -> None:
    module = tiny.build(SFT(Base(name=mixtral, router_loss=0.5)))
    batch = tiny.supervised()
    with torch.no_grad():
        denominators = module.denominators(batch)
        totals: dict[str, Tensor] = {}
        for term in module.step_losses(batch, denominators):
            term.add_to(totals)
    assert set(totals) == {"loss"}


DENSE = {"first_k_dense_replace": 1, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "q_lora_rank": 16,
         "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "complaint"),
    [("llama", "LlamaForCausalLM has no routers"), ("deepseek_v3", "balanced by other means than this loss")],
)
def test_models_without_such_a_loss_are_refused_by_name(
    kind: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.SIZES, "deepseek_v3", SMALL | EXPERTS | DENSE | {"num_key_value_heads": 4})
    base = Base(name=tiny.save_model(tmp_path, kind))
    assert tiny.build(SFT(base)).router_loss.coefficient == 0
    with pytest.raises(UserError, match=rf"model\.base\.router_loss: .*{complaint}"):
        tiny.build(SFT(replace(base, router_loss=0.1)))
    with pytest.raises(UserError, match=r"base\.router_loss must be at least 0 or null, not -1"):
        replace(base, router_loss=-1.0)
