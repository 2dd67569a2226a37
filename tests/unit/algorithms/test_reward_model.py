"""A reward model's numbers by independent computations, and the normalisation of its scores wherever it is loaded."""

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from scipy import stats
from torch import Tensor

from rlhf_lit.algorithms import RewardModel
from rlhf_lit.batches import PreferenceBatch, RankedBatch
from rlhf_lit.errors import UserError
from rlhf_lit.export.trained import Trained
from rlhf_lit.models.anatomy import unwrapped
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.heads import sequence_scores
from rlhf_lit.models.loading import load_scorer
from rlhf_lit.models.roles import Roles
from rlhf_lit.models.saving import save_hf
from rlhf_lit.rollout.rewards import score_sequences

LORAS = pytest.mark.parametrize("lora", [None, LoRA(rank=4)], ids=["full", "lora"])
BATCHES = pytest.mark.parametrize("batch", [tiny.preferences(30), tiny.rankings(60)], ids=["pairs", "lists"])
SEQUENCES = tiny.sequences(tiny.RAGGED)


def make(base: Base, **options: Any) -> RewardModel:
    module = tiny.build(RewardModel(base, **options))
    tiny.disturb(module, 0.3)
    return module


@torch.no_grad()
def scores(module: RewardModel, batch: PreferenceBatch | RankedBatch) -> tuple[Tensor, Tensor]:
    """Of all answers, and of the preferred ones."""
    compared = batch.comparisons()
    module.eval()
    found = module.scores(compared.answers)
    return found, found[compared.best]


# --- metrics ---------------------------------------------------------------------------------------------------------


@BATCHES
def test_calibration_and_length_correlation(batch: PreferenceBatch | RankedBatch, llama: str) -> None:
    """Against scipy, and against the definition of the expected calibration error, bin by bin."""
    module = make(Base(name=llama))
    module.eval()
    module._evaluating = "val"
    with torch.no_grad():
        for part in batch.micro_batches():
            list(module.losses(part, module.denominators(batch)))
    calibration, correlation = module._pair_metrics("val")
    compared = batch.comparisons()
    found, _ = scores(module, batch)
    lengths = compared.answers.mask.sum(-1)
    assert len(found) == (12 if isinstance(batch, PreferenceBatch) else 13), "every answer once"
    assert float(correlation.compute()) == pytest.approx(float(stats.pearsonr(found, lengths)[0]), abs=1e-5)

    difference = (found[compared.better] - found[compared.worse]).double().numpy()
    probability = 1 / (1 + np.exp(-np.concatenate([difference, -difference])))
    happened = np.concatenate([np.ones(len(difference)), np.zeros(len(difference))])
    error = 0.0
    for low in range(10):
        inside = (probability >= low / 10) & (probability < (low + 1) / 10)
        if inside.any():
            error += inside.mean() * abs(probability[inside].mean() - happened[inside].mean())
    assert error > 0.05
    assert float(calibration.compute()) == pytest.approx(error, abs=1e-5)


# --- normalisation ---------------------------------------------------------------------------------------------------


@LORAS
@BATCHES
def test_mean_and_standard_deviation(batch: PreferenceBatch | RankedBatch, lora: LoRA | None, llama: str) -> None:
    module = make(Base(name=llama, lora=lora), unit_variance=True)
    before, preferred = scores(module, batch)
    module.normalise([batch])
    after, best = scores(module, batch)
    assert float(best.mean()) == pytest.approx(0, abs=1e-5)
    assert float(after.std(correction=0)) == pytest.approx(1, abs=1e-5)
    spread = before.std(correction=0)
    assert abs(float(spread) - 1) > 0.05
    assert torch.allclose(after, (before - preferred.mean()) / spread, atol=1e-5)
    module.normalise([batch])  # it is what it should be already
    assert torch.allclose(scores(module, batch)[0], after, atol=1e-5)


def test_a_shift_alone_leaves_the_head(llama: str) -> None:
    module = make(Base(name=llama))
    head = copy.deepcopy(unwrapped(module.scorer).score.weight)
    before, preferred = scores(module, tiny.rankings())
    module.normalise([tiny.rankings()])
    assert torch.equal(unwrapped(module.scorer).score.weight, head)
    assert torch.allclose(scores(module, tiny.rankings())[0], before - preferred.mean(), atol=1e-6)
    assert tiny.rankings().comparisons().best.sum() == 4, "of each list the best one"


@pytest.mark.parametrize("kind", ["folder", "plain", "critic", "checkpoint"])
def test_the_same_scores_wherever_it_is_loaded(kind: str, llama: str, tmp_path: Path) -> None:
    same_scores(kind, None, llama, tmp_path)


@pytest.mark.parametrize("kind", ["folder", "merged", "shared base", "critic", "checkpoint"])
def test_the_same_scores_wherever_its_adapter_is_loaded(kind: str, llama: str, tmp_path: Path) -> None:
    same_scores(kind, LoRA(rank=4), llama, tmp_path)


def same_scores(kind: str, lora: LoRA | None, llama: str, tmp_path: Path) -> None:
    base = Base(name=llama, lora=lora)
    module = make(base, unit_variance=True)
    module.normalise([tiny.preferences()])
    assert module.normalisation is not None
    assert abs(module.normalisation.scale - 1) > 0.05
    assert abs(module.normalisation.bias) > 0.05
    module.eval()
    expected = score_sequences(module.scorer, SEQUENCES, 1000)
    save_hf(module, tmp_path / "hf")
    saved = Base(name=str(tmp_path / "hf"))
    policy = Base(name=llama, lora=lora)
    if kind == "folder":
        found = score_sequences(load_scorer(saved, trained=True), SEQUENCES, 1000)
    elif kind == "plain":
        import transformers

        model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "hf")
        attention = (torch.arange(SEQUENCES.tokens.shape[1])[None] < SEQUENCES.lengths[:, None]).long()
        pads = SEQUENCES.tokens.masked_fill(attention == 0, model.config.pad_token_id)
        with torch.no_grad():
            found = model(pads, attention_mask=attention).logits[:, 0] + module.normalisation.bias
    elif kind == "merged":
        whole = Trained.find(str(tmp_path / "hf"), False).merged("float32", None)
        found = score_sequences(whole, SEQUENCES, 1000)
    elif kind == "shared base":
        roles = Roles(policy)
        role = roles.add_reward(saved)
        with torch.no_grad(), roles.acting(role) as model:
            found = sequence_scores(model, roles.heads[role], SEQUENCES)
    elif kind == "critic":
        roles = Roles(policy)
        roles.add_critic(policy, saved, trunk=False)
        with torch.no_grad(), roles.acting("value") as model:
            found = sequence_scores(model, roles.heads["value"], SEQUENCES)
    else:
        checkpoint: dict[str, Any] = {"state_dict": {k: v.clone() for k, v in module.state_dict().items()}}
        module.on_save_checkpoint(checkpoint)
        fresh = tiny.build(RewardModel(base, unit_variance=True))
        fresh.on_load_checkpoint(checkpoint)
        fresh.load_state_dict(checkpoint["state_dict"], strict=False)
        fresh.eval()
        found = score_sequences(fresh.scorer, SEQUENCES, 1000)
    assert float((found - expected).abs().max()) < 2e-5


def test_training_goes_on_from_the_head_as_it_was_trained(llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, from a checkpoint and in the same process: scaled and back again would have rounded it."""
    module = make(Base(name=llama), unit_variance=True)
    trained = {name: value.clone() for name, value in module.state_dict().items()}
    module.normalise([tiny.preferences()])
    checkpoint: dict[str, Any] = {"state_dict": {k: v.clone() for k, v in module.state_dict().items()}}
    module.on_save_checkpoint(checkpoint)
    assert all(torch.equal(value, trained[name]) for name, value in checkpoint["state_dict"].items())
    fresh = tiny.build(RewardModel(Base(name=llama), unit_variance=True))
    fresh.on_load_checkpoint(checkpoint)
    fresh.load_state_dict(checkpoint["state_dict"], strict=False)
    monkeypatch.setattr("rlhf_lit.algorithms.algorithm.Algorithm.on_train_start", lambda self: None)
    for going_on in (module, fresh):
        assert not torch.equal(unwrapped(going_on.scorer).score.weight, trained["scorer.score.weight"])
        going_on.on_train_start()
        assert torch.equal(unwrapped(going_on.scorer).score.weight, trained["scorer.score.weight"])
        assert unwrapped(going_on.scorer).config.reward_bias == 0
        assert going_on.normalisation is None


@pytest.mark.parametrize(("value", "words"), [(math.nan, "not finite"), (0.0, "all the same")])
def test_scores_that_cannot_be_normalised(
    value: float, words: str, llama: str, capsys: pytest.CaptureFixture[str]
) -> None:
    module = make(Base(name=llama), unit_variance=True)
    unwrapped(module.scorer).score.weight.data.fill_(value)
    module.normalise([tiny.preferences()])
    assert module.normalisation is None
    assert f"note: the scores of 12 responses are {words}: they were not normalised" in capsys.readouterr().err


def test_options_that_cannot_be() -> None:
    with pytest.raises(UserError, match="centre_pairs must be at least 0, not -1"):
        RewardModel(Base(name="unused"), centre_pairs=-1)
    with pytest.raises(UserError, match="unit_variance: needs pairs"):
        RewardModel(Base(name="unused"), centre_pairs=0, unit_variance=True)
