"""The reference of DPO and KTO: none, one that follows the policy, and one whose log-probs were computed beforehand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from lightning import Trainer
from torch import Tensor

from rlhf_lit.algorithms import DPO, KTO
from rlhf_lit.algorithms.algorithm import Schedule
from rlhf_lit.algorithms.offline import OfflineAlgorithm, Reference, ReferenceUpdate
from rlhf_lit.data.modules import PreferenceDataModule, UnpairedDataModule
from rlhf_lit.data.records import Source
from rlhf_lit.data.text_module import TextDataModule
from rlhf_lit.errors import UserError
from rlhf_lit.losses.preference import DPOLoss, IPOLoss, KTOLoss, ORPOLoss, PreferenceLoss, SimPOLoss
from rlhf_lit.losses.reductions import row_sums
from rlhf_lit.models.base import Base, LoRA
from rlhf_lit.models.logprobs import token_logprobs
from rlhf_lit.models.saving import save_hf
from rlhf_lit.reference_cache.store import ReferenceCache

ROWS = 12
LORAS = [None, LoRA(rank=4)]


@pytest.fixture(params=LORAS, ids=["full", "lora"])
def base(request: pytest.FixtureRequest, llama: str) -> Base:
    return Base(name=llama, lora=request.param)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with pairs; the cache is made in it too."""
    pairs = [
        {"prompt": f"w{3 + i} w7", "chosen": f"w{5 + i} w9 w{4 + i}", "rejected": f"w{20 - i}" + " w8" * (i % 4)}
        for i in range(ROWS)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    return tmp_path


def data(place: Path, kind: type[TextDataModule] = PreferenceDataModule, **settings: Any) -> TextDataModule:
    source = Source(str(place / "pairs.jsonl"))
    defaults: dict[str, Any] = {"batch_size": 4, "template": "none", "cache": None}
    return kind(source, source, **{**defaults, **settings})


def dpo(base: Base, loss: PreferenceLoss = DPOLoss(0.5), **settings: Any) -> DPO:
    return DPO(base, loss, **{"learning_rate": 1e-2, "schedule": Schedule("constant"), **settings})


def fit(module: OfflineAlgorithm, datamodule: Any, place: Path, steps: int = 3, **settings: Any) -> Trainer:
    torch.manual_seed(0)  # new adapters are drawn from the global generator
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=str(place),
        **settings,
    )
    trainer.fit(module, datamodule=datamodule)
    return trainer


class Watched(DPO):
    """DPO that keeps the numbers of its steps, and counts what it asks the reference for."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.steps: list[dict[str, float]] = []
        self.passes = 0

    def log_step(self, totals: dict[str, Tensor], grad_norm: Tensor) -> None:
        self.steps.append({**{name: float(total) for name, total in totals.items()}, "norm": float(grad_norm)})
        super().log_step(totals, grad_norm)

    def reference_sums(self, sequences: Any, known: Tensor | None) -> Tensor:
        self.passes += known is None
        return super().reference_sums(sequences, known)


def watched(base: Base, place: Path, beta: float = 0.5, precompute: bool = True, **settings: Any) -> Watched:
    reference = Reference(precompute=precompute, cache=str(place / "cache"))
    return Watched(base, DPOLoss(beta), reference, learning_rate=1e-2, schedule=Schedule("constant"), **settings)


# --- none ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", [SimPOLoss(2.0), ORPOLoss(0.2)], ids=["simpo", "orpo"])
def test_a_loss_that_reads_no_reference_is_given_none(base: Base, loss: PreferenceLoss) -> None:
    module = tiny.build(dpo(base, loss))
    assert not module.roles.has_reference
    assert set(module.roles.models) == {"policy"}
    assert tiny.Step(module, tiny.preferences()).norm > 0.01
    with pytest.raises(UserError, match=r"model\.reference\.update: (SimPO|ORPO)Loss reads no reference"):
        dpo(base, loss, reference=Reference(update=ReferenceUpdate(1)))


def test_a_sweep_over_losses_may_precompute_for_all_of_them(llama: str, place: Path, capsys: Any) -> None:
    module = dpo(Base(name=llama), SimPOLoss(2.0), reference=Reference(precompute=True, cache=str(place / "cache")))
    fit(module, data(place), place, 1)
    assert "none is read; nothing to compute beforehand" in capsys.readouterr().err
    assert not (place / "cache").exists()


def test_reference_free_dpo(base: Base) -> None:
    """log π₀ counts as 0: −log σ(β(log π(y_w) − log π(y_l)))."""
    module, batch = tiny.build(dpo(base, reference=Reference(free=True))), tiny.preferences()
    assert not module.roles.has_reference
    chosen, rejected = (tiny.logprobs_of(module, side).sum(-1) for side in (batch.chosen, batch.rejected))
    expected = -torch.nn.functional.logsigmoid(0.5 * (chosen - rejected)).mean()
    assert tiny.Step(module, batch).totals["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert module.value_at_start(batch) is None


def test_what_excludes_what(llama: str) -> None:
    for settings, complaint in (
        ({"free": True, "precompute": True}, "reference.free"),
        ({"free": True, "update": ReferenceUpdate(1)}, "reference.free"),
        ({"precompute": True, "update": ReferenceUpdate(1)}, "reference.precompute"),
        ({"complete": True}, "reference.complete"),
    ):
        with pytest.raises(UserError, match=complaint):
            Reference(**settings)  # type: ignore[arg-type]
    for every, mix, complaint in ((0, 1.0, "every"), (1, 0.0, "mix"), (1, 1.1, "mix")):
        with pytest.raises(ValueError, match=rf"reference\.update\.{complaint}"):
            ReferenceUpdate(every, mix)
    with pytest.raises(UserError, match=r"model\.reference\.free: KTO"):
        KTO(Base(name=llama), KTOLoss(0.1), Reference(free=True))


# --- one that follows the policy -------------------------------------------------------------------------------------


def logprobs(module: OfflineAlgorithm, role: str) -> Tensor:
    sequences = tiny.preferences().chosen
    with torch.no_grad(), module.roles.acting(role) as model:
        return row_sums(token_logprobs(model, sequences), sequences.mask)


def test_a_hard_update_makes_the_reference_the_policy(base: Base, place: Path) -> None:
    """Every second step: after two it is the policy of then, and stays so through the third."""
    module = dpo(base, reference=Reference(update=ReferenceUpdate(2)))
    fit(module, data(place), place, 1)
    assert not logprobs(module, "policy").equal(logprobs(module, "reference"))
    module = dpo(base, reference=Reference(update=ReferenceUpdate(2)))
    fit(module, data(place), place, 2)
    after_two = logprobs(module, "policy")
    assert logprobs(module, "reference").equal(after_two)
    module = dpo(base, reference=Reference(update=ReferenceUpdate(2)))
    fit(module, data(place), place, 3)
    assert logprobs(module, "reference").equal(after_two)
    assert not logprobs(module, "policy").equal(after_two)


def test_a_soft_update_mixes_weights(base: Base) -> None:
    module = tiny.build(dpo(base, reference=Reference(update=ReferenceUpdate(1, 0.25))))
    before = {name: reference.clone() for name, reference, _ in module.roles.reference_pairs()}
    tiny.disturb(module.roles.policy, 0.1)
    module.roles.move_reference(0.25)
    pairs = list(module.roles.reference_pairs())
    assert pairs
    for name, reference, policy in pairs:
        assert not policy.equal(before[name]) or policy.numel() == 0
        torch.testing.assert_close(reference, 0.25 * policy + 0.75 * before[name], rtol=1e-6, atol=1e-7)
        assert not reference.requires_grad
    assert all(p.requires_grad for _, _, p in pairs)


def test_a_reference_that_moved_is_in_the_checkpoint(base: Base, place: Path) -> None:
    """Five steps at once, and two and then three: the same weights, of policy and reference, to the bit."""
    settings = {"reference": Reference(update=ReferenceUpdate(2, 0.5))}
    whole = dpo(base, **settings)
    fit(whole, data(place), place, 5)
    trainer = fit(dpo(base, **settings), data(place), place, 3)
    trainer.save_checkpoint(place / "half.ckpt")
    resumed = dpo(base, **settings)
    torch.manual_seed(0)
    again = Trainer(
        accelerator="cpu", max_steps=5, max_epochs=-1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    again.fit(resumed, datamodule=data(place), ckpt_path=place / "half.ckpt")
    for role in ("policy", "reference"):
        assert logprobs(resumed, role).equal(logprobs(whole, role)), role
    kept = torch.load(place / "half.ckpt", weights_only=True)["state_dict"]
    assert any("reference" in name for name in kept)
    fixed = fit(dpo(base), data(place), place, 1)
    fixed.save_checkpoint(place / "fixed.ckpt")
    assert not any("reference" in name for name in torch.load(place / "fixed.ckpt", weights_only=True)["state_dict"])


# --- computed beforehand ---------------------------------------------------------------------------------------------


def test_precomputed_equals_live(base: Base, place: Path) -> None:
    live, cached = watched(base, place, precompute=False), watched(base, place)
    fit(live, data(place), place, 6)
    fit(cached, data(place), place, 6)
    assert live.passes > 0
    assert cached.passes == 0
    assert len(live.steps) == len(cached.steps) == 6
    for a, b in zip(live.steps, cached.steps, strict=True):
        assert a.keys() == b.keys()
        # At step 0 the margin is exactly 0 live, and rounding where the reference went through in other batches.
        for name in a.keys() - {"accuracy"}:
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-5)
        assert b["loss"] == pytest.approx(a["loss"], abs=1e-6)
    assert live.steps[-1]["loss"] < live.steps[0]["loss"] - 0.05


def test_another_beta_seed_and_batch_size_find_it_and_hold_no_reference(
    base: Base, place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(watched(base, place), data(place), place)
    assert "no reference pass" not in capsys.readouterr().err

    def never(*_: Any, **__: Any) -> Iterator[Any]:
        raise AssertionError("a reference pass")

    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    monkeypatch.setattr(ReferenceCache, "build", never)
    module = watched(base, place, beta=0.1)
    fit(module, data(place, batch_size=3, micro_batch_tokens=16), place)
    assert f"all {2 * (9 + ROWS)} responses" in capsys.readouterr().err, (
        "of three steps of three pairs, and all held out"
    )
    assert not module.roles.has_reference
    assert set(module.roles.models) == {"policy"}
    assert module.passes == 0
    ipo = Watched(base, IPOLoss(0.3), Reference(precompute=True, cache=str(place / "cache")), learning_rate=1e-2)
    fit(ipo, data(place), place)
    assert ipo.steps[0]["loss"] == pytest.approx(1 / (4 * 0.3**2), abs=1e-4)


def test_a_reference_is_let_go_once_it_was_asked(base: Base, place: Path) -> None:
    module = watched(base, place)
    fit(module, data(place), place)
    assert not module.roles.has_reference
    assert not any("reference" in name for name, _ in module.named_parameters())
    assert module.roles.policy.training is False


def test_lora_and_full_share_what_they_have_in_common(llama: str, place: Path, capsys: Any) -> None:
    fit(watched(Base(name=llama), place), data(place), place)
    capsys.readouterr()
    fit(watched(Base(name=llama, lora=LoRA(rank=2)), place), data(place), place)
    assert "no reference pass" in capsys.readouterr().err


def test_a_changed_reference_is_another(llama: str, place: Path, tmp_path_factory: Any, capsys: Any) -> None:
    from transformers import AutoModelForCausalLM

    fit(watched(Base(name=llama), place), data(place), place)
    changed = tmp_path_factory.mktemp("changed")
    model = AutoModelForCausalLM.from_pretrained(llama)
    model.lm_head.weight.data[5, 3] += 1e-3
    model.save_pretrained(changed)
    tiny.make_tokenizer().save_pretrained(changed)
    capsys.readouterr()
    module = watched(Base(name=str(changed)), place)
    fit(module, data(place), place)
    assert "no reference pass" not in capsys.readouterr().err
    assert module.steps[0]["loss"] == pytest.approx(0.693147, abs=1e-6)


def test_a_short_run_asks_for_the_rows_it_sees(llama: str, place: Path, capsys: Any) -> None:
    """Two steps of four pairs, and one batch of validation: 2·8 responses of the one, up to 2·4 of the other."""
    module = watched(Base(name=llama), place)
    fit(module, data(place), place, 2, limit_val_batches=1)
    assert module.cache is not None
    assert len(module.cache) <= 2 * (8 + 4)
    assert module.passes == 0
    full = watched(Base(name=llama), place)
    fit(full, data(place), place, 9)
    assert full.cache is not None
    assert len(full.cache) == 2 * ROWS


def test_kto_reads_both_kinds_of_responses(base: Base, place: Path) -> None:
    losses = []
    for precompute in (False, True):
        module = KTO(
            base,
            KTOLoss(0.5),
            Reference(precompute=precompute, cache=str(place / "cache")),
            learning_rate=1e-2,
            schedule=Schedule("constant"),
        )
        trainer = fit(module, data(place, UnpairedDataModule), place, 6)
        losses.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        assert module.roles.has_reference is not precompute
    for name in losses[0].keys() - {"train/tokens_per_s", "train/tflops_per_s"}:
        assert losses[1][name] == pytest.approx(losses[0][name], rel=1e-4, abs=1e-5), name
    assert losses[0]["val/loss"] < 0.499


def test_a_cache_that_must_be_complete(llama: str, place: Path) -> None:
    def complete(**settings: Any) -> None:
        module = watched(Base(name=llama), place)
        module.reference = replace(module.reference, complete=True)
        fit(module, data(place, **settings), place)

    with pytest.raises(UserError, match=f"{2 * ROWS} of {2 * ROWS} rows are missing"):
        complete()
    fit(watched(Base(name=llama), place), data(place), place)
    complete()
    with pytest.raises(UserError, match="tokenised otherwise"):
        complete(template="plain")


def test_rows_of_the_callers_own_cannot_be_computed_beforehand(llama: str, place: Path) -> None:
    from torch.utils.data import DataLoader

    module = watched(Base(name=llama), place)
    trainer = Trainer(accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False)
    with pytest.raises(UserError, match=r"reference\.precompute: needs a data module of ours"):
        trainer.fit(module, DataLoader([tiny.preferences()], batch_size=None))


def test_an_earlier_adapter_as_the_reference(llama: str, place: Path) -> None:
    """A frozen copy of the adapter, deleted once it was asked: the policy's own goes on training."""
    earlier = tiny.build(dpo(Base(name=llama, lora=LoRA(rank=4))))
    tiny.disturb(earlier, 0.1)
    save_hf(earlier, place / "earlier")
    base, names = Base(name=str(place / "earlier")), []
    runs = [watched(base, place, precompute=precompute) for precompute in (False, True, True)]
    for module in runs:
        fit(module, data(place), place, 4)
        names.append({name for name, p in module.named_parameters() if p.requires_grad})
    live, first, second = (run.steps for run in runs)
    assert names[0] == names[1] == names[2]
    assert all(".default." in name for name in names[0])
    assert [run.passes for run in runs][1:] == [0, 0]
    for cached in (first, second):
        assert [step["loss"] for step in cached] == pytest.approx([step["loss"] for step in live], abs=1e-5)
    assert live[-1]["loss"] < live[0]["loss"] - 0.01
    assert not any(".reference." in name for name, _ in runs[1].named_parameters())
