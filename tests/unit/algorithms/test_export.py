"""What a run leaves behind: checkpoints without the base, and folders that plain transformers and peft load."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf_lit.__main__ import main
from rlhf_lit.algorithms import DPO, SFT, RewardModel
from rlhf_lit.algorithms.algorithm import Algorithm
from rlhf_lit.batches import Sequences
from rlhf_lit.commands.export import export
from rlhf_lit.data.chat import ChatFormat
from rlhf_lit.data.records import Message
from rlhf_lit.errors import UserError
from rlhf_lit.losses.preference import DPOLoss
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.loading import load_causal_lm, load_scorer, load_tokenizer
from rlhf_lit.models.quantization import Quantization
from rlhf_lit.models.saving import save_hf
from rlhf_lit.rollout.rewards import score_sequences

LORAS = pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
SEQUENCES = tiny.sequences(tiny.RAGGED)
ATTENTION = (torch.arange(SEQUENCES.tokens.shape[1])[None] < SEQUENCES.lengths[:, None]).long()


def plain(folder: Path, auto_class: str, adapter_base: str | None, **keywords: Any) -> Any:
    """The folder as someone without this package loads it."""
    import transformers
    from peft import PeftModel

    auto = getattr(transformers, auto_class)
    if adapter_base is None:
        return auto.from_pretrained(folder, **keywords).eval()
    named = json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == adapter_base
    return PeftModel.from_pretrained(auto.from_pretrained(named, **keywords), folder).eval()


@LORAS
@pytest.mark.parametrize("algorithm", ["sft", "dpo", "ppo"])
def test_policies_load_in_plain_transformers(llama: str, tmp_path: Path, algorithm: str, lora: LoRA | None) -> None:
    base = Base(name=llama, lora=lora)
    modules = {
        "sft": lambda: tiny.build(SFT(base)),
        "dpo": lambda: tiny.build(DPO(base, DPOLoss(beta=0.1))),
        "ppo": lambda: tiny.make_ppo(base),
    }
    module: Any = modules[algorithm]()
    tiny.disturb(module, 0.05)
    module.eval()
    save_hf(module, tmp_path)
    with torch.no_grad():
        expected = module.roles.policy(SEQUENCES.tokens, attention_mask=ATTENTION).logits
        untrained = load_causal_lm(Base(name=llama))(SEQUENCES.tokens, attention_mask=ATTENTION).logits
        loaded = plain(tmp_path, "AutoModelForCausalLM", llama if lora else None)
        logits = loaded(SEQUENCES.tokens, attention_mask=ATTENTION).logits
        own = load_causal_lm(Base(name=str(tmp_path)))(SEQUENCES.tokens, attention_mask=ATTENTION).logits
    assert float((expected - untrained).abs().max()) > 0.1
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-6)
    assert load_tokenizer(Base(name=str(tmp_path))).get_vocab() == module.tokenizer.get_vocab()
    if lora:
        assert not list(tmp_path.glob("model*.safetensors"))
        assert not any(entry.is_dir() for entry in tmp_path.iterdir())  # no value or reference adapter


def trained_scorer(base: Base) -> RewardModel:
    module = tiny.build(RewardModel(base))
    tiny.disturb(module, 0.05)
    module.eval()
    module.normalise([tiny.preferences()])
    return module


@LORAS
def test_reward_models_score_alike_in_plain_transformers(llama: str, tmp_path: Path, lora: LoRA | None) -> None:
    """The classifier's logit plus the constant of reward.json, right-padded together or one by one."""
    module = trained_scorer(Base(name=llama, lora=lora))
    save_hf(module, tmp_path)
    with torch.no_grad():
        expected = module.scores(SEQUENCES)
    assert float(expected.std()) > 0.05
    record = json.loads((tmp_path / "reward.json").read_text())
    loaded = plain(tmp_path, "AutoModelForSequenceClassification", llama if lora else None, num_labels=1)
    assert record["pad_token_id"] != tiny.EOS
    unwrapped(loaded).config.pad_token_id = record["pad_token_id"]
    if not lora:
        assert plain(tmp_path, "AutoModelForSequenceClassification", None).config.pad_token_id == record["pad_token_id"]
    padded = torch.where(ATTENTION.bool(), SEQUENCES.tokens, record["pad_token_id"])
    with torch.no_grad():
        together = loaded(padded, attention_mask=ATTENTION).logits[:, 0] + record["bias"]
        singly = [loaded(row[None, :n]).logits[0, 0] for row, n in zip(padded, SEQUENCES.lengths, strict=True)]
    torch.testing.assert_close(together, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.stack(singly) + record["bias"], expected, rtol=1e-5, atol=1e-5)


@LORAS
def test_reward_models_reload_with_equal_scores(llama: str, tmp_path: Path, lora: LoRA | None) -> None:
    module = trained_scorer(Base(name=llama, lora=lora))
    save_hf(module, tmp_path / "first")
    with torch.no_grad():
        expected = module.scores(SEQUENCES)
    again = load_scorer(Base(name=str(tmp_path / "first")))
    torch.testing.assert_close(score_sequences(again, SEQUENCES, 1000), expected, rtol=1e-6, atol=1e-6)
    # Trained further from there, saved and loaded: the constant is carried along.
    further = trained_scorer(Base(name=str(tmp_path / "first")))
    save_hf(further, tmp_path / "second")
    with torch.no_grad():
        expected = further.scores(SEQUENCES)
    again = load_scorer(Base(name=str(tmp_path / "second")))
    torch.testing.assert_close(score_sequences(again, SEQUENCES, 1000), expected, rtol=1e-6, atol=1e-6)


@LORAS
def test_centring_brings_the_chosen_responses_to_zero(llama: str, lora: LoRA | None) -> None:
    module = tiny.build(RewardModel(Base(name=llama, lora=lora)))
    tiny.disturb(module, 0.05)
    module.eval()
    pairs = tiny.preferences()
    with torch.no_grad():
        before = module.scores(pairs.chosen)
        for budget in (30, 1):
            module.normalise([tiny.preferences(budget)])
            after = module.scores(pairs.chosen)
            assert float(after.mean()) == pytest.approx(0, abs=1e-6)
        torch.testing.assert_close(after - after.mean(), before - before.mean(), rtol=1e-5, atol=1e-6)


def test_a_reward_model_from_an_sft_adapter_keeps_it(llama: str, tmp_path: Path) -> None:
    """The body of the scorer is the SFT model, under an untrained head."""
    sft = tiny.build(SFT(Base(name=llama, lora=LoRA(rank=4))))
    tiny.disturb(sft, 0.05)
    save_hf(sft, tmp_path)
    scorer = load_scorer(Base(name=str(tmp_path)))

    def states(model: Any) -> Tensor:
        with torch.no_grad():
            return model.get_base_model().model(SEQUENCES.tokens).last_hidden_state

    torch.testing.assert_close(states(scorer), states(sft.roles.policy.eval()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("quantization", [None, Quantization()], ids=["lora", "4-bit"])
@pytest.mark.parametrize("algorithm", ["sft", "reward", "dpo", "ppo"])
def test_a_lora_checkpoint_holds_no_base_weight(llama: str, algorithm: str, quantization: Quantization | None) -> None:
    base = Base(name=llama, lora=LoRA(rank=4), quantization=quantization)
    modules: dict[str, Any] = {
        "sft": lambda: tiny.build(SFT(base)),
        "reward": lambda: tiny.build(RewardModel(base)),
        "dpo": lambda: tiny.build(DPO(base, DPOLoss(beta=0.1))),
        "ppo": lambda: tiny.make_ppo(base),
    }
    module: Algorithm = modules[algorithm]()
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    kept = checkpoint["state_dict"]
    assert set(kept) == {name for name, p in module.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "score" in name or "heads.value" in name for name in kept)
    assert sum("lora_" in name for name in kept) == (56 if algorithm == "ppo" else 28)

    # Loaded into a fresh module it gives the same model.
    tiny.disturb(module, 0.05)
    other: Algorithm = modules[algorithm]()
    batch = tiny.supervised() if algorithm == "sft" else tiny.preferences()
    if algorithm == "ppo":
        batch = module.rollout(tiny.prompts(), 0)  # type: ignore[operator]
    other.load_state_dict({name: p for name, p in module.state_dict().items() if name in kept}, strict=False)
    assert tiny.Step(module, batch).totals == tiny.Step(other, batch).totals


def test_a_full_checkpoint_leaves_the_reference_out(llama: str) -> None:
    module = tiny.make_ppo(Base(name=llama))
    checkpoint: dict[str, Any] = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    assert checkpoint["kl_multiplier"] == 1.0
    kept = checkpoint["state_dict"]
    assert not any(name.startswith("roles.models.reference") for name in kept)
    assert any(name.startswith("roles.models.policy") for name in kept)
    assert any(name.startswith("roles.models.value") for name in kept)
    assert "roles.heads.value.weight" in kept


# --- the command's function ------------------------------------------------------------------------------------------


def trained_policy(base: Base, amount: float = 0.05) -> Any:
    """An SFT model some updates away from its base."""
    module = tiny.build(SFT(base))
    tiny.disturb(module, amount)
    module.eval()
    return module


def draw_biases(folder: str) -> None:
    """Give a saved model biases that are not 0, as they are when drawn."""
    model: Any = load_causal_lm(Base(name=folder))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(len(name)))
    model.save_pretrained(folder)


def logits_of(model: Any) -> Tensor:
    """The logits of the real tokens of the ragged rows, [n, vocabulary] in float32."""
    with torch.no_grad():
        return model(SEQUENCES.tokens, attention_mask=ATTENTION).logits[ATTENTION.bool()].float()


def printed(line: str) -> float:
    """The difference that the command prints."""
    match = re.search(r"largest logit difference to the run's own model (\S+) \(", line)
    assert match, line
    return float(match[1])


KINDS = {
    "llama": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "biases": ("qwen2", {}, {}),
    "gpt2": ("gpt2", {}, {}),
    "dora": ("llama", {}, {"dora": True}),
    "rslora": ("llama", {}, {"rslora": True, "alpha": 3.0}),
    # The head alone is adapted, and shares its weights with embeddings that are not.
    "tied head": ("llama", {"tie_word_embeddings": True}, {"targets": ["lm_head", "q_proj"]}),
    "tied embeddings": ("llama", {"tie_word_embeddings": True}, {"targets": ["embed_tokens", "q_proj"]}),
    # Modules that train in full; of tied ones, each that is named has weights of its own.
    "in full": ("llama", {}, {"modules_to_save": ["lm_head", "embed_tokens", "norm"]}),
    "tied head in full": ("llama", {"tie_word_embeddings": True}, {"modules_to_save": ["lm_head"]}),
    "tied embeddings in full": ("llama", {"tie_word_embeddings": True}, {"modules_to_save": ["embed_tokens"]}),
}


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings", "ignore:.*save_embedding_layers")
@pytest.mark.parametrize("kind", KINDS)
def test_a_merged_policy_is_the_trained_one(tmp_path: Path, kind: str) -> None:
    family, sizes, lora = KINDS[kind]
    folder = tiny.save_model(tmp_path / "base", family, **sizes)
    draw_biases(folder)
    module = trained_policy(Base(name=folder, lora=LoRA(rank=4, **lora)), amount=0.03)
    expected = logits_of(module.roles.policy)
    save_hf(module, tmp_path / "run" / "hf")
    line = export(str(tmp_path / "run"), merge=True, to=str(tmp_path / "whole"))
    merged = plain(tmp_path / "whole", "AutoModelForCausalLM", None)
    tolerance = 1e-5 * max(1.0, float(expected.abs().max()))
    assert float((expected - logits_of(load_causal_lm(Base(name=folder)))).abs().max()) > 0.1
    torch.testing.assert_close(logits_of(merged), expected, rtol=0, atol=tolerance)
    own = load_causal_lm(Base(name=str(tmp_path / "whole")))
    torch.testing.assert_close(logits_of(own), expected, rtol=0, atol=tolerance)
    assert printed(line) <= tolerance
    # Other readers than transformers tie whatever the file says is tied.
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["tie_word_embeddings"] == (kind in ("tied", "gpt2"))
    assert not list((tmp_path / "whole").glob("adapter*"))
    assert load_tokenizer(Base(name=str(tmp_path / "whole"))).get_vocab() == module.tokenizer.get_vocab()


def test_tied_weights_stay_tied_where_the_adapter_leaves_them_alone(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "base", tie_word_embeddings=True)
    save_hf(trained_policy(Base(name=folder, lora=LoRA(rank=4))), tmp_path / "hf")
    export(str(tmp_path), merge=True)
    merged = plain(tmp_path / "hf" / "export", "AutoModelForCausalLM", None)
    assert merged.config.tie_word_embeddings
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_a_merged_ppo_run_is_its_policy_and_no_other_adapter(llama: str, tmp_path: Path) -> None:
    """Of the adapters on the base (policy, reference, critic) the policy's alone is merged."""
    sft = trained_policy(Base(name=llama, lora=LoRA(rank=4)))
    save_hf(sft, tmp_path / "sft")
    module: Any = tiny.make_ppo(Base(name=str(tmp_path / "sft")))
    tiny.disturb(module, 0.05, seed=4)
    save_hf(module, tmp_path / "hf")
    export(str(tmp_path), merge=True, to=str(tmp_path / "whole"))
    merged = logits_of(plain(tmp_path / "whole", "AutoModelForCausalLM", None))
    found = {}
    for role in ("policy", "reference", "value"):
        with module.roles.acting(role) as model:
            found[role] = float((logits_of(model.eval()) - merged).abs().max())
    assert found["policy"] < 1e-5
    assert min(found["reference"], found["value"]) > 0.1


@pytest.mark.parametrize("kind", ["full", "lora", "4-bit"])
def test_an_export_without_merging_is_the_trained_policy(llama: str, tmp_path: Path, kind: str) -> None:
    lora = None if kind == "full" else LoRA(rank=4)
    base = Base(name=llama, lora=lora, quantization=Quantization() if kind == "4-bit" else None)
    module = trained_policy(base)
    save_hf(module, tmp_path / "hf")
    line = export(str(tmp_path), to=str(tmp_path / "out"))
    expected = logits_of(module.roles.policy)
    if kind == "4-bit":
        loaded = load_causal_lm(Base(name=str(tmp_path / "out")))
    else:
        loaded = plain(tmp_path / "out", "AutoModelForCausalLM", llama if lora else None)
    torch.testing.assert_close(logits_of(loaded), expected, rtol=0, atol=1e-5)
    assert printed(line) < 1e-5
    assert bool(list((tmp_path / "out").glob("model*.safetensors"))) == (kind == "full")
    assert load_tokenizer(Base(name=str(tmp_path / "out"))).get_vocab() == module.tokenizer.get_vocab()


def test_a_4_bit_run_is_merged_onto_either_base_and_says_how_far_off_it_is(tmp_path: Path) -> None:
    """Both bases and the run computed by hand: the printed differences are those, and dequantised is nearest."""
    from peft import PeftModel

    folder = tiny.save_model(tmp_path / "base", hidden_size=64, intermediate_size=128)
    base = Base(name=folder, lora=LoRA(rank=4), quantization=Quantization(compute_dtype="float32"))
    module = trained_policy(base)
    expected = logits_of(module.roles.policy)
    save_hf(module, tmp_path / "hf")
    said = {
        name: printed(export(str(tmp_path), merge=True, dequantize=name == "dequantised", to=str(tmp_path / name)))
        for name in ("full", "dequantised")
    }
    merged = {name: logits_of(plain(tmp_path / name, "AutoModelForCausalLM", None)) for name in said}
    by_hand = PeftModel.from_pretrained(load_causal_lm(Base(name=folder)), tmp_path / "hf").eval()
    torch.testing.assert_close(merged["full"], logits_of(by_hand), rtol=0, atol=1e-5)
    torch.testing.assert_close(merged["dequantised"], expected, rtol=0, atol=2e-5)
    assert said["dequantised"] < 2e-5
    off = float((merged["full"] - expected).abs().max())
    assert off > 0.1  # quantisation of random weights is coarse
    assert off / 4 < said["full"] < 4 * off  # printed for other tokens than these


def test_the_printed_difference_is_that_of_the_tokens_it_names(tmp_path: Path) -> None:
    """Random tokens from seed 0, recomputed; bfloat16 weights are off by their rounding."""
    folder = tiny.save_model(tmp_path / "base", max_position_embeddings=12)
    module = trained_policy(Base(name=folder, lora=LoRA(rank=4)))
    save_hf(module, tmp_path / "hf")
    line = export(str(tmp_path), merge=True, dtype="bfloat16", to=str(tmp_path / "out"))
    assert "on 4 rows of random tokens" in line
    ordinary = torch.arange(3, tiny.VOCABULARY)  # 0, 1 and 2 are special
    tokens = ordinary[torch.randint(len(ordinary), (4, 12), generator=torch.Generator().manual_seed(0))]
    merged = plain(tmp_path / "out", "AutoModelForCausalLM", None, dtype="auto")
    assert merged.dtype == torch.bfloat16
    with torch.no_grad():
        rows = [(merged(row[None]).logits.float(), module.roles.policy(row[None]).logits) for row in tokens]
    off = max(float((ours - theirs).abs().max()) for ours, theirs in rows)
    assert 1e-3 < off < 1
    assert printed(line) == pytest.approx(off, rel=0.01)


def test_a_merged_model_has_the_width_of_its_base_unless_told(tmp_path: Path) -> None:
    folder = tiny.save_model(tmp_path / "base", dtype="bfloat16")
    load_causal_lm(Base(name=folder, dtype="bfloat16")).save_pretrained(folder)  # type: ignore[operator]
    save_hf(trained_policy(Base(name=folder, lora=LoRA(rank=4), dtype="bfloat16")), tmp_path / "hf")
    for dtype, expected in ((None, torch.bfloat16), ("float32", torch.float32)):
        export(str(tmp_path), merge=True, dtype=dtype, to=str(tmp_path / f"out {dtype}"))  # type: ignore[arg-type]
        merged = plain(tmp_path / f"out {dtype}", "AutoModelForCausalLM", None, dtype="auto")
        assert {parameter.dtype for parameter in merged.parameters()} == {expected}


@pytest.mark.parametrize("quantization", [None, Quantization(compute_dtype="float32")], ids=["lora", "4-bit"])
def test_a_merged_reward_model_scores_as_the_trained_one(
    llama: str, tmp_path: Path, quantization: Quantization | None
) -> None:
    """One label, its head and the constant included, by plain transformers and by this package."""
    module = trained_scorer(Base(name=llama, lora=LoRA(rank=4), quantization=quantization))
    assert abs(module.scorer.get_base_model().config.reward_bias) > 0.05  # type: ignore[operator, union-attr]
    save_hf(module, tmp_path / "hf")
    line = export(str(tmp_path), merge=True, dequantize=quantization is not None, to=str(tmp_path / "out"))
    with torch.no_grad():
        expected = module.scores(SEQUENCES)
        record = json.loads((tmp_path / "out" / "reward.json").read_text())
        merged = plain(tmp_path / "out", "AutoModelForSequenceClassification", None)
        assert merged.config.num_labels == 1
        assert record["pad_token_id"] == merged.config.pad_token_id != tiny.EOS
        padded = torch.where(ATTENTION.bool(), SEQUENCES.tokens, record["pad_token_id"])
        scores = merged(padded, attention_mask=ATTENTION).logits[:, 0] + record["bias"]
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)
    own = load_scorer(Base(name=str(tmp_path / "out")), trained=True)
    torch.testing.assert_close(score_sequences(own, SEQUENCES, 1000), expected, rtol=0, atol=1e-5)
    assert printed(line) < 1e-5


# --- what is refused, and what a failure leaves ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and beside it a LoRA run, a 4-bit run and a full run."""
    place = tmp_path_factory.mktemp("adapters")
    base = Base(name=tiny.save_model(place / "base"))
    for name, lora, quantization in (
        ("full", None, None), ("lora", LoRA(rank=4), None), ("qlora", LoRA(rank=4), Quantization())
    ):  # fmt: skip
        module = trained_policy(Base(name=base.name, lora=lora, quantization=quantization))
        save_hf(module, place / name / "hf")
    (place / "empty").mkdir()
    return place


REFUSED = {
    "no run": ({"run": "none"}, "none: no such run"),
    "no folder": ({"run": "./none"}, "./none: no such model folder"),
    "without hf": ({"run": "empty"}, "empty: no model in this folder"),
    "a hub name": ({"run": "org/model"}, "org/model: no such run"),
    "merge of a full model": ({"run": "full", "merge": True}, "--merge: full holds a whole model"),
    "dequantize without 4 bits": ({"run": "lora", "merge": True, "dequantize": True}, "was not trained on a 4-bit"),
    "dequantize of a full model": ({"run": "full", "dequantize": True}, "was not trained on a 4-bit base"),
    "dequantize without merge": ({"run": "qlora", "dequantize": True}, "give --merge too"),
    "dtype without merge": ({"run": "lora", "dtype": "float32"}, "--dtype is of whole weights"),
    "a folder with something in it": ({"run": "lora", "to": "base"}, "--to base: is there already"),
    "a file": ({"run": "lora", "to": "base/config.json"}, "is there already"),
    "below a file": ({"run": "lora", "to": "base/config.json/x"}, "cannot be written"),
    "offline": ({"run": "lora", "push_to_hub": "me/mine"}, "--push_to_hub me/mine: offline (HF_HUB_OFFLINE is set)"),
    "no repository's name": ({"run": "lora", "push_to_hub": "a b/c"}, "--push_to_hub a b/c: no name for a repository"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_refused_in_a_line(adapters: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(adapters)
    options, words = REFUSED[case]
    before = sorted(adapters.rglob("*"))
    with pytest.raises(UserError) as caught:
        export(**options)  # type: ignore[arg-type]
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(adapters.rglob("*")) == before


def test_a_base_that_is_gone_or_changed_is_refused(adapters: Path, tmp_path: Path) -> None:
    base = Path(tiny.save_model(tmp_path / "base"))
    save_hf(trained_policy(Base(name=str(base), lora=LoRA(rank=4))), tmp_path / "hf")
    tiny.save_model(base, seed=1)
    with pytest.raises(UserError, match=r"the weights of .* are not those that the adapter in .* was trained on"):
        export(str(tmp_path), merge=True)
    shutil.rmtree(base)
    with pytest.raises(
        UserError, match=r"the base of the adapter is gone from where .*base\.json says it was .*--base"
    ):
        export(str(tmp_path), merge=True)
    assert not (tmp_path / "hf" / "export").exists()


def test_a_failure_leaves_nothing_and_a_kill_nothing_under_the_name(
    adapters: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def torn(model: Any, tokenizer: Any, folder: Path, scorer: bool) -> None:
        (folder / "half.txt").write_text("half")
        seen.append((folder.parent == tmp_path, (tmp_path / "out").exists()))
        raise KeyboardInterrupt

    monkeypatch.setattr("rlhf_lit.commands.export.write_model", torn)
    with pytest.raises(KeyboardInterrupt):
        export(str(adapters / "lora"), to=str(tmp_path / "out"))
    assert seen == [(True, False)]  # beside the folder, which is not there while it is written
    assert not list(tmp_path.iterdir())


# --- a base that has moved -------------------------------------------------------------------------------------------


@pytest.fixture
def moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A LoRA policy and a LoRA reward model, whose base went from ``here`` to ``there``. → the modules."""
    here = tiny.save_model(tmp_path / "here")
    policy, scorer = (
        trained_policy(Base(name=here, lora=LoRA(rank=4))),
        trained_scorer(Base(name=here, lora=LoRA(rank=4))),
    )
    save_hf(policy, tmp_path / "policy" / "hf")
    save_hf(scorer, tmp_path / "scorer" / "hf")
    shutil.move(here, tmp_path / "there")
    monkeypatch.chdir(tmp_path)
    return policy, scorer


@pytest.mark.parametrize("merge", [False, True])
def test_an_export_says_where_a_moved_base_is_now(moved: Any, tmp_path: Path, merge: bool) -> None:
    with pytest.raises(
        UserError, match=r"^policy: the base of the adapter is gone from where \S+base\.json says .*--base"
    ):
        export("policy", merge=merge, to="out")
    with pytest.raises(UserError, match=r"^--base: ./nowhere: no such model folder"):
        export("policy", merge=merge, base="./nowhere", to="out")
    tiny.save_model(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="was trained on a base with name"):
        export("policy", merge=merge, base="other", to="out")
    with pytest.raises(UserError, match="--base: there holds a whole model"):
        export("there", base="there", to="out")
    assert not (tmp_path / "out").exists()
    assert printed(export("policy", merge=merge, base="there", to="out")) < 1e-5
    loaded = plain(tmp_path / "out", "AutoModelForCausalLM", None if merge else str(tmp_path / "there"))
    torch.testing.assert_close(logits_of(loaded), logits_of(moved[0].roles.policy), rtol=0, atol=1e-5)
    # What was written needs no option any more.
    own = load_causal_lm(Base(name=str(tmp_path / "out")))
    torch.testing.assert_close(logits_of(own), logits_of(moved[0].roles.policy), rtol=0, atol=1e-5)


def test_chat_and_score_find_a_moved_base(
    moved: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "w3 w4", "chosen": "w5", "rejected": "w6 w7"}\n' * 2)
    commands = (
        ["chat", "policy", "--sampling.max_new_tokens=4"],
        ["score", "scorer", "rows.jsonl", "--to=scores.jsonl"],
    )
    for command in commands:
        monkeypatch.setattr("sys.stdin", io.StringIO("w3\n"))
        assert main(command) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert re.search(r"gone from where \S+/base\.json says it was .*\(export, chat and score: --base\)", err), err
        monkeypatch.setattr("sys.stdin", io.StringIO("w3\n"))
        assert main([*command, "--base=there"]) == 0
        torch.set_grad_enabled(True)
        assert capsys.readouterr().out.count("\n") == 1
    with torch.no_grad():
        chat = ChatFormat(moved[1].tokenizer)
        sides = chat.answers(
            [Message("user", "w3 w4")], [[Message("assistant", "w5")], [Message("assistant", "w6 w7")]]
        )
        rows = Sequences.pad([side.tokens for side in sides], [side.mask for side in sides])
        expected = moved[1].scores(rows).tolist()
    line = json.loads((tmp_path / "scores.jsonl").read_text().splitlines()[0])
    assert [line["score_chosen"], line["score_rejected"]] == pytest.approx(expected, abs=1e-5)


# --- widths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_whole_model_is_exported_in_any_width(tmp_path: Path, stored: Any, dtype: Any) -> None:
    base = tiny.save_model(tmp_path / "base")
    module = trained_policy(Base(name=base, dtype=stored))
    save_hf(module, tmp_path / "hf")
    line = export(str(tmp_path), dtype=dtype, to=str(tmp_path / "out"))
    assert f"the whole policy, {dtype}" in line
    loaded = plain(tmp_path / "out", "AutoModelForCausalLM", None, dtype="auto")
    width = getattr(torch, dtype)
    assert {weight.dtype for weight in loaded.parameters()} == {width}
    for (name, ours), theirs in zip(module.roles.policy.named_parameters(), loaded.parameters(), strict=True):
        assert torch.equal(ours.to(width), theirs), name
    off = float((logits_of(loaded) - logits_of(module.roles.policy)).abs().max())
    if dtype == stored:
        assert printed(line) == off == 0
    else:
        assert 0 < off < 0.5
        assert off / 5 < printed(line) < 5 * off  # printed for other tokens than these


@pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["whole", "merged"])
def test_a_reward_models_head_keeps_its_width(llama: str, tmp_path: Path, lora: LoRA | None) -> None:
    module = trained_scorer(Base(name=llama, lora=lora))
    save_hf(module, tmp_path / "hf")
    export(str(tmp_path), merge=lora is not None, dtype="bfloat16", to=str(tmp_path / "out"))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {name: weight.dtype for name, weight in weights.items() if weight.dtype != torch.bfloat16} == {
        "score.weight": torch.float32
    }
    trained: Any = module.scorer
    head = trained.score if lora is None else trained.get_base_model().score.modules_to_save["default"]
    assert torch.equal(weights["score.weight"], head.weight)


def test_float16_that_cannot_hold_a_weight_is_refused(tmp_path: Path) -> None:
    base = tiny.save_model(tmp_path / "base")
    module = trained_policy(Base(name=base))
    module.roles.policy.model.norm.weight.data[3] = 70_000
    save_hf(module, tmp_path / "hf")
    with pytest.raises(UserError, match=r"--dtype float16: model\.norm\.weight reaches 7e\+04, .*use bfloat16"):
        export(str(tmp_path), dtype="float16", to=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_float16_base_is_merged_in_float32(tmp_path: Path) -> None:
    """The sum is made wide, and written as narrow as the base is."""
    from transformers import AutoModelForCausalLM

    folder = tiny.save_model(tmp_path / "base")
    AutoModelForCausalLM.from_pretrained(folder, dtype="float16").save_pretrained(folder)
    module = trained_policy(Base(name=folder, lora=LoRA(rank=4)))
    save_hf(module, tmp_path / "hf")
    line = export(str(tmp_path), merge=True, to=str(tmp_path / "out"))
    assert "full-precision base, float16" in line
    merged = plain(tmp_path / "out", "AutoModelForCausalLM", None, dtype="auto")
    whole = {name.replace(".base_layer", ""): w for name, w in module.roles.policy.get_base_model().named_parameters()}
    layer = module.roles.policy.get_base_model().model.layers[0].mlp.up_proj
    expected = (whole["model.layers.0.mlp.up_proj.weight"] + layer.get_delta_weight("default")).to(torch.float16)
    assert torch.equal(merged.model.layers[0].mlp.up_proj.weight, expected)
