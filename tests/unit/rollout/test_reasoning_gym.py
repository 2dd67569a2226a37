"""Questions that reasoning-gym makes up, and the scores of its tasks' own programs."""

from __future__ import annotations

import json

import pytest

from rlhf_lit.data import reasoning_gym
from rlhf_lit.errors import UserError
from rlhf_lit.rollout.reasoning_gym import ReasoningGymReward


def test_rows_are_made_by_task_size_seed_and_settings() -> None:
    made = reasoning_gym.rows("reasoning-gym:leg_counting?size=3&seed=5&max_animals=3")
    assert [sorted(row) for row in made] == [["answer", "metadata", "question"]] * 3
    assert made == reasoning_gym.rows("reasoning-gym:leg_counting?seed=5&max_animals=3&size=3")
    assert made != reasoning_gym.rows("reasoning-gym:leg_counting?size=3&seed=6&max_animals=3")
    assert made[:2] == reasoning_gym.rows("reasoning-gym:leg_counting?size=2&seed=5&max_animals=3")
    for row in made:
        metadata = json.loads(row["metadata"])
        assert str(metadata["total_legs"]) == row["answer"]
        assert metadata["num_animals"] == 3
    assert len(reasoning_gym.rows("reasoning-gym:leg_counting")) == 500


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("reasoning-gym:leg_count", "reasoning-gym has no task 'leg_count'; perhaps leg_counting"),
        ("reasoning-gym:", "reasoning-gym has no task ''$"),
        ("reasoning-gym:leg_counting?size=0", "size must be a whole number of rows, at least 1, not 0$"),
        ("reasoning-gym:leg_counting?size=all", "size must be a whole number of rows, at least 1, not all$"),
        ("reasoning-gym:leg_counting?legs=4", "reasoning-gym refuses these settings: .*'legs'"),
        ("reasoning-gym:leg_counting?max_animals=0", "reasoning-gym refuses these settings: max_animals must be"),
    ],
)
def test_paths_that_are_refused(path: str, message: str) -> None:
    with pytest.raises(UserError, match=rf"^{path.replace('?', '[?]')}: {message}") as caught:
        reasoning_gym.rows(path)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("data", "rollout"):
        monkeypatch.setattr(f"rlhf_lit.{module}.reasoning_gym.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'rlhf_lit\[tasks\]'$"):
        reasoning_gym.rows("reasoning-gym:leg_counting")
    with pytest.raises(UserError, match=r"pip install 'rlhf_lit\[tasks\]'$"):
        ReasoningGymReward()


@pytest.mark.parametrize("task", ["leg_counting", "arc_agi", "rearc", "countdown", "basic_arithmetic", "n_queens"])
def test_the_tasks_program_scores(task: str) -> None:
    rows = reasoning_gym.rows(f"reasoning-gym:{task}?size=2&seed=1")
    rows = [json.loads(json.dumps(row)) for row in rows]  # as a file would keep them
    reward = ReasoningGymReward(workers=1)
    assert reward.all_unreadable(rows) == [None, None]
    answers = [row["answer"] for row in rows]
    tagged = [f"I guess <answer>no</answer>, no: <answer>{answer}</answer>" for answer in answers]
    assert reward.judge(None, tagged, rows) == [1.0, 1.0]  # type: ignore[arg-type]
    assert reward.judge(None, [f" {answer}\n" for answer in answers], rows) == [1.0, 1.0]  # type: ignore[arg-type]
    assert max(reward.judge(None, ["zzz", "<answer></answer>"], rows)) <= 0.05  # type: ignore[arg-type]


def test_a_program_that_breaks_off_scores_nothing() -> None:
    rows = reasoning_gym.rows("reasoning-gym:prime_factorization?size=1")
    assert ReasoningGymReward(workers=1).judge(None, ["no number"], rows) == [0.0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"metadata": None}, "no answer and metadata of reasoning-gym"),
        ({"metadata": "{"}, "metadata is not JSON"),
        ({"metadata": {"source_dataset": "nothing"}}, "metadata names no task of reasoning-gym in source_dataset"),
        ({"metadata": "{}"}, "metadata names no task of reasoning-gym in source_dataset"),
    ],
)
def test_rows_that_no_task_made(change: dict, reason: str) -> None:
    (row,) = reasoning_gym.rows("reasoning-gym:leg_counting?size=1")
    assert ReasoningGymReward().unreadable(row) is None
    assert ReasoningGymReward().unreadable(row | {"metadata": json.loads(row["metadata"])}) is None
    assert ReasoningGymReward().unreadable(row | change) == reason
    assert ReasoningGymReward().unreadable({"metadata": row["metadata"]}) == "no answer and metadata of reasoning-gym"
