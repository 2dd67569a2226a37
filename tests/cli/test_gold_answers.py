"""Gold answers are read before the first step, every row: those that the reward cannot read are counted and named."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlhf_lit.data import reasoning_gym

NUMBERS = ["1", r"3\sqrt{13}", "2", "(3,4]", "3", "x=5 or x=6", "4", "5", None, "6", "7", "8"]


def write(place: Path, rows: list[dict[str, Any]], reward: dict[str, Any], algorithm: str = "RLOO") -> None:
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"rollout_size": 4, "samples_per_prompt": 2, "batch_size": 8, "ppo_epochs": 1, "cache": None}
    config = {
        "name": "gold",
        "model": {
            "class_path": algorithm,
            "init_args": {
                "base": {"name": "tiny"},
                "reward": reward,
                "kl": {"class_path": "FixedKL", "init_args": {"beta": 0.1}},
                "sampling": {"max_new_tokens": 4},
            },
        },
        "data": {"class_path": "RolloutDataModule", "init_args": {"train": {"path": "rows.jsonl"}, **data}},
        "trainer": {"max_epochs": 1, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (place / "gold.yaml").write_text(yaml.safe_dump(config))


def steps(place: Path) -> int:
    with (place / "runs" / "gold" / "version_0" / "metrics.csv").open(newline="") as file:
        return sum(bool(row["train/loss"]) for row in csv.DictReader(file))


def questions(golds: list[Any], **columns: list[Any]) -> list[dict[str, Any]]:
    rows = [{"question": f"what is {i}?", "answer": gold} for i, gold in enumerate(golds)]
    return [row | {name: values[i] for name, values in columns.items()} for i, row in enumerate(rows)]


@pytest.mark.parametrize("algorithm", ["RLOO", "GRPO"])
def test_a_run_goes_on_without_the_rows_that_no_number_is_in(run: Callable, place: Path, algorithm: str) -> None:
    write(place, questions(NUMBERS), {"class_path": "NumberReward"}, algorithm)
    answer = run("fit", "--config", "gold.yaml")
    assert answer.status == 0, answer.err
    assert (
        "train: gold answers that model.reward can read: rows.jsonl: 8 of 12 rows used; skipped 3 answer is not "
        "plainly a number (rows 1, 3, 5), 1 null answer (row 8)\n"
    ) in answer.err
    assert steps(place) == 2  # eight rows, four a rollout


def test_math_reads_what_a_number_reward_cannot(run: Callable, place: Path) -> None:
    write(place, questions(NUMBERS), {"class_path": "MathReward", "init_args": {"workers": 1}})
    answer = run("fit", "--config", "gold.yaml")
    assert answer.status == 0, answer.err
    assert "model.reward can read: rows.jsonl: 11 of 12 rows used; skipped 1 null answer (row 8)\n" in answer.err
    assert steps(place) == 3


def test_a_sum_drops_what_one_of_its_sources_cannot_read(run: Callable, place: Path) -> None:
    sources = {
        "right": {"class_path": "NumberReward"},
        "words": {"class_path": "ContainsAll", "init_args": {"column": "words"}},
        "brief": {"class_path": "LengthReward", "init_args": {"target": 2}},
    }
    weights = {"right": 1.0, "words": 0.0, "brief": 0.1}
    words = [["a"], ["a"], [], *[["a"]] * 9]
    reward = {"class_path": "RewardSum", "init_args": {"sources": sources, "weights": weights}}
    write(place, questions(NUMBERS, words=words), reward)
    answer = run("fit", "--config", "gold.yaml")
    assert answer.status == 0, answer.err
    assert (
        "rows.jsonl: 7 of 12 rows used; skipped 3 right: answer is not plainly a number (rows 1, 3, 5), 1 words: words "
        "is no list of strings (row 2), 1 right: null answer (row 8)\n"
    ) in answer.err


def test_a_bad_row_ends_the_run_where_that_is_asked(run: Callable, place: Path) -> None:
    write(place, questions(NUMBERS), {"class_path": "NumberReward"})
    answer = run("fit", "--config", "gold.yaml", "--data.on_bad_row=error")
    assert answer.status == 2
    assert (
        "rows.jsonl, row 1: answer is not plainly a number, where model.reward reads the gold answer; mend the row, or "
        "set on_bad_row to skip"
    ) in answer.err


def test_a_column_that_no_row_has_is_one_line(run: Callable, place: Path) -> None:
    write(place, questions(NUMBERS), {"class_path": "NumberReward", "init_args": {"column": "gold"}})
    answer = run("fit", "--config", "gold.yaml")
    assert answer.status == 2
    (line,) = [line for line in answer.err.splitlines() if "gold answer" in line]
    assert (
        "data.train: model.reward can read no gold answer of rows.jsonl: 0 of 12 rows used; skipped 12 no column"
        in line
    )


def test_held_out_rows_are_read_too(run: Callable, place: Path) -> None:
    write(place, questions(NUMBERS), {"class_path": "NumberReward"})
    answer = run("fit", "--config", "gold.yaml", "--data.validation.path=rows.jsonl", "--data.validation.limit=4")
    assert answer.status == 0, answer.err
    assert "validation: gold answers that model.reward can read: rows.jsonl: 2 of 4 rows used" in answer.err
    answer = run("fit", "--config", "gold.yaml", "--data.validation_fraction=0.5", "--trainer.max_epochs=2")
    assert answer.status == 0, answer.err
    assert "train: gold answers that model.reward can read: rows.jsonl: 8 of 12 rows used" in answer.err
    with (place / "runs" / "gold" / "version_1" / "metrics.csv").open(newline="") as file:
        assert sum(bool(row["train/loss"]) for row in csv.DictReader(file)) == 2  # of four rows each


def test_the_rows_of_a_mixture_are_read_file_by_file(run: Callable, place: Path) -> None:
    write(place, questions(NUMBERS), {"class_path": "NumberReward"})
    (place / "more.jsonl").write_text(json.dumps({"question": "what?", "answer": "5 or 6"}) + "\n")
    with (place / "more.jsonl").open("a") as file:
        file.write("".join(json.dumps({"question": f"and {i}?", "answer": i}) + "\n" for i in range(4)))
    answer = run("fit", "--config", "gold.yaml", "--data.train=[{path: rows.jsonl}, {path: more.jsonl}]")
    assert answer.status == 0, answer.err
    assert "train (rows.jsonl): gold answers that model.reward can read: rows.jsonl: 8 of 12 rows used" in answer.err
    assert "train (more.jsonl): gold answers that model.reward can read: more.jsonl: 4 of 5 rows used" in answer.err


def test_questions_of_reasoning_gym_are_learned_from(run: Callable, place: Path) -> None:
    rows = reasoning_gym.rows("reasoning-gym:leg_counting?size=7&max_animals=3")
    rows.append(rows[0] | {"metadata": "{}"})
    write(place, rows, {"class_path": "ReasoningGymReward", "init_args": {"workers": 1}})
    answer = run("fit", "--config", "gold.yaml")
    assert answer.status == 0, answer.err
    assert "7 of 8 rows used; skipped 1 metadata names no task of reasoning-gym in source_dataset (row 7)" in answer.err
    assert steps(place) == 2


def test_a_task_of_reasoning_gym_is_a_source(run: Callable, place: Path) -> None:
    write(place, questions(NUMBERS), {"class_path": "ReasoningGymReward", "init_args": {"workers": 1}})
    answer = run("fit", "--config", "gold.yaml", "--data.train.path=reasoning-gym:leg_counting?size=8&max_animals=3")
    assert answer.status == 0, answer.err
    assert "8 of 8 rows used" in answer.err
    assert steps(place) == 2
    answer = run("fit", "--config", "gold.yaml", "--data.train.path=reasoning-gym:leg_count")
    assert answer.status == 2
    assert "reasoning-gym has no task 'leg_count'; perhaps leg_counting" in answer.err


def test_instructions_are_learned_from(run: Callable, place: Path) -> None:
    names = [["punctuation:no_comma"]] * 7 + [["punctuation:nothing"]]
    rows = questions(["-"] * 8, instruction_id_list=names, kwargs=[[{}]] * 8)
    write(place, rows, {"class_path": "InstructionReward"})
    answer = run("fit", "--config", "gold.yaml")
    assert answer.status == 0, answer.err
    assert "7 of 8 rows used; skipped 1 unknown instruction punctuation:nothing (row 7)" in answer.err
    assert steps(place) == 2


def test_an_evaluation_leaves_them_out_as_well(run: Callable, place: Path) -> None:
    write(place, questions(NUMBERS), {"class_path": "NumberReward"})
    options = ["--model=tiny", "--prompts.path=rows.jsonl", "--sampling.max_new_tokens=4", "--judge=NumberReward"]
    answer = run("evaluate", *options)
    assert answer.status == 0, answer.err
    assert (
        "prompts: rows.jsonl: 8 of 12 rows used; skipped 3 answer is not plainly a number (rows 1, 3, 5)" in answer.err
    )
    answer = run("evaluate", *options, "--judge.column=gold")
    assert answer.status == 2
    assert "judge: no gold answer can be read: rows.jsonl: 0 of 12 rows used; skipped 12 no column 'gold'" in answer.err


def test_the_earlier_name_of_a_reward_is_refused_with_its_new_one(run: Callable, place: Path) -> None:
    write(place, questions(NUMBERS), {"class_path": "PatternReward", "init_args": {"pattern": "a"}})
    answer = run("fit", "--config", "gold.yaml")
    assert answer.status == 2
    assert "PatternReward is now RegexReward" in answer.err
