"""Roles on one LoRA base: who is in force when, and who moves when another one trains."""

from pathlib import Path

import pytest
import tiny
import torch
from torch import Tensor

from rlhf_lit.algorithms import DPO, SFT, RewardModel
from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.errors import UserError
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.models.adapter_names import switched_modules
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.heads import token_values
from rlhf_lit.models.loading import load_causal_lm
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.models.roles import Role, Roles
from rlhf_lit.models.saving import save_hf
from rlhf_lit.rollout.rewards import RewardFromModel

ADAPTER = LoRA(rank=4)
SEQUENCES = tiny.sequences(tiny.RAGGED)


def logprobs(roles: Roles, role: Role) -> Tensor:
    with torch.no_grad(), roles.acting(role) as model:
        return token_logprobs(model, SEQUENCES)


def bare(folder: str) -> Tensor:
    with torch.no_grad():
        return token_logprobs(load_causal_lm(Base(name=folder)), SEQUENCES)


def train(module: Algorithm, batch: object, steps: int = 3) -> None:
    """A few optimizer steps."""
    optimizer = torch.optim.AdamW(module.trainable_parameters(), lr=1e-2)
    for _ in range(steps):
        tiny.Step(module, batch)
        optimizer.step()


def states(roles: Roles) -> list[tuple[bool, object]]:
    switches = [(layer._disable_adapters, tuple(layer._active_adapter)) for layer in switched_modules(roles.policy)]
    return [*switches, *((p.requires_grad, name) for name, p in roles.named_parameters())]


def test_a_fresh_adapter_is_the_base_to_the_bit(llama: str) -> None:
    roles = Roles(Base(name=llama, lora=ADAPTER), reference=True)
    assert logprobs(roles, "policy").equal(bare(llama))
    assert logprobs(roles, "reference").equal(bare(llama))


def test_adapters_off_stay_the_base_to_the_bit_while_the_policy_trains(llama: str) -> None:
    module = tiny.build(DPO(Base(name=llama, lora=ADAPTER), DPOLoss(beta=0.1)))
    train(module, tiny.preferences())
    assert logprobs(module.roles, "reference").equal(bare(llama))
    assert float((logprobs(module.roles, "policy") - bare(llama)).abs().max()) > 0.1


def test_without_lora_the_reference_is_a_frozen_copy(llama: str) -> None:
    module = tiny.build(DPO(Base(name=llama), DPOLoss(beta=0.1)))
    train(module, tiny.preferences())
    assert logprobs(module.roles, "reference").equal(bare(llama))
    assert float((logprobs(module.roles, "policy") - bare(llama)).abs().max()) > 0.1
    assert not any(p.requires_grad for p in module.roles.models["reference"].parameters())


def test_acting_changes_no_requires_grad_and_restores_the_role(llama: str) -> None:
    module = tiny.make_ppo(Base(name=llama, lora=ADAPTER))
    before = states(module.roles)
    trainable = {name for _, name in before if isinstance(name, str)}
    assert trainable
    for outer in ("policy", "reference", "value"):
        with module.roles.acting(outer):
            for inner in ("policy", "reference", "value"):
                within = states(module.roles)
                with module.roles.acting(inner):
                    requires = [entry for entry in states(module.roles) if isinstance(entry[1], str)]
                    assert requires == [entry for entry in before if isinstance(entry[1], str)]
                assert states(module.roles) == within
    with pytest.raises(RuntimeError), module.roles.acting("reference"):
        raise RuntimeError
    assert states(module.roles) == before


def test_policy_and_value_adapters_both_train_and_the_base_does_not(llama: str) -> None:
    module = tiny.make_ppo(Base(name=llama, lora=ADAPTER))
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    assert all("lora_" in name or name.startswith("roles.heads.value") for name in names)
    for adapter in (".default.", ".value."):
        assert sum("lora_" in name and adapter in name for name in names) == 28
    experience = module.rollout(tiny.prompts(), 0)
    tiny.disturb(module, 0.02)
    step = tiny.Step(module, experience)
    assert not step.without_gradient
    assert all(gradient.any() for gradient in step.gradients.values())


def test_the_value_adapters_update_leaves_the_policy_alone_to_the_bit(llama: str) -> None:
    module = tiny.make_ppo(Base(name=llama, lora=ADAPTER))
    policy, reference = logprobs(module.roles, "policy"), logprobs(module.roles, "reference")
    with torch.no_grad(), module.roles.acting("value") as model:
        values = token_values(model, module.roles.heads["value"], SEQUENCES)
    value_parameters = [p for name, p in module.named_parameters() if ".value." in name and p.requires_grad]
    optimizer = torch.optim.AdamW(value_parameters, lr=1e-2)
    tiny.Step(module, module.rollout(tiny.prompts(), 0))
    optimizer.step()
    tiny.Step(module, module.rollout(tiny.prompts(), 1))
    optimizer.step()
    assert logprobs(module.roles, "policy").equal(policy)
    assert logprobs(module.roles, "reference").equal(reference)
    with torch.no_grad(), module.roles.acting("value") as model:
        assert not token_values(model, module.roles.heads["value"], SEQUENCES).equal(values)


def test_a_critic_without_lora_is_a_model_of_its_own(llama: str) -> None:
    module = tiny.make_ppo(Base(name=llama))
    policy = {id(p) for p in module.roles.policy.parameters()}
    critic = list(module.roles.models["value"].parameters())
    assert not policy & {id(p) for p in critic}
    assert all(p.requires_grad for p in critic)


@pytest.fixture(scope="module")
def sft_adapter(llama: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """An SFT run's exported adapter, well off its base."""
    module = tiny.build(SFT(Base(name=llama, lora=ADAPTER)))
    train(module, tiny.supervised())
    folder = tmp_path_factory.mktemp("sft-lora")
    save_hf(module, folder)
    return str(folder)


@pytest.mark.parametrize("named", [None, ADAPTER], ids=["as it is", "lora named again"])
def test_an_sft_adapters_reference_is_the_sft_model_not_the_bare_base(
    llama: str, sft_adapter: str, named: LoRA | None
) -> None:
    expected = bare(sft_adapter)
    assert float((expected - bare(llama)).abs().max()) > 0.1
    module = tiny.build(DPO(Base(name=sft_adapter, lora=named), DPOLoss(beta=0.1)))
    assert logprobs(module.roles, "policy").equal(expected)
    assert logprobs(module.roles, "reference").equal(expected)
    assert tiny.Step(module, tiny.preferences()).totals["margin"] == 0.0
    train(module, tiny.preferences())
    assert logprobs(module.roles, "reference").equal(expected)
    assert not logprobs(module.roles, "policy").equal(expected)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    assert names
    assert all(".default." in name for name in names)


def test_ppo_on_an_sft_adapter_has_three_adapters(sft_adapter: str) -> None:
    module = tiny.make_ppo(Base(name=sft_adapter))
    expected = bare(sft_adapter)
    experience = module.rollout(tiny.prompts(), 0)
    assert module.rollout_metrics["objective/kl_exact"] == 0.0
    step = tiny.Step(module, experience)
    assert step.totals["policy/approxkl"] == 0.0
    assert not any(".reference." in name for name in step.gradients)
    assert any(".value." in name for name in step.gradients)
    train(module, experience)
    assert logprobs(module.roles, "reference").equal(expected)


def test_another_lora_than_the_folders_is_refused(sft_adapter: str) -> None:
    with pytest.raises(UserError, match="already holds an adapter of rank 4"):
        load_causal_lm(Base(name=sft_adapter, lora=LoRA(rank=8)))


@pytest.mark.parametrize("start", ["base", "sft adapter"])
def test_gradient_checkpointing_gives_the_same_gradients_in_every_role(
    llama: str, sft_adapter: str, start: str
) -> None:
    folder, lora = (llama, ADAPTER) if start == "base" else (sft_adapter, None)
    steps = []
    for checkpointing in (False, True):
        module = tiny.make_ppo(Base(name=folder, lora=lora, gradient_checkpointing=checkpointing))
        experience = module.rollout(tiny.prompts(), 0)
        tiny.disturb(module, 0.03)
        steps.append(tiny.Step(module, experience))
    recomputing = [m for m in module.modules() if getattr(m, "gradient_checkpointing", False) and m.training]
    assert len(recomputing) == 2  # the two layers of the shared base: checkpointing is on without dropout
    steps[0].assert_equals(steps[1], 1e-6)


def test_gradients_after_a_rollout_equal_those_before_in_4_bit(llama: str) -> None:
    """On CPUs with AVX512-BF16 a no-grad forward in eval mode repacks 4-bit weights: later gradients are wrong."""
    base = Base(name=llama, lora=ADAPTER, quantization=Quantization(compute_dtype="float32"))
    module = tiny.make_ppo(base)
    tiny.disturb(module, 0.03)
    experience = module.rollout(tiny.prompts(), 0)
    fresh = tiny.make_ppo(base)
    tiny.disturb(fresh, 0.03)
    before, after = tiny.Step(fresh, experience), tiny.Step(module, experience)
    assert not after.without_gradient
    assert before.distance(after) == 0.0
    module.rollout(tiny.prompts(), 1)
    assert tiny.Step(module, experience).distance(after) == 0.0


def test_4_bit_layers_keep_their_layout(llama: str) -> None:
    from bitsandbytes.nn import Linear4bit

    model = load_causal_lm(Base(name=llama, lora=ADAPTER, quantization=Quantization()))
    layers = [module for module in model.modules() if isinstance(module, Linear4bit)]
    assert len(layers) == 14
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)


@pytest.mark.parametrize("lora", [None, ADAPTER], ids=["full", "lora"])
def test_a_critic_starts_with_the_reward_models_scores(llama: str, lora: LoRA | None, tmp_path: Path) -> None:
    """The value of a whole sequence's last state is the reward model's score, its centring constant included."""
    reward = tiny.build(RewardModel(Base(name=llama, lora=lora)))
    train(reward, tiny.preferences())
    reward.normalise([tiny.preferences()])
    save_hf(reward, tmp_path)
    module = tiny.make_ppo(
        Base(name=llama, lora=lora), reward=RewardFromModel(str(tmp_path)), critic=tiny.Critic(init="reward")
    )
    extended = [row[:n].tolist() for row, n in zip(SEQUENCES.tokens, SEQUENCES.lengths, strict=True)]
    longer = tiny.Sequences.pad([[*row, 5] for row in extended], [[False] * len(row) + [True] for row in extended])
    with torch.no_grad(), module.roles.acting("value") as model:
        values = token_values(model, module.roles.heads["value"], longer).sum(-1)
        expected = reward.scores(SEQUENCES)
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)


def test_a_full_reward_model_for_a_lora_policy_is_refused(llama: str, tmp_path: Path) -> None:
    save_hf(tiny.build(RewardModel(Base(name=llama))), tmp_path)
    with pytest.raises(UserError, match="is a full model"):
        tiny.make_ppo(
            Base(name=llama, lora=ADAPTER), reward=RewardFromModel(str(tmp_path)), critic=tiny.Critic(init="reward")
        )
