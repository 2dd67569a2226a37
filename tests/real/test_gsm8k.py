"""The number check on grade-school mathematics: people's solutions, and models' solutions with their labels."""

from __future__ import annotations

import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf_lit.batches import Sequences
from rlhf_lit.rollout.final_number import final_number, gold_number
from rlhf_lit.rollout.verifiable import NumberReward

MODELS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def judged(column: str, responses: list[str], rows: list[dict[str, Any]]) -> list[bool]:
    """What NumberReward, which reads texts alone, says of them."""
    nothing = Sequences.pad([[] for _ in rows], [[] for _ in rows])
    scores = NumberReward(column)(nothing, ["" for _ in rows], responses, rows, 1)
    assert set(scores.tolist()) <= {0.0, 1.0}
    return (scores == 1).tolist()


def test_every_label_of_four_models_solutions_is_reproduced(real_data: Path) -> None:
    """5 276 of them. They end in `A: 18`, `A: -1.8 billion` or `A: 7/14`, and some break off unanswered."""
    rows = read(real_data / "gsm8k" / "example_model_solutions.jsonl")
    differing = []
    right = 0
    for model in MODELS:
        verdicts = judged("ground_truth", [row[model]["solution"] for row in rows], rows)
        labels = [row[model]["is_correct"] for row in rows]
        differing += [(i, model) for i in range(len(rows)) if verdicts[i] is not labels[i]]
        right += sum(verdicts)
    assert differing == []
    assert (right, len(rows) * len(MODELS)) == (2001, 5276)


@pytest.mark.parametrize(("split", "count"), [("train", 7473), ("test", 1319)])
def test_every_gold_solution_is_right_and_another_questions_is_not(real_data: Path, split: str, count: int) -> None:
    rows = read(real_data / "gsm8k" / f"{split}.jsonl")
    solutions = [row["answer"] for row in rows]
    assert judged("answer", solutions, rows) == [True] * count

    golds = [Decimal(solution.rpartition("#### ")[2].replace(",", "")) for solution in solutions]
    assert [final_number(solution) for solution in solutions] == golds
    assert [gold_number(solution) for solution in solutions] == golds

    shifted, others = solutions[1:] + solutions[:1], golds[1:] + golds[:1]
    assert judged("answer", shifted, rows) == [a == b for a, b in zip(others, golds, strict=True)]
    assert torch.tensor(judged("answer", shifted, rows)).float().mean() < 0.05
