"""Arms: what makes two runs seeds of one, and what sets them apart."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import DPO, PPO, changed, made

from rlhf_lit.errors import UserError
from rlhf_lit.report.comparing import arms_of, flat, settings, swept

BETA = "model__init_args__loss__init_args__beta"


def test_keys_are_those_of_the_command_line() -> None:
    found = dict(flat(DPO))
    assert found["model"] == "rlhf_lit.algorithms.DPO"
    assert found["model.loss"] == "rlhf_lit.losses.preference.DPOLoss"
    assert found["model.loss.beta"] == 0.1
    assert found["data.train.path"] == "pairs.jsonl"
    assert not any("init_args" in key for key in found)


@pytest.mark.parametrize(
    "other",
    [
        {"seed_everything": 1},
        {"name": "another", "runs": "elsewhere"},
        {"trainer__accelerator": "gpu", "trainer__devices": 8},
        {"data__init_args__micro_batch_tokens": 64},
        {"model__init_args__sampling__rows_at_once": 1},
        {"model__init_args__base__attention": "eager"},
    ],
    ids=lambda other: ",".join(other),
)
def test_seed_place_and_machine_make_no_arm(other) -> None:
    assert settings(changed(DPO, **other)) == settings(DPO)


@pytest.mark.parametrize(
    "other",
    [
        {BETA: 0.2},
        {"trainer__max_steps": 11},
        {"trainer__precision": "bf16-mixed"},
        {"model__init_args__sampling__max_new_tokens": 5},
        {"data__init_args__train__path": "others.jsonl"},
        {"model__init_args__something_new": 1},
        {"ckpt_path": "runs/dpo/version_0"},
    ],
    ids=lambda other: ",".join(other),
)
def test_everything_else_does(other) -> None:
    assert settings(changed(DPO, **other)) != settings(DPO)


def test_runs_are_grouped_ordered_and_named_by_what_differs(tmp_path: Path) -> None:
    runs = [
        made(tmp_path / f"{beta}_{seed}", changed(DPO, seed_everything=seed, **{BETA: beta}))
        for beta in (10.0, 0.05, 2.0)
        for seed in (2, 0)
    ]
    arms, left = arms_of(runs)
    assert [arm.label for arm in arms] == ["beta=0.05", "beta=2", "beta=10"]
    assert [[run.seed for run in arm.runs] for arm in arms] == [[0, 2]] * 3
    assert left == []
    (found,) = swept(arms)
    assert (found.key, found.short, found.values) == ("model.loss.beta", "beta", (0.05, 2.0, 10.0))


def test_algorithms_are_named_where_there_are_several(tmp_path: Path) -> None:
    runs = [
        made(tmp_path / "a", DPO),
        made(tmp_path / "b", PPO),
        made(tmp_path / "c", changed(DPO, **{BETA: 0.5})),
    ]
    arms, _ = arms_of(runs)
    assert [arm.label for arm in arms] == ["DPO beta=0.1", "DPO beta=0.5", "PPO"]
    assert list(arms[0].varied) == ["model.loss.beta"], "what PPO has otherwise does not tell DPO's arms apart"
    assert [one.arms[0].algorithm for one in swept(arms)] == ["DPO"]


def test_a_class_that_differs_is_no_swept_number(tmp_path: Path) -> None:
    hinge = changed(DPO, model__init_args__loss__class_path="rlhf_lit.losses.preference.HingeLoss", **{BETA: 1.0})
    arms, _ = arms_of([made(tmp_path / "a", DPO), made(tmp_path / "b", hinge)])
    assert len(arms) == 2
    assert swept(arms) == []


def test_a_class_is_called_by_its_name_and_by_arguments_that_tell_arms_apart(tmp_path: Path) -> None:
    """IPO's average_log_prob is the same in all arms that have it; DPO's smoothing is not."""
    loss = "model__init_args__loss"
    smooth = changed(DPO, **{f"{loss}__init_args__label_smoothing": 0.2})
    plain = changed(DPO, **{f"{loss}__init_args__label_smoothing": 0.0})
    ipo = changed(DPO, **{f"{loss}__class_path": "rlhf_lit.losses.preference.IPOLoss"})
    ipo = changed(ipo, **{f"{loss}__init_args__average_log_prob": False})
    runs = [made(tmp_path / str(i), config) for i, config in enumerate((smooth, plain, ipo))]
    arms, _ = arms_of(runs)
    assert [arm.label for arm in arms] == [
        "loss=DPOLoss label_smoothing=0", "loss=DPOLoss label_smoothing=0.2", "loss=IPOLoss",
    ]  # fmt: skip


def test_two_numbers_that_differ_are_no_sweep_of_one(tmp_path: Path) -> None:
    arms, _ = arms_of(
        [made(tmp_path / "a", DPO), made(tmp_path / "b", changed(DPO, trainer__max_steps=5, **{BETA: 1.0}))]
    )
    assert [set(arm.varied) for arm in arms] == [{"trainer.max_steps", "model.loss.beta"}] * 2
    assert swept(arms) == []


def test_a_repetition_is_no_second_seed(tmp_path: Path) -> None:
    arms, left = arms_of([made(tmp_path / name, changed(DPO, name=name)) for name in "ab"])
    assert [arm.seeds for arm in arms] == [1]
    assert "no second seed" in left[0].reason
    assert left[0].folder.endswith("b")


def test_runs_without_a_seed_are_no_repetitions(tmp_path: Path) -> None:
    arms, left = arms_of([made(tmp_path / name, changed(DPO, seed_everything=False)) for name in "ab"])
    assert [arm.seeds for arm in arms] == [2]
    assert left == []


def test_keys_can_be_ignored(tmp_path: Path) -> None:
    """Each seed with a reward model of its own is still one arm, where one says so."""
    runs = [
        made(tmp_path / str(i), changed(DPO, seed_everything=i, model__init_args__base__name=f"sft_{i}"))
        for i in range(3)
    ]
    assert len(arms_of(runs)[0]) == 3
    (arm,) = arms_of(runs, ["model.base.name"])[0]
    assert arm.seeds == 3
    assert len(arms_of(runs, ["model.base"])[0]) == 1
    with pytest.raises(UserError, match=r"--ignore model\.bas: no run has such a key"):
        arms_of(runs, ["model.bas"])
