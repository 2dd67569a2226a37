"""Prompts, responses of a file, and judges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from rlhf_lit import playground
from rlhf_lit.batches import Sequences
from rlhf_lit.data.chat import ChatFormat
from rlhf_lit.data.records import Source
from rlhf_lit.errors import UserError
from rlhf_lit.evaluation.answers import Answers, Judge, read_answers, read_prompts
from rlhf_lit.evaluation.sampling import prompt_text
from rlhf_lit.rollout.rewards import RewardFromFunction, RewardFromModel, RewardSource, RewardSum

CPU = torch.device("cpu")


def write(folder: Path, rows: list[dict[str, Any]]) -> Source:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(file))


def answers() -> Answers:
    sequences = Sequences.pad([[1, 3, 4, 2], [1, 3, 2]], [[False, False, True, True], [False, False, True]])
    return Answers([["w4"], [""]], sequences, None)


def test_a_prompt_counts_once(tmp_path: Path) -> None:
    source = write(tmp_path, [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": None}])
    found, report = read_prompts(source, "skip")
    assert [prompt.row for prompt in found] == [0, 1]
    assert report.summary() == "rows.jsonl: 2 of 4 rows used; skipped 1 null prompt (row 3), 1 repeated prompt (row 2)"


def test_the_built_in_worlds_prompts() -> None:
    found, report = read_prompts(Source("playground", split="held_out", world=playground.World(held_out=20)), "skip")
    assert (len(found), report.used) == (20, 20)
    with pytest.raises(UserError, match="splits train and held_out"):
        read_prompts(Source("playground", split="test"), "skip")


def test_responses_are_found_by_their_prompts(tmp_path: Path) -> None:
    """In another order, twice to each prompt, a dialogue among them, and one that nobody asks for."""
    turns = [{"role": r, "content": c} for r, c in (("user", "w3"), ("assistant", "w4"), ("user", "w5"))]
    rows = [
        {"prompt": "w9", "completion": "w9"},
        {"prompt": turns, "completion": "w6 w7"},
        {"prompt": "w3", "completion": " w8 "},
        {"prompt": "w3", "completion": "w4"},
        {"prompt": turns, "completion": "w6"},
    ]
    source, chat = write(tmp_path, rows), ChatFormat(tiny.make_tokenizer(), "plain")
    found, _ = read_prompts(write(tmp_path, rows), "skip")
    texts = [prompt_text(chat, prompt.prompt) for prompt in found]
    assert texts[2] == "w3"
    assert texts[1].startswith("User: w3")
    read, _ = read_answers(source, [texts[2], texts[1]], chat, "skip")
    assert read.texts == [["w8", "w4"], ["w6 w7", "w6"]]
    assert read.lengths.tolist() == [[2, 2], [3, 2]]
    assert read.ended is None
    with pytest.raises(UserError, match=r"rows.jsonl has no response to 1 of the 2 prompts; the first is 'w1'"):
        read_answers(source, ["w3", "w1"], chat, "skip")
    with pytest.raises(UserError, match="has 1 responses to some prompts and 2 to others"):
        read_answers(source, ["w3", "w9"], chat, "skip")


def test_a_judge_complains_under_its_own_name() -> None:
    def fails(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        raise KeyError("answer")

    source = RewardFromFunction(fails)
    for judge, complaint in (
        (Judge("gold", source, 99, CPU), "gold.function: .*fails raised KeyError: 'answer'"),
        (Judge("judge", RewardSum({"a": source}, {"a": 1.0}), 99, CPU), "judge.sources.a.function: "),
    ):
        judge.prepare(tiny.make_tokenizer())
        with pytest.raises(UserError, match=f"^{complaint}"):
            judge.scores(answers(), ["a", "b"], [{}, {}])
    with pytest.raises(UserError, match=r"^judge: nowhere/at/all: no such model folder|^nowhere/at/all"):
        Judge("judge", RewardFromModel("nowhere/at/all"), 99, CPU).prepare(tiny.make_tokenizer())


def test_a_judge_gets_rows_texts_and_responses_in_order() -> None:
    def score(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        assert (prompts, responses, rows) == (["a", "b"], ["w4", ""], [{"n": 1}, {"n": 2}])
        return [0.5, -2]

    judge = Judge("judge", RewardFromFunction(score), 99, CPU)
    judge.prepare(tiny.make_tokenizer())
    assert judge.scores(answers(), ["a", "b"], [{"n": 1}, {"n": 2}]).tolist() == [[0.5], [-2.0]]
    judge.prepare("a tokenizer that a function never sees")


def test_several_samples_stand_by_their_prompt() -> None:
    def score(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        assert prompts == ["a", "a", "b", "b"]
        assert [row["n"] for row in rows] == [1, 1, 2, 2]
        return [float(response) for response in responses]

    single = answers().sequences
    four = Answers([["1", "2"], ["3", "4"]], single.select(torch.tensor([0, 0, 1, 1])), None)
    judge = Judge("judge", RewardFromFunction(score), 99, CPU)
    judge.prepare(tiny.make_tokenizer())
    assert judge.scores(four, ["a", "b"], [{"n": 1}, {"n": 2}]).tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert four.lengths.tolist() == [[2, 2], [1, 1]]


class Broken(RewardSource):
    """A reward model that has diverged."""

    def critic_base(self) -> Any:
        return "a model"

    def forward(self, sequences: Any, *others: Any) -> torch.Tensor:
        return torch.tensor([1.0, float("inf")])


def test_a_score_that_is_no_number_and_a_vocabulary_that_does_not_fit() -> None:
    judge = Judge("gold", Broken(), 99, CPU)
    judge.prepare(tiny.make_tokenizer())
    with pytest.raises(UserError, match=r"^gold: the response '' has the score inf"):
        judge.scores(answers(), ["a", "b"], [{}, {}])
    other = tiny.make_tokenizer()
    other.add_tokens(["w99"])
    with pytest.raises(UserError, match=r"^gold: a reward model judges tokens, and the models compared have different"):
        judge.prepare(other)
