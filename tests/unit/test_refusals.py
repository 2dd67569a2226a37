"""What the user can mend ends in one clear line, and what is no fault at all in none."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import tiny
import torch

from rlhf_lit.algorithms import SFT, RewardModel
from rlhf_lit.batches import PreferenceBatch, PromptBatch, Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.models.base import Base
from rlhf_lit.rollout.rewards import RewardFromFunction


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_sequence_beyond_the_models_context(tmp_path: Any, kind: str) -> None:
    """GPT-2 would end in an index error, on a GPU in a device-side assertion, Llama in nonsense."""
    limit = {"n_positions": 8} if kind == "gpt2" else {"max_position_embeddings": 8}
    module = tiny.build(SFT(Base(name=tiny.save_model(tmp_path, kind, **limit))))
    tiny.Step(module, tiny.SupervisedBatch(tiny.sequences([(2, 2)]), 100))
    with pytest.raises(UserError, match=r"data\.max_length: a sequence of 9 tokens .* context of 8"):
        tiny.Step(module, tiny.SupervisedBatch(tiny.sequences([(2, 3)]), 100))


@pytest.mark.parametrize(
    ("returned", "complaint"),
    [(None, "a NoneType instead of a list"), ((x for x in (1.0, 2.0)), "a generator"), ([float("inf"), 1.0], "inf ")],
)
def test_what_a_reward_function_may_not_return(returned: Any, complaint: str) -> None:
    source = RewardFromFunction(lambda prompts, responses, rows: returned)
    with pytest.raises(UserError, match=complaint):
        source(tiny.sequences([(1, 1), (2, 2)]), ["p", "q"], ["a", "b"], [{}, {}], 100)


@pytest.mark.parametrize("kind", [list, np.float32, torch.tensor])
def test_a_reward_function_may_return_numbers_in_any_common_form(kind: Any) -> None:
    source = RewardFromFunction(lambda prompts, responses, rows: kind([0.5, -2]))
    assert source(tiny.sequences([(1, 1), (2, 2)]), ["p", "q"], ["a", "b"], [{}, {}], 100).tolist() == [0.5, -2.0]


def test_a_rank_without_a_share_of_the_last_batch_predicts_nothing(llama: str) -> None:
    none, empty = torch.zeros(0, dtype=torch.int64), Sequences.pad([], [])
    writer = tiny.build(SFT(Base(name=llama)))
    assert writer.predict_step(PromptBatch(empty, none, none, (), (), 100), 0) == []
    scorer = tiny.build(RewardModel(Base(name=llama)))
    assert scorer.predict_step(PreferenceBatch(empty, empty, none.float(), 100), 0) == []
