"""Reward sources: what a function gets and may return, and the weighted sum of several sources."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from rlhf_lit.errors import UserError
from rlhf_lit.models.base import Base
from rlhf_lit.rollout.rewards import RewardFromFunction, RewardFromModel, RewardSource, RewardSum

SEQUENCES = tiny.sequences([(1, 1), (2, 2)])
LONG = "word " * 100


def score(function: Any, responses: tuple[str, str] = ("a", "b")) -> Tensor:
    return RewardFromFunction(function)(SEQUENCES, ["p", "q"], list(responses), [{"k": 1}, {}], 100)


def given(value: Any) -> Any:
    """A function that returns that, whatever it is asked."""

    def judge(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> Any:
        return value

    return judge


# --- a function ------------------------------------------------------------------------------------------------------


def test_a_function_sees_texts_and_rows() -> None:
    seen: list[Any] = []

    def judge(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        seen.extend((prompts, responses, rows))
        return [1, -2.5]

    scores = score(judge)
    assert scores.tolist() == [1.0, -2.5]
    assert scores.dtype == torch.float32
    assert seen == [["p", "q"], ["a", "b"], [{"k": 1}, {}]]


@pytest.mark.parametrize(
    "returned",
    [
        [1, 0.0],
        (1.0, 0.0),
        [True, False],
        np.array([1, 0]),
        np.array([True, False]),
        torch.tensor([1.0, 0.0], dtype=torch.bfloat16),
        [np.float32(1), np.int64(0)],
        [torch.tensor(1.0), np.bool_(False)],
        [torch.ones((), requires_grad=True), 0],
    ],
    ids=repr,
)
def test_numbers_in_any_common_form(returned: Any) -> None:
    assert score(given(returned)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], "1 scores for 2 responses"),
        ([1.0, 2.0, 3.0], "3 scores for 2 responses"),
        (None, "a NoneType instead of a list of numbers"),
        (0.5, "a float instead of a list"),
        (torch.tensor(0.5), "a float instead of a list"),
        ({"a": 1.0, "b": 2.0}, "a dict instead of a list"),
        ([1.0, None], "None instead of a number"),
        ([1.0, float("nan")], "nan instead"),
        (torch.tensor([1.0, torch.inf]), "inf instead"),
        ([1.0, -1e39], r"-1e\+39 instead of a number \(finite in float32\)"),
        ([1, 10**400], "instead of a number"),
        (["1", "0"], "'1' instead of a number"),
        ([[1.0], [0.0]], r"\[1.0\] instead of a number"),
        (torch.tensor([[1.0], [0.0]]), r"\[1.0\] instead of a number"),
        ([1.0, 1j], "1j instead of a number"),
    ],
)
def test_what_a_function_may_not_return(returned: Any, message: str) -> None:
    with pytest.raises(UserError, match=rf"^reward\.function: given\.<locals>\.judge returned .*{message}"):
        score(given(returned))


def test_the_complaint_about_a_score_names_its_row_on_one_short_line() -> None:
    with pytest.raises(UserError) as caught:
        score(given([0.5, float("nan")]), responses=("first", f"second\n{LONG}"))
    message = str(caught.value)
    assert "for the response 'second\\nword" in message
    assert "\n" not in message
    assert len(message) < 300


def test_a_function_that_raises_on_a_row() -> None:
    def judge(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        return [float(row["k"]) for row in rows]

    with pytest.raises(UserError) as caught:
        score(judge)
    line = judge.__code__.co_firstlineno + 1
    assert str(caught.value) == (
        "reward.function: test_a_function_that_raises_on_a_row.<locals>.judge raised KeyError: 'k' "
        f"(test_rewards.py, line {line}); the first response it fails on is 'b' to 'q'"
    )
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_function_that_raises_on_the_batch_alone_blames_no_row() -> None:
    def judge(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        if len(responses) == 1:
            raise ValueError("a group of 1")
        raise ValueError(f"a group of {len(responses)},\nwhich is too small")

    with pytest.raises(UserError, match=r"ValueError: a group of 2, which is too small \(test_rewards.py, .*\)$"):
        score(judge)


def test_a_function_of_other_arguments_or_without_a_name() -> None:
    with pytest.raises(UserError, match=r"<lambda> raised TypeError: .*takes 1 positional argument but 3 were given;"):
        score(lambda prompts: [1.0, 2.0])

    class Judge:
        def __call__(self, prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> None:
            return None

    with pytest.raises(UserError, match=r"Judge object at .* returned a NoneType"):
        score(Judge())


def test_a_functions_own_clear_line_is_left_alone() -> None:
    def judge(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        raise UserError("my.key: not like this")

    with pytest.raises(UserError, match=r"^my\.key: not like this$"):
        score(judge)


# --- a model ---------------------------------------------------------------------------------------------------------


def test_a_reward_model_of_another_vocabulary_is_refused(llama: str) -> None:
    tokenizer = tiny.make_tokenizer()
    tokenizer.add_tokens(["new"])
    with pytest.raises(UserError, match=r"^reward\.path: .*another vocabulary"):
        RewardFromModel(llama).prepare(tokenizer)
    in_a_sum = RewardSum({"judge": RewardFromModel(llama)}, {"judge": 1.0})
    with pytest.raises(UserError, match=r"^reward\.sources\.judge\.path: .*another vocabulary"):
        in_a_sum.prepare(tokenizer)


# --- a sum -----------------------------------------------------------------------------------------------------------


class Constant(RewardSource):
    """A source with a weight of its own."""

    def __init__(self, *scores: float) -> None:
        super().__init__()
        self.scores = torch.nn.Parameter(torch.tensor(scores))
        self.prepared_with: Any = None

    def prepare(self, tokenizer: Any) -> None:
        self.prepared_with = tokenizer

    def forward(self, *arguments: Any) -> Tensor:
        return self.scores.detach()


def call(source: RewardSource) -> Tensor:
    return source(SEQUENCES, ["p", "q"], ["a", "b"], [{}, {}], 100)


def test_a_sum_of_weighted_scores() -> None:
    both = RewardSum({"good": Constant(1.0, 2.0), "brief": Constant(-8.0, 4.0)}, {"brief": 0.25, "good": 3.0})
    assert both.parts == {}
    assert call(both).tolist() == [1.0, 7.0]  # 3·1 − 8/4, 3·2 + 4/4
    assert {name: part.tolist() for name, part in both.parts.items()} == {"good": [1.0, 2.0], "brief": [-8.0, 4.0]}
    assert list(both.parts) == ["good", "brief"]


def test_a_weight_of_0_or_below() -> None:
    source = RewardSum({"a": Constant(1.0, 2.0), "b": Constant(5.0, 6.0)}, {"a": -1.0, "b": 0.0})
    assert call(source).tolist() == [-1.0, -2.0]
    assert source.parts["b"].tolist() == [5.0, 6.0]


@pytest.mark.parametrize(
    ("names", "weights", "message"),
    [
        ([], {}, r"reward\.sources: name at least one"),
        (["a", "b"], {"a": 1.0}, r"reward\.weights: no weight for the source 'b'"),
        (["a", "b"], {"a": 1.0, "b": 1.0, "c": 1.0}, r"reward\.weights: 'c' names no source; there is a, b"),
        (["a"], {"a": float("nan")}, r"reward\.weights\.a must be a finite number, not nan"),
        (["a"], {"a": float("inf")}, r"reward\.weights\.a must be a finite number, not inf"),
        (["a.b"], {"a.b": 1.0}, r"reward\.sources: 'a\.b' cannot be the name"),
        (["items"], {"items": 1.0}, r"reward\.sources: 'items' cannot be the name"),
        ([""], {"": 1.0}, r"reward\.sources: '' cannot be the name"),
    ],
)
def test_names_and_weights_that_do_not_fit(names: list[str], weights: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        RewardSum({name: Constant(1.0, 2.0) for name in names}, weights)


def test_the_sources_of_a_sum_are_prepared_and_move_with_it() -> None:
    sources = {"a": Constant(1.0, 2.0), "b": Constant(5.0, 6.0)}
    both = RewardSum({**sources}, {"a": 1.0, "b": 1.0})
    both.prepare("the policy's")
    assert [source.prepared_with for source in sources.values()] == ["the policy's", "the policy's"]
    both.to("meta")
    assert all(source.scores.device.type == "meta" for source in sources.values())


def test_a_critic_starts_from_the_first_source_that_is_a_model() -> None:
    sources = {"rule": Constant(1.0, 2.0), "second": RewardFromModel("y"), "third": RewardFromModel("x")}
    weights = dict.fromkeys(sources, 1.0)
    assert RewardSum(sources, weights).critic_base() == Base(name="y")
    assert RewardSum(dict(reversed(sources.items())), weights).critic_base() == Base(name="x")
    assert RewardSum({"rule": Constant(1.0, 2.0)}, {"rule": 1.0}).critic_base() is None


def test_a_complaint_within_a_sum_names_the_source() -> None:
    source = RewardSum({"fine": Constant(1.0, 2.0), "mine": RewardFromFunction(given([1.0]))}, {"fine": 1, "mine": 1})
    with pytest.raises(UserError, match=r"^reward\.sources\.mine\.function: .* returned 1 scores for 2"):
        call(source)

    class Strict(Constant):
        def forward(self, *arguments: Any) -> Tensor:
            raise UserError("no key of ours")

    with pytest.raises(UserError, match=r"^reward\.sources\.own: no key of ours$"):
        call(RewardSum({"own": Strict()}, {"own": 1.0}))


def test_a_sum_is_built_from_a_config() -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--reward", type=RewardSource)
    length = {"class_path": "LengthReward", "init_args": {"target": 3, "unit": "characters"}}
    model = {"class_path": "RewardFromModel", "init_args": {"path": "somewhere"}}
    config = {
        "class_path": "RewardSum",
        "init_args": {"sources": {"helpful": model, "brief": length}, "weights": {"helpful": 1.0, "brief": 0.1}},
    }
    reward = parser.instantiate(parser.parse_object({"reward": config})).reward
    assert isinstance(reward, RewardSum)
    assert [type(source).__name__ for source in reward.sources.values()] == ["RewardFromModel", "LengthReward"]
    assert reward.weights == {"helpful": 1.0, "brief": 0.1}
    assert reward.critic_base() == Base(name="somewhere")


def test_a_rollout_logs_the_mean_of_each_source(llama: str) -> None:
    def in_eighths(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        return [i / 8 for i in range(len(responses))]

    sources: dict[str, RewardSource] = {
        "words": RewardFromFunction(tiny.word_count),
        "place": RewardFromFunction(in_eighths),
    }
    module = tiny.make_ppo(Base(name=llama), reward=RewardSum(sources, {"words": 1.0, "place": -2.0}))
    module.rollout(tiny.prompts(8), 0)
    logged = module.rollout_metrics
    assert logged["objective/scores/place"] == pytest.approx(3.5 / 8, abs=1e-6)
    assert logged["objective/scores/words"] > 0
    assert logged["objective/scores"] == pytest.approx(logged["objective/scores/words"] - 7 / 8, abs=1e-6)
