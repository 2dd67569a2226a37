"""What a run's algorithm is: by its class, a user's own too, and by its files where the class is gone."""

from __future__ import annotations

from pathlib import Path

import pytest
from report_runs import DPO, PPO, changed, made, study_of

from rlhf_lit.evaluation.evaluate import in_words
from rlhf_lit.playground import gold_reward
from rlhf_lit.report import evaluating
from rlhf_lit.report.evaluations import Evaluated
from rlhf_lit.report.kinds import Kind
from rlhf_lit.report.reading import Run
from rlhf_lit.report.sections.frontier import frontier
from rlhf_lit.report.sections.overoptimisation import watched
from rlhf_lit.rollout.rewards import RewardFromFunction

OWN = """
from rlhf_lit.algorithms import DPO, PPO, RewardModel

class MyDPO(DPO): pass
class MyPPO(PPO): pass
class MyScorer(RewardModel): pass
"""
KINDS = {
    "SFT": Kind(writes=True, on_policy=False, has_reference=False),
    "DPO": Kind(writes=True, on_policy=False, has_reference=True),
    "KTO": Kind(writes=True, on_policy=False, has_reference=True),
    "PPO": Kind(writes=True, on_policy=True, has_reference=True),
    "RLOO": Kind(writes=True, on_policy=True, has_reference=True),
    "GRPO": Kind(writes=True, on_policy=True, has_reference=True),
    "RewardModel": Kind(writes=False, on_policy=False, has_reference=False),
}


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "algorithms_of_a_user.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def run_of(folder: Path, class_path: str, like: dict = DPO, rows: tuple = ({"step": 0},)) -> Run:
    return made(folder, changed(like, model__class_path=class_path), rows)


@pytest.mark.parametrize("name", KINDS)
def test_ours(tmp_path: Path, name: str) -> None:
    assert run_of(tmp_path / "a", f"rlhf_lit.algorithms.{name}").kind == KINDS[name]


@pytest.mark.usefixtures("own")
@pytest.mark.parametrize("name", ["DPO", "PPO"])
def test_a_users_own(tmp_path: Path, name: str) -> None:
    assert run_of(tmp_path / "a", f"algorithms_of_a_user.My{name}").kind == KINDS[name]
    assert run_of(tmp_path / "b", "algorithms_of_a_user.MyScorer").kind == KINDS["RewardModel"]


def test_by_the_files_where_the_class_is_gone(tmp_path: Path) -> None:
    rollouts = ({"step": 0, "objective/scores": 0.5},)
    assert run_of(tmp_path / "a", "gone.MyPPO", PPO, rollouts).kind == KINDS["PPO"]
    reads_none = changed(DPO, model__init_args__reference=None)
    del reads_none["model"]["init_args"]["reference"]
    assert run_of(tmp_path / "b", "gone.MySFT", reads_none).kind == KINDS["SFT"]
    reads_one = changed(DPO, model__init_args__reference={"precompute": False})
    assert run_of(tmp_path / "c", "gone.MyDPO", reads_one).kind == KINDS["DPO"]
    scorer = run_of(tmp_path / "d", "gone.MyScorer", reads_none)
    (scorer.folder / "hf" / "reward.json").write_text("{}")
    assert not scorer.kind.writes


@pytest.mark.usefixtures("own")
def test_a_report_evaluates_a_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[tuple[str, str | None]] = []
    world = {
        "data__init_args__train": {"path": "playground"},
        "data__init_args__world": {},
        "model__init_args__sampling": {"max_new_tokens": 4, "rows_at_once": 8},
        "model__init_args__base": {"name": "someone/sft"},
    }
    runs = [
        made(tmp_path / name, changed(DPO, model__class_path=f"algorithms_of_a_user.{name}", **world))
        for name in ("MyDPO", "MyScorer")
    ]
    monkeypatch.setattr(evaluating, "evaluate", lambda model, **options: called.append((model, options["reference"])))
    monkeypatch.chdir(tmp_path)
    evaluating.evaluate_missing(runs, evaluating.Asked())
    assert called == [(str(tmp_path / "MyDPO"), "someone/sft")]


@pytest.mark.usefixtures("own")
def test_its_sections_know_a_users_own(tmp_path: Path) -> None:
    reward = {"class_path": "RewardSum", "init_args": {"weights": {"proxy": 1.0, "truth": 0.0}}}
    ppo = changed(PPO, model__class_path="algorithms_of_a_user.MyPPO", model__init_args__reward=reward)
    run, scorer = made(tmp_path / "a", ppo), run_of(tmp_path / "b", "algorithms_of_a_user.MyScorer")
    assert watched(run) == "truth"
    missing = frontier(study_of([run, scorer])).missing
    assert len(missing) == 1
    assert "reward beside KL of MyPPO" in missing[0]


def test_the_gold_judge_of_an_evaluation_from_before_the_playground_moved_is_the_present_one() -> None:
    names = ("rlhf_lit.data.playground.reward.gold_reward", "rlhf_lit.playground.reward.gold_reward")
    before, now = (Evaluated(Path(), {"judges": {"gold": name}}, []) for name in names)
    assert before.judges == now.judges == {"gold": in_words(RewardFromFunction(gold_reward))}
