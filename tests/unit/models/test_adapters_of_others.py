"""Adapter folders that peft itself made, with all that its configuration can hold: the same model, or one line."""

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lit.algorithms import DPO, SFT
from rlhf_lit.errors import UserError
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.merging import merged_weights
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.models.roles import Role, Roles
from rlhf_lit.models.saving import save_hf
from rlhf_lit.preflight.models import trainable_parameters
from rlhf_lit.rollout.rewards import RewardFromModel, score_sequences

SEQUENCES = tiny.sequences(tiny.RAGGED)
ATTENTION = ["q_proj", "v_proj"]
PARTS = [["lm_head"], ["embed_tokens"], ["norm"], ["lm_head", "embed_tokens", "norm"]]


def logprobs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return token_logprobs(model, SEQUENCES)


def acting(roles: Roles, role: Role) -> Tensor:
    with roles.acting(role) as model:
        return logprobs(model)


@pytest.fixture(scope="module", params=["apart", "tied"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("base") / "model"
    return tiny.save_model(folder, "qwen2", tie_word_embeddings=request.param == "tied")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save_model(tmp_path_factory.mktemp("qwen") / "model", "qwen2", tie_word_embeddings=False)


def moved(model: Any, seed: int = 1, size: float = 0.1) -> Any:
    """A model whose trainable weights left their start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(size * torch.randn(weight.shape, generator=generator))
    return model.eval()


def by_peft(base: str, folder: Path, scorer: bool = False, seed: int = 1, **settings: Any) -> Any:
    """An adapter that peft made, moved and saved; with a tokenizer beside it. → its model"""
    if scorer:
        model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, pad_token_id=0)
    else:
        model = AutoModelForCausalLM.from_pretrained(base)
    task = "SEQ_CLS" if scorer else "CAUSAL_LM"
    wrapped: Any = get_peft_model(
        model, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "task_type": task, **settings})
    )
    moved(wrapped, seed).save_pretrained(folder)
    tiny.make_tokenizer().save_pretrained(folder)
    return wrapped


def change(folder: Path, **entries: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


# --- modules that train in full --------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_they_are_loaded_trained_saved_and_read_by_peft_again(base: str, tmp_path: Path, parts: list[str]) -> None:
    expected = logprobs(by_peft(base, tmp_path / "theirs", modules_to_save=parts))
    assert float((expected - logprobs(load_causal_lm(Base(base)))).abs().max()) > 0.3
    module = tiny.build(SFT(Base(str(tmp_path / "theirs"))))
    assert logprobs(module.roles.policy).equal(expected)
    names = {name for name, weight in module.named_parameters() if weight.requires_grad}
    for part in parts:
        assert any(f"{part}.modules_to_save.default." in name for name in names), part
    assert not any("original_module" in name for name in names)
    assert module.saved_names() == names
    assert trainable_parameters(module).verdict == "ok"
    step = tiny.Step(module, tiny.supervised())
    assert not step.without_gradient
    moved(module.roles.policy, 2)
    trained = logprobs(module.roles.policy)
    save_hf(module, tmp_path / "hf")
    assert logprobs(load_causal_lm(Base(str(tmp_path / "hf")))).equal(trained)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "hf")).eval()
    assert logprobs(plain).equal(trained)


def continued(place: Path, expected: Tensor) -> DPO:
    """The adapter in ``theirs`` is policy and reference; trained on and saved to ``hf`` it is loaded as it was."""
    module = tiny.build(DPO(Base(str(place / "theirs")), DPOLoss(beta=0.1)))
    assert acting(module.roles, "policy").equal(expected)
    assert acting(module.roles, "reference").equal(expected)
    moved(module.roles.policy, 2)
    assert acting(module.roles, "reference").equal(expected)
    trained = acting(module.roles, "policy")
    save_hf(module, place / "hf")
    assert logprobs(load_causal_lm(Base(str(place / "hf")))).equal(trained)
    return module


@pytest.mark.parametrize("parts", [["embed_tokens"], ["lm_head"], ["lm_head", "embed_tokens"]], ids=" ".join)
def test_tied_copies_stay_tied_where_peft_ties_them(tmp_path: Path, parts: list[str]) -> None:
    base = tiny.save_model(tmp_path / "base", "qwen2", tie_word_embeddings=True)
    settings = {"modules_to_save": parts, "ensure_weight_tying": True}
    expected = logprobs(by_peft(base, tmp_path / "theirs", **settings))
    continued(tmp_path, expected)


@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_each_role_has_its_own(base: str, tmp_path: Path, parts: list[str]) -> None:
    """Of a new adapter the reference is the bare base; of one from a folder, that folder's model."""
    bare = logprobs(load_causal_lm(Base(base)))
    lora = LoRA(rank=4, targets=ATTENTION, modules_to_save=parts)
    fresh = tiny.build(DPO(Base(base, lora=lora), DPOLoss(beta=0.1)))
    assert acting(fresh.roles, "policy").equal(bare)
    moved(fresh.roles.policy)
    assert acting(fresh.roles, "reference").equal(bare)
    expected = acting(fresh.roles, "policy")
    assert float((expected - bare).abs().max()) > 0.3
    save_hf(fresh, tmp_path / "hf")
    module = tiny.make_ppo(Base(str(tmp_path / "hf"), lora=lora))
    assert acting(module.roles, "policy").equal(expected)
    moved(module.roles.policy, 3)
    assert acting(module.roles, "reference").equal(expected)
    policy, reference = acting(module.roles, "policy"), acting(module.roles, "reference")
    ours = {id(weight) for weight in module.roles.critic_parameters()}
    with torch.no_grad():
        for weight in module.parameters():
            if id(weight) in ours:
                weight.add_(0.1)
    assert acting(module.roles, "policy").equal(policy)
    assert acting(module.roles, "reference").equal(reference)
    copies = [name for name, w in module.named_parameters() if ".modules_to_save.value." in name and id(w) in ours]
    assert len(copies) == sum(".modules_to_save.value." in name for name, _ in module.named_parameters())
    assert {part for part in parts if any(f"{part}.modules" in name for name in copies)} == {*parts} - {"lm_head"}
    experience = module.rollout(tiny.prompts(), 0)
    assert not tiny.Step(module, experience).without_gradient


def test_a_new_adapter_with_a_moved_module_alone_is_touched(qwen: str) -> None:
    roles = Roles(Base(qwen, lora=LoRA(rank=4, modules_to_save=["norm"])))
    with torch.no_grad():
        for name, weight in roles.policy.named_parameters():
            if "modules_to_save" in name:
                weight.mul_(1.5)
    expected = acting(roles, "policy")
    roles.add_reference()
    assert acting(roles, "reference").equal(expected)
    roles.drop_reference()
    assert not any("reference" in name for name, _ in roles.policy.named_parameters())
    assert acting(roles, "policy").equal(expected)


def test_a_moving_reference_takes_them_along(qwen: str) -> None:
    roles = Roles(Base(qwen, lora=LoRA(rank=4, targets=["q_proj", "embed_tokens"], modules_to_save=["norm"])))
    roles.add_reference(own=True)
    moved(roles.policy)
    roles.move_reference(1.0)
    assert acting(roles, "reference").equal(acting(roles, "policy"))


def test_an_adapter_on_the_embeddings_alone_is_no_bare_base(qwen: str, tmp_path: Path) -> None:
    expected = logprobs(by_peft(qwen, tmp_path / "theirs", target_modules=["embed_tokens"]))
    module = tiny.build(DPO(Base(str(tmp_path / "theirs")), DPOLoss(beta=0.1)))
    assert acting(module.roles, "policy").equal(expected)
    assert acting(module.roles, "reference").equal(expected)


def test_the_critics_adapter_on_the_embeddings_is_the_critics(qwen: str) -> None:
    module = tiny.make_ppo(Base(qwen, lora=LoRA(rank=4, targets=["embed_tokens"])))
    own = {id(weight) for weight in module.roles.critic_parameters()}
    names = [name for name, weight in module.named_parameters() if id(weight) in own]
    assert sum("lora_embedding" in name for name in names) == 2


@pytest.mark.parametrize("parts", PARTS, ids=" ".join)
def test_merged_weights_hold_them(qwen: str, tmp_path: Path, parts: list[str]) -> None:
    expected = logprobs(by_peft(qwen, tmp_path / "theirs", modules_to_save=parts))
    weights = dict(merged_weights(load_causal_lm(Base(str(tmp_path / "theirs")))))
    plain = load_causal_lm(Base(qwen))
    result = plain.load_state_dict(weights, strict=False)
    assert not result.unexpected_keys
    assert not result.missing_keys
    torch.testing.assert_close(logprobs(plain), expected, rtol=0, atol=1e-5)


# --- a reward adapter on the policy's base ---------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["norm", "embed_tokens", "layers.1.mlp.down_proj"])
@pytest.mark.parametrize("lora", [LoRA(rank=4), LoRA(rank=2, modules_to_save=["norm"])], ids=["plain", "with norm"])
def test_a_reward_with_more_than_a_head_leaves_policy_and_reference_alone(
    qwen: str, tmp_path: Path, part: str, lora: LoRA
) -> None:
    by_peft(qwen, tmp_path / "reward", scorer=True, modules_to_save=[part])
    expected = score_sequences(load_scorer(Base(str(tmp_path / "reward")), trained=True), SEQUENCES, 1000)
    lora = LoRA(rank=lora.rank, targets=ATTENTION, modules_to_save=lora.modules_to_save)
    module = tiny.make_ppo(Base(qwen, lora=lora))
    moved(module.roles.policy)
    before = {role: acting(module.roles, role) for role in ("policy", "reference")}
    trains = {name for name, weight in module.named_parameters() if weight.requires_grad}
    reward = RewardFromModel(str(tmp_path / "reward"))
    reward.share(module.roles)
    for role, found in before.items():
        assert acting(module.roles, role).equal(found), role
    scores = reward(SEQUENCES, [""] * len(SEQUENCES), [""] * len(SEQUENCES), [{}] * len(SEQUENCES), 1000)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=1e-6)
    assert float(expected.std()) > 1e-3
    assert trains == {name for name, weight in module.named_parameters() if weight.requires_grad}
    assert trainable_parameters(module).verdict == "ok"


def test_a_reward_that_adapts_what_the_policy_trains_in_full_is_refused(qwen: str, tmp_path: Path) -> None:
    by_peft(qwen, tmp_path / "reward", scorer=True)
    lora = LoRA(rank=4, targets=["down_proj"], modules_to_save=["layers.0.self_attn"])
    with pytest.raises(UserError, match=r"reward\.path: .*self_attn.*in full \(modules_to_save\) and by an adapter"):
        tiny.make_ppo(Base(qwen, lora=lora), reward=RewardFromModel(str(tmp_path / "reward")))
    by_peft(qwen, tmp_path / "full", scorer=True, target_modules=["q_proj"], modules_to_save=["down_proj"])
    with pytest.raises(UserError, match=r"reward\.path: .*modules_to_save cannot be applied"):
        tiny.make_ppo(Base(qwen, lora=LoRA(rank=4)), reward=RewardFromModel(str(tmp_path / "full")))


def test_a_critic_from_a_reward_with_more_than_a_head_trains_its_own_copies(qwen: str, tmp_path: Path) -> None:
    by_peft(qwen, tmp_path / "reward", scorer=True, modules_to_save=["norm"])
    lora = LoRA(rank=4, targets=ATTENTION)
    reward = RewardFromModel(str(tmp_path / "reward"))
    module = tiny.make_ppo(Base(qwen, lora=lora), reward=reward, critic=tiny.Critic("reward"))
    assert acting(module.roles, "policy").equal(logprobs(load_causal_lm(Base(qwen))))
    trained = [name for name, weight in module.named_parameters() if weight.requires_grad and "norm" in name]
    assert trained
    assert all(".modules_to_save.value." in name for name in trained)
    experience = module.rollout(tiny.prompts(), 0)
    tiny.disturb(module, 0.02)
    assert not tiny.Step(module, experience).without_gradient


def test_a_language_models_adapter_as_the_start_of_a_reward_model(qwen: str, tmp_path: Path) -> None:
    """Its LM head stays behind, by name, and its other modules come along."""
    parts = ["lm_head", "norm"]
    theirs = by_peft(qwen, tmp_path / "theirs", target_modules=[*ATTENTION, "lm_head"], modules_to_save=["norm"])
    by_peft(qwen, tmp_path / "in full", modules_to_save=parts)
    for name in ("theirs", "in full"):
        model: Any = load_scorer(Base(str(tmp_path / name)))
        norm = model.get_base_model().model.norm.modules_to_save["default"].weight
        assert not norm.eq(1).all()
    body = theirs.get_base_model().model
    with torch.no_grad():
        expected = body(SEQUENCES.tokens).last_hidden_state
        found = load_scorer(Base(str(tmp_path / "theirs"))).get_base_model().model(SEQUENCES.tokens).last_hidden_state
    assert found.equal(expected)


# --- what the configuration may hold besides -------------------------------------------------------------------------

WORKS: dict[str, dict[str, Any]] = {
    "rank pattern": {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    "one layer": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"exclude_modules": ["layers.0.self_attn.q_proj"]},
    "regex": {"target_modules": r".*\.1\..*\.(q|o)_proj"},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "bias of the adapter": {"lora_bias": True},
    "gaussian": {"init_lora_weights": "gaussian"},
    "a parameter": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "LM head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("kind", WORKS)
def test_what_works_is_the_same_model_in_every_role_and_after_saving(qwen: str, tmp_path: Path, kind: str) -> None:
    expected = logprobs(by_peft(qwen, tmp_path / "theirs", **WORKS[kind]))
    bare = logprobs(load_causal_lm(Base(qwen)))
    assert float((expected - bare).abs().max()) > 0.01
    module = continued(tmp_path, expected)
    with torch.no_grad(), module.roles.policy.disable_adapter():
        assert logprobs(module.roles.policy).equal(bare)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bias": ({"bias": "all"}, "sets bias: 'all'"),
    "bias of its layers": ({"bias": "lora_only"}, "sets bias: 'lora_only'"),
    "replicated layers": ({"layer_replication": [[0, 2], [1, 2]]}, "sets layer_replication"),
    "single tokens": ({"trainable_token_indices": [3, 4]}, "sets trainable_token_indices"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights: 'pissa' changes the base's own weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora'"),
    "activated": ({"alora_invocation_tokens": [3]}, "sets alora_invocation_tokens"),
    "of a newer peft": ({"hyper_lora": {"depth": 2}}, "sets hyper_lora"),
    "another method": ({"peft_type": "IA3", "feedforward_modules": []}, "an adapter of kind IA3"),
    "prefixes": ({"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 3}, "an adapter of kind PREFIX_TUNING"),
    "a target": ({"target_modules": ["q_proj", "v_porj"]}, "target_modules names 'v_porj', which is nowhere"),
    "a module": ({"modules_to_save": ["nrom"]}, "modules_to_save names 'nrom', which is nowhere"),
    "a pattern": ({"rank_pattern": {"k_porj": 2}}, "rank_pattern names 'k_porj', which is nowhere"),
    "a layer": ({"layers_to_transform": [0, 7]}, "layers_to_transform names 7, which is nowhere"),
    "rank": ({"r": 8}, r"of shape \[4, 32\], and this model with its configuration takes \[8, 32\]"),
    "more targets": ({"target_modules": [*ATTENTION, "k_proj"]}, r"lacks .*layers\.0\.self_attn\.k_proj\.lora_A"),
    "fewer targets": ({"target_modules": ["q_proj"]}, r"holds .*v_proj\.lora_A\.weight.* has no use for"),
    "no number": ({"r": "many"}, "'<=' not supported"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_does_not_work_is_refused_by_name(qwen: str, tmp_path: Path, kind: str) -> None:
    entries, reason = REFUSED[kind]
    by_peft(qwen, tmp_path / "theirs")
    change(tmp_path / "theirs", **entries)
    with pytest.raises(UserError, match=rf"base\.name: .*theirs.*{reason}|theirs.*{reason}") as caught:
        load_causal_lm(Base(str(tmp_path / "theirs")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        (LoRA(targets=["q_proj", "v_porj"]), "targets names 'v_porj', which is nowhere"),
        (LoRA(targets=["v_porj"]), "v_porj"),
        (LoRA(modules_to_save=["nrom"]), "modules_to_save names 'nrom', which is nowhere"),
        (LoRA(targets=["q_proj"], modules_to_save=["q_proj"]), "q_proj|modules_to_save"),
    ],
    ids=["one of two", "the only one", "a module", "both"],
)
def test_our_own_settings_are_held_to_the_same(qwen: str, lora: LoRA, reason: str) -> None:
    with pytest.raises(UserError, match=rf"base\.lora: .*({reason})"):
        load_causal_lm(Base(qwen, lora=lora))


def test_on_a_4_bit_base_what_is_not_in_4_bits_trains_in_full(qwen: str, tmp_path: Path) -> None:
    four = Quantization(compute_dtype="float32")
    with pytest.raises(UserError, match=r"base\.lora: modules_to_save names .*q_proj, which is in 4 bits"):
        load_causal_lm(Base(qwen, lora=LoRA(targets=["v_proj"], modules_to_save=["q_proj"]), quantization=four))
    lora = LoRA(rank=4, modules_to_save=["lm_head", "norm"])
    module = tiny.build(DPO(Base(qwen, lora=lora, quantization=four), DPOLoss(beta=0.1)))
    start = acting(module.roles, "policy")
    moved(module.roles.policy)
    assert acting(module.roles, "reference").equal(start)
    save_hf(module, tmp_path / "hf")
    assert logprobs(load_causal_lm(Base(str(tmp_path / "hf")))).equal(acting(module.roles, "policy"))


def test_other_modules_than_the_folders_are_refused(qwen: str, tmp_path: Path) -> None:
    by_peft(qwen, tmp_path / "theirs", modules_to_save=["norm"])
    load_causal_lm(Base(str(tmp_path / "theirs"), lora=LoRA(rank=4, alpha=8, modules_to_save=["norm"])))
    with pytest.raises(UserError, match=r"modules_to_save \['norm'\], which is continued"):
        load_causal_lm(Base(str(tmp_path / "theirs"), lora=LoRA(rank=4, alpha=8, modules_to_save=["lm_head"])))


# --- the file of its weights -----------------------------------------------------------------------------------------


def test_half_of_the_tensors_missing_is_no_adapter(qwen: str, tmp_path: Path) -> None:
    by_peft(qwen, tmp_path, modules_to_save=["norm"])
    file = tmp_path / "adapter_model.safetensors"
    weights = load_file(file)
    for kept in (sorted(weights)[::2], sorted(weights)[1::2], sorted(weights)[:-1]):
        save_file({key: weights[key] for key in kept}, file)
        with pytest.raises(UserError, match=r"adapter_model\.safetensors lacks base_model\.model\..* of 13 tensors"):
            load_causal_lm(Base(str(tmp_path)))


@pytest.mark.parametrize("size", [0, 5, 200, -20])
def test_a_file_that_is_cut_short_names_itself(qwen: str, tmp_path: Path, size: int) -> None:
    by_peft(qwen, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read .*cut short or damaged"):
        load_causal_lm(Base(str(tmp_path)))


def test_damaged_or_missing_files_name_themselves(qwen: str, tmp_path: Path) -> None:
    by_peft(qwen, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no adapter_model\.safetensors beside it"):
        load_causal_lm(Base(str(tmp_path)))
    for text in ("{", "[]", "{}", '{"peft_type": 3}', '{"peft_type": "NOTHING"}'):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(UserError, match=r"adapter_config\.json"):
            load_causal_lm(Base(str(tmp_path)))


def test_embeddings_that_peft_writes_beside_are_the_bases_or_refused(qwen: str, tmp_path: Path) -> None:
    theirs = by_peft(qwen, tmp_path / "beside")
    theirs.save_pretrained(tmp_path / "beside", save_embedding_layers=True)
    assert any("embed_tokens" in key for key in load_file(tmp_path / "beside" / "adapter_model.safetensors"))
    assert logprobs(load_causal_lm(Base(str(tmp_path / "beside")))).equal(logprobs(theirs))
    file = tmp_path / "beside" / "adapter_model.safetensors"
    save_file({key: w + ("embed" in key) for key, w in load_file(file).items()}, file)
    with pytest.raises(UserError, match=r"embed_tokens\.weight, a weight of the base, and not as it is in the base"):
        load_causal_lm(Base(str(tmp_path / "beside")))
    resized = AutoModelForCausalLM.from_pretrained(qwen)
    resized.resize_token_embeddings(tiny.VOCABULARY + 8)
    wrapped = get_peft_model(resized, LoraConfig(r=4, target_modules=ATTENTION, task_type="CAUSAL_LM"))
    moved(wrapped).save_pretrained(tmp_path / "resized")
    with pytest.raises(UserError, match=r"lm_head.* of shape \[48, 32\], and the base's is \[40, 32\]: .*resized"):
        load_causal_lm(Base(str(tmp_path / "resized")))
