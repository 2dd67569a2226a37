"""Reward sources: what a function gets and may return."""

from typing import Any

import pytest
import tiny
import torch

from rlhf_lit.errors import UserError
from rlhf_lit.rollout.rewards import RewardFromFunction, RewardFromModel


def score(function: Any) -> torch.Tensor:
    return RewardFromFunction(function)(tiny.sequences([(1, 1), (2, 2)]), ["p", "q"], ["a", "b"], [{"k": 1}, {}], 100)


def test_a_function_sees_texts_and_rows() -> None:
    seen: list[Any] = []

    def judge(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        seen.extend((prompts, responses, rows))
        return [1, -2.5]

    assert score(judge).tolist() == [1.0, -2.5]
    assert seen == [["p", "q"], ["a", "b"], [{"k": 1}, {}]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [([1.0], "1 scores for 2"), ([1.0, None], "None instead of a number"), ([float("nan"), 1.0], "nan instead")],
)
def test_what_a_function_may_not_return(returned: list[Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(lambda prompts, responses, rows: returned)


def test_a_reward_model_of_another_vocabulary_is_refused(llama: str) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["new"])
    with pytest.raises(UserError, match="another vocabulary"):
        RewardFromModel(llama).prepare(tokenizer)
