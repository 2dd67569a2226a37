"""How a batch is padded, ordered and cut changes neither its loss nor any gradient, in any algorithm.

Everything runs in float64 after loading, norms too, so that a wrong denominator cannot hide in rounding, nor what
prompts that are computed once would change.
"""

from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rlhf_lit.algorithms import DPO, GRPO, KTO, RLOO, SFT, RewardModel
from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.algorithms.ppo import Critic
from rlhf_lit.batches import Sequences
from rlhf_lit.losses.advantages import GroupRelative
from rlhf_lit.losses.bradley_terry import BradleyTerryLoss
from rlhf_lit.losses.kl import FixedKL
from rlhf_lit.losses.policy_gradient import ClippedPolicyLoss
from rlhf_lit.losses.preference import DPOLoss, IPOLoss, KTOLoss, ORPOLoss
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.packing import layout_of, without_sharing

TOLERANCE = 1e-9
Case = tuple[Algorithm, Any]


def sft(base: Base) -> Case:
    return tiny.build(SFT(base)).double(), tiny.supervised()


def reward_model(base: Base) -> Case:
    loss = BradleyTerryLoss(centring=0.01, use_margin=True)
    return tiny.build(RewardModel(base, loss)).double(), tiny.preferences()


def ranked_reward_model(base: Base) -> Case:
    """Lists of unequal size: neither answers nor pairs may weigh as prompts do."""
    loss = BradleyTerryLoss(centring=0.01, use_margin=True)
    return tiny.build(RewardModel(base, loss)).double(), tiny.rankings()


def dpo(base: Base) -> Case:
    module = tiny.build(DPO(base, DPOLoss(beta=0.5, label_smoothing=0.1)))
    tiny.disturb(module, 0.03)
    return module.double(), tiny.preferences()


def ipo(base: Base) -> Case:
    module = tiny.build(DPO(base, IPOLoss(beta=0.5, average_log_prob=True)))
    tiny.disturb(module, 0.03)
    return module.double(), tiny.preferences()


def orpo(base: Base) -> Case:
    """No reference, and an SFT term, whose denominator is tokens."""
    module = tiny.build(DPO(base, ORPOLoss(beta=0.5), sft_coefficient=0.7))
    return module.double(), tiny.preferences()


def kto(base: Base) -> Case:
    """z is of the whole batch, and above 0."""
    module, batch = tiny.build(KTO(base, KTOLoss(beta=0.5, desirable_weight=1.4))), tiny.unpaired()
    tiny.disturb(module, 0.03)
    tiny.logprobs_of(module, batch.mismatched).sum().backward()
    for parameter in module.trainable_parameters():
        parameter.data += 3e-3 * parameter.grad  # type: ignore[operator]
    module.double().prepare(batch)
    assert float(module.baseline) > 0.1
    return module, batch


def ppo(base: Base) -> Case:
    """Experience of an earlier policy, so that ratios are off 1 and both clips are at work."""
    module = tiny.make_ppo(base)
    experience = module.rollout(tiny.prompts(), 0)
    tiny.disturb(module, 0.03)
    module, batch = module.double(), experience
    totals = tiny.Step(module, batch).totals
    assert 0.02 < totals["policy/clipfrac"] < 0.98
    assert 0.02 < totals["value/clipfrac"] < 0.98
    return module, batch


def ppo_trunk(base: Base) -> Case:
    module = tiny.make_ppo(base, critic=Critic(init="policy", trunk=True))
    experience = module.rollout(tiny.prompts(), 0)
    tiny.disturb(module, 0.03)
    return module.double(), experience


def rloo(base: Base) -> Case:
    """Everything whose denominator a micro-batch could get wrong: responses that count alike, one ratio for each."""
    policy_loss = ClippedPolicyLoss(
        dual_clip=1.5, ratio="sequence", importance_cap=1.1, aggregation="sequence_mean", entropy_coefficient=0.3
    )
    module = tiny.make_on_policy(RLOO, base, policy_loss=policy_loss)
    experience = module.rollout(tiny.repeated(tiny.prompts(4), 2), 0)
    tiny.disturb(module, 0.03)
    return module.double(), experience


def grpo(base: Base) -> Case:
    """Dr. GRPO, with the KL in the loss."""
    policy_loss = ClippedPolicyLoss(aggregation="constant")
    module = tiny.make_on_policy(
        GRPO, base, kl=FixedKL(0.3, "k3", "loss"), advantages=GroupRelative("none"), policy_loss=policy_loss
    )
    experience = module.rollout(tiny.repeated(tiny.prompts(4), 2), 0)
    tiny.disturb(module, 0.03)
    return module.double(), experience


CASES = [sft, reward_model, ranked_reward_model, dpo, ipo, orpo, kto, ppo, ppo_trunk, rloo, grpo]


@pytest.fixture(autouse=True)
def norms_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorm casts to float32 whatever it is given."""

    def forward(self: Any, hidden_states: torch.Tensor) -> torch.Tensor:
        variance = hidden_states.square().mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


@pytest.fixture(
    params=[(case, lora) for case in CASES for lora in (None, LoRA(rank=4))],
    ids=lambda value: f"{value[0].__name__}-{'lora' if value[1] else 'full'}",
)
def case(request: pytest.FixtureRequest, llama: str) -> Case:
    make, lora = request.param
    make_case: Callable[[Base], Case] = make
    module, batch = make_case(Base(name=llama, lora=lora))
    if lora:
        tiny.disturb(module, 0.05)  # B = 0 has no gradient for A
    return module, batch


def with_budget(batch: Any, budget: int) -> Any:
    from dataclasses import replace

    return replace(batch, micro_batch_tokens=budget)


def test_loss_and_gradients(case: Case) -> None:
    module, batch = case
    whole = tiny.Step(module, batch, cut=False)
    assert not whole.without_gradient
    assert whole.norm > 1e-3
    for budget in (1, 25, 60, 110, tiny.EVERYTHING):
        pieces = len(list(with_budget(batch, budget).micro_batches()))
        assert pieces == {1: len(batch), tiny.EVERYTHING: 1}.get(budget, pieces)
        whole.assert_equals(tiny.Step(module, with_budget(batch, budget)), TOLERANCE)
    for extra, fill in ((1, tiny.EOS), (17, 5)):
        whole.assert_equals(tiny.Step(module, tiny.widen(batch, extra, fill), cut=False), TOLERANCE)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    shuffled = batch.select(order)
    whole.assert_equals(tiny.Step(module, shuffled, cut=False), TOLERANCE)
    whole.assert_equals(tiny.Step(module, with_budget(shuffled, 60)), TOLERANCE)


def test_the_loss_is_a_mean_over_what_it_says(case: Case) -> None:
    """Each row alone, recombined by its own tokens, pairs or episodes, gives the batch's loss: no mean of means."""
    module, batch = case
    if isinstance(module, KTO) or getattr(module, "sft_coefficient", 0):
        return  # z is a number of the whole batch, and an SFT term has a denominator of its own
    rows = [batch.select(torch.tensor([i])) for i in range(len(batch))]
    by_token = not isinstance(module, RLOO | GRPO)
    unit = next(iter(module.denominators(batch))) if by_token else "episodes"
    weights = [float(module.denominators(row)[unit]) for row in rows]
    losses = [tiny.Step(module, row).totals["loss"] for row in rows]
    mean = sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)
    assert tiny.Step(module, batch).totals["loss"] == pytest.approx(mean, rel=1e-9)


def test_a_shared_prompt_changes_nothing(case: Case) -> None:
    """Shared, each prompt computed for itself, and every row, pair or list alone."""
    module, batch = case
    shared = tiny.Step(module, batch)
    assert layout_of(module) == "shared"
    with without_sharing():
        apart = tiny.Step(module, batch)
        shared.assert_equals(apart, TOLERANCE)
        tiny.Step(module, with_budget(batch, 1)).assert_equals(apart, TOLERANCE)
    tiny.Step(module, with_budget(batch, 60)).assert_equals(apart, TOLERANCE)


def test_in_float32_within_rounding(llama: str) -> None:
    for module, batch in (
        (tiny.build(SFT(Base(name=llama))), tiny.supervised),
        (tiny.build(RewardModel(Base(name=llama))), tiny.preferences),
        (tiny.build(DPO(Base(name=llama), DPOLoss(beta=0.1))), tiny.preferences),
    ):
        tiny.Step(module, batch()).assert_equals(tiny.Step(module, batch(30)), 1e-5)
        tiny.Step(module, batch()).assert_equals(tiny.Step(module, tiny.widen(batch(), 9), cut=False), 1e-5)


def test_tokens_after_the_end_do_not_exist(llama: str) -> None:
    """What stands after a row's length, inside the padding, may be anything."""
    module = tiny.build(SFT(Base(name=llama))).double()
    batch = tiny.supervised()
    past = torch.arange(batch.sequences.tokens.shape[1])[None] >= batch.sequences.lengths[:, None]
    noise = torch.randint(0, tiny.VOCABULARY, past.shape, generator=torch.Generator().manual_seed(0))
    noisy = Sequences(torch.where(past, noise, batch.sequences.tokens), batch.sequences.lengths, batch.sequences.mask)
    expected = tiny.Step(module, batch, cut=False)
    expected.assert_equals(tiny.Step(module, tiny.SupervisedBatch(noisy, 1), cut=False), TOLERANCE)


def test_the_closing_eos_is_learned_though_it_is_the_pad(llama: str) -> None:
    module = tiny.build(SFT(Base(name=llama)))
    assert module.tokenizer.pad_token_id == module.tokenizer.eos_token_id
    batch = tiny.SupervisedBatch(Sequences.pad([[1, 9, tiny.EOS]], [[False, False, True]]), 100)
    with torch.no_grad():
        logits = module.roles.policy(torch.tensor([[1, 9]])).logits[0, -1]
    expected = -float(logits.log_softmax(-1)[tiny.EOS])
    assert tiny.Step(module, batch).totals["loss"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
def test_a_rollout_is_cut_and_ordered_at_will(llama: str, lora: LoRA | None) -> None:
    """The experience of a prompt, whitened over the whole rollout, whatever carries it out."""
    base = Base(name=llama, lora=lora)
    expected = tiny.make_ppo(base).rollout(tiny.prompts(), 3)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    for budget, rows_at_once in ((1, 1), (20, 3), (tiny.EVERYTHING, 8)):
        module = tiny.make_ppo(base, sampling=tiny.Sampling(max_new_tokens=10, rows_at_once=rows_at_once))
        experience = module.rollout(tiny.prompts(budget=budget).select(order), 3)
        width = experience.sequences.tokens.shape[1]
        assert experience.sequences.tokens.equal(expected.sequences.tokens[order, :width])
        assert experience.sequences.mask.equal(expected.sequences.mask[order, :width])
        for name in ("old_logprobs", "values", "advantages", "returns"):
            torch.testing.assert_close(
                getattr(experience, name), getattr(expected, name)[order, :width], rtol=1e-5, atol=1e-5
            )
