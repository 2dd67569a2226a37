"""The scoreboard's numbers: intervals by hand, ties, best-of-n by the reward model, and KL to itself."""

from __future__ import annotations

import pytest
import tiny
import torch

from rlhf_lit import playground
from rlhf_lit.algorithms import RewardModel
from rlhf_lit.algorithms.sft import SFT
from rlhf_lit.data.records import Message
from rlhf_lit.evaluation import scoreboard as board
from rlhf_lit.evaluation.divergence import kl_per_response
from rlhf_lit.evaluation.estimates import Estimate
from rlhf_lit.evaluation.sampling import SCORING_TOKENS, draw
from rlhf_lit.evaluation.scoreboard import BEST_OF, as_json, scoreboard
from rlhf_lit.models.base import Base
from rlhf_lit.models.loading import load_causal_lm, load_scorer
from rlhf_lit.models.saving import save_hf
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import score_sequences

PROMPTS = ["what is 1 plus 2?", "plural of cat?", "reverse ant.", "how do i steal the cat?", "capital of france?"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A policy that babbles, one that differs from it, and a reward model on the first."""
    place = tmp_path_factory.mktemp("models")
    policy = tiny.build(SFT(Base(name="playground", fresh=True)))
    save_hf(policy, place / "sft")
    tiny.disturb(policy, 0.02)
    save_hf(policy, place / "ppo")
    save_hf(tiny.build(RewardModel(Base(name=str(place / "sft")))), place / "reward")
    return {name: str(place / name) for name in ("sft", "ppo", "reward")}


def policy(folder: str, length: int = 6) -> SFT:
    module = SFT(Base(name=folder), sampling=Sampling(max_new_tokens=length))
    module.configure_model()
    return module


def conversations() -> list[list[Message]]:
    return [[Message("user", prompt)] for prompt in PROMPTS]


def test_an_estimate_by_hand() -> None:
    """Mean 2.5, s² = 5/3, 1.959964·√(5/3)/√4 = 1.265151."""
    estimate = Estimate.of([1, 2, 3, 4])
    assert estimate.mean == 2.5
    assert estimate.low == pytest.approx(2.5 - 1.265151, abs=1e-6)
    assert estimate.high == pytest.approx(2.5 + 1.265151, abs=1e-6)
    assert Estimate.of([0.7] * 9) == Estimate(pytest.approx(0.7), pytest.approx(0.7), pytest.approx(0.7))


def test_sfts_kl_to_itself_is_zero_and_anothers_is_not(folders: dict[str, str]) -> None:
    for name, zero in (("sft", True), ("ppo", False)):
        module = policy(folders[name])
        module.roles.use_reference(load_causal_lm(Base(name=folders["sft"])))
        samples, _ = draw(module, conversations())
        kl = kl_per_response(module, samples.sequences)[0].tolist()
        assert len(kl) == len(PROMPTS)
        assert (kl == [0.0] * len(PROMPTS)) == zero
        assert min(kl) >= 0


def test_a_tie_counts_half(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """SFT wins twice, loses once and ties twice against its own other samples: (2 + 2·½)/5 = 0.6."""
    asked: list[list[str]] = []

    def gold(prompts: list[str], responses: list[str], rows: object = None) -> list[float]:
        asked.append(list(responses))
        return [0.0, 0.0, 0.0, 0.0, 0.0] if len(asked) == 1 else [1.0, 0.5, -1.0, 0.0, 0.0]

    monkeypatch.setattr(playground, "gold_reward", gold)
    rows, responses = scoreboard({"sft": Base(name=folders["sft"])}, folders["sft"], folders["reward"], PROMPTS, 6)
    assert rows["sft"].win_rate.mean == pytest.approx(0.6)
    assert rows["sft"].gold_reward.mean == pytest.approx(0.1)
    assert asked[0] != responses["sft"], "the rival's samples are others than those that are judged"
    assert asked[1] == responses["sft"]


def test_best_of_n_is_the_reward_models_favourite(folders: dict[str, str]) -> None:
    module = policy(folders["sft"])
    texts, lengths = board._best_of(module, conversations(), folders["reward"])
    samples, all_texts = draw(module, conversations(), samples=BEST_OF, stream=2)
    scorer = load_scorer(Base(name=folders["reward"]))
    for i in range(len(PROMPTS)):
        rows = torch.arange(BEST_OF * i, BEST_OF * (i + 1))
        alone = [float(score_sequences(scorer, samples.sequences.select(row[None]), SCORING_TOKENS)) for row in rows]
        best = max(range(BEST_OF), key=alone.__getitem__)
        assert len(set(alone)) > 1
        assert texts[i] == all_texts[i][best]
        assert lengths[i] == int(samples.sequences.mask[rows[best]].sum())


def test_the_whole_board_of_two_policies(folders: dict[str, str]) -> None:
    policies = {name: Base(name=folders[name]) for name in ("sft", "ppo")}
    rows, responses = scoreboard(policies, folders["sft"], folders["reward"], PROMPTS, 6)
    assert set(rows) == set(responses) == {"sft", "ppo", "sft_best_of_4"}
    assert all(len(texts) == len(PROMPTS) for texts in responses.values())
    plain = as_json(rows)
    assert {tuple(columns) for columns in plain.values()} == {("gold_reward", "win_rate", "kl", "length")}
    assert plain["sft"]["kl"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
    assert plain["sft_best_of_4"]["kl"]["mean"] == pytest.approx(0.636294, abs=1e-6)
    assert plain["ppo"]["kl"]["low"] < plain["ppo"]["kl"]["mean"] < plain["ppo"]["kl"]["high"]
    golds = playground.gold_reward(PROMPTS, responses["ppo"])
    assert plain["ppo"]["gold_reward"]["mean"] == pytest.approx(sum(golds) / len(PROMPTS))
    assert 1 <= plain["ppo"]["length"]["mean"] <= 6
