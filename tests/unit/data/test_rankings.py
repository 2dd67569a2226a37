"""Ranked lists of every shape: what is read, ranked, counted, cut and collated."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf_lit.batches import PreferenceBatch, RankedBatch
from rlhf_lit.data.chat import Encoded
from rlhf_lit.data.modules import RankingDataModule
from rlhf_lit.data.records import Ranking, Source, demonstrations, preferences, rankings, read_rows
from rlhf_lit.data.truncation import truncate_group
from rlhf_lit.errors import UserError
from rlhf_lit.models.base import PLAYGROUND
from rlhf_lit.playground import World, gold_reward, preference_pairs, prompts, ranked_lists

TREE = {
    "message_tree_id": "a",
    "tree_state": "ready_for_export",
    "prompt": {
        "role": "prompter", "text": "hi", "replies": [
            {"role": "assistant", "text": "no", "rank": 2, "replies": []},
            {"role": "assistant", "text": "unranked", "rank": None, "replies": []},
            {"role": "assistant", "text": "yes", "rank": 0, "replies": [
                {"role": "prompter", "text": "why?", "rank": None, "replies": [
                    {"role": "assistant", "text": "so", "rank": 1, "replies": []},
                    {"role": "assistant", "text": "because", "rank": 0, "replies": []},
                ]},
            ]},
        ],
    },
}  # fmt: skip


def read(*rows: Any, most: int | None = None, **options: Any) -> list[Ranking]:
    return rankings(rows, Source("rows.jsonl", **options), on_bad_row="skip", most=most)[0]


def texts(ranking: Ranking) -> list[str]:
    return [answer[-1].content for answer in ranking.answers]


@pytest.mark.parametrize(
    ("row", "answers", "ranks", "ratings"),
    [
        ({"prompt": "p", "answers": ["a", "b", "c"], "ranks": [3, 1, 1]}, "abc", (1, 0, 0), (0, 0, 0)),
        ({"question": "p", "responses": ["a", "b", "c"], "scores": [0.5, 2, 1]}, "abc", (2, 0, 1), (0.5, 2, 1)),
        ({"prompt": "p", "answers": ["a", "b"], "ranks": [0, 1], "scores": [7, 7]}, "ab", (0, 1), (7, 7)),
        ({"prompt": "p", "ranked": ["a", "b", "c"]}, "abc", (0, 1, 2), (0, 0, 0)),
        ({"prompt": "p", "ranked": ["a", "b", "c"], "ranks": [1, 1, 2]}, "abc", (0, 0, 1), (0, 0, 0)),
        (
            {"instruction": "p", "completions": [
                {"response": "a", "overall_score": 3}, {"response": "b", "overall_score": "7.5"}]},
            "ab", (1, 0), (3, 7.5),
        ),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "margin": 0.5}, "ab", (0, 1), (0.5, 0)),
        (
            {"messages": [{"role": "user", "content": "p"}], "ranks": [2, 1],
             "answers": [[{"role": "assistant", "content": "a"}], [{"role": "assistant", "content": "b"}]]},
            "ab", (1, 0), (0, 0),
        ),
        ({"prompt": "p", "answers": '["a", "b"]', "scores": "[1, 2]"}, "ab", (1, 0), (1, 2)),
    ],
)  # fmt: skip
def test_shapes(row: dict[str, Any], answers: str, ranks: tuple[int, ...], ratings: tuple[float, ...]) -> None:
    (found,) = read(row)
    assert [turn.content for turn in found.prompt] == ["p"]
    assert texts(found) == list(answers)
    assert (found.ranks, found.ratings) == (ranks, ratings)


def test_other_names_through_columns() -> None:
    (found,) = read({"q": "p", "options": ["a", "b"], "votes": [1, 9]}, columns={
        "prompt": "q", "answers": "options", "scores": "votes"})  # fmt: skip
    assert found.ranks == (1, 0)


def test_a_tree_gives_a_list_for_each_message_with_ranked_answers() -> None:
    lists = read(TREE, {**TREE, "prompt": {"role": "prompter", "text": "alone", "replies": []}})
    assert [texts(found) for found in lists] == [["no", "yes"], ["so", "because"]]
    assert [found.ranks for found in lists] == [(1, 0), (1, 0)]
    assert [[turn.content for turn in found.prompt] for found in lists] == [["hi"], ["hi", "yes", "why?"]]
    assert [turn.role for turn in lists[1].prompt] == ["user", "assistant", "user"]
    assert [found.row for found in lists] == [0, 0]


def test_the_trees_of_open_assistant(real_data: Path) -> None:
    """754 pairs, as its own count has it: no two answers to a message have the same rank there."""
    file = real_data / "oasst_en100" / "en_100_tree.jsonl"
    lists, report = rankings(read_rows(Source(str(file))), Source(str(file)), on_bad_row="error")
    assert (len(lists), report.total, report.used) == (212, 212, 212)
    assert sum(math.comb(len(found.answers), 2) for found in lists) == 754
    assert all(sorted(found.ranks) == list(range(len(found.ranks))) for found in lists)
    assert {found.row for found in lists} == set(range(100))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"answers": ["a"], "ranks": [0]}, "fewer than two answers"),
        ({"answers": ["a", "b"], "ranks": [1, 1]}, "all answers of the same rank"),
        ({"answers": ["a", "b"], "ranks": [1]}, "not as many ranks as answers"),
        ({"answers": ["a", "b"], "ranks": [1, None]}, "non-number ranks"),
        ({"answers": ["a", "b"], "ranks": [1, "nan"]}, "non-number ranks"),
        ({"answers": ["a", "b"], "ranks": [True, 2]}, "non-number ranks"),
        ({"answers": ["a", " "], "ranks": [1, 2]}, "empty answers"),
        ({"answers": ["a", 3], "ranks": [1, 2]}, "non-text answers"),
        ({"answers": "a", "ranks": [1, 2]}, "non-list answers"),
        ({"answers": None, "ranks": [1, 2]}, "null answers"),
        ({"answers": ["a", "a", "b"], "ranks": [1, 2, 3]}, "the same answer at two ranks"),
        ({"answers": ["a", "b", "c", "d"], "ranks": [1, 2, 3, 4]}, "more than 3 answers"),
        ({"answers": ["a", "b"], "ranks": [1, 2], "prompt": ""}, "empty prompt"),
    ],
)
def test_bad_rows_are_counted_under_their_reason(row: dict[str, Any], reason: str) -> None:
    good = {"prompt": "p", "answers": ["a", "b"], "ranks": [0, 1]}
    source = Source("rows.jsonl")
    found, report = rankings([good, {"prompt": "p", **row}], source, on_bad_row="skip", most=3)
    assert len(found) == 1
    assert report.summary() == f"rows.jsonl: 1 of 2 rows used; skipped 1 {reason} (row 1)"


def test_ranks_and_scores_must_agree() -> None:
    good = {"prompt": "p", "answers": ["a", "b"], "ranks": [0, 1], "scores": [2, 1]}
    _, report = rankings([good, {**good, "scores": [1, 2]}], Source("r.jsonl"), on_bad_row="skip")
    assert "1 ranks and scores disagree (row 1)" in report.summary()


@pytest.mark.parametrize("row", [{"prompt": "p", "answers": ["a", "b"], "ranks": [0, 1]}, TREE])
def test_readers_of_other_rows_say_what_reads_these(row: dict[str, Any]) -> None:
    for reader in (preferences, demonstrations):
        with pytest.raises(UserError, match="are ranked lists of answers, which RankingDataModule reads"):
            reader([row], Source("rows.jsonl"), on_bad_row="skip")


def test_a_list_without_ranks_has_no_known_shape() -> None:
    with pytest.raises(UserError, match="columns answers, prompt have no known shape of ranked answers"):
        read({"prompt": "p", "answers": ["a", "b"]})


# --- tokens ----------------------------------------------------------------------------------------------------------


def encoded(prompt: list[int], *answers: list[int]) -> list[Encoded]:
    return [Encoded([*prompt, *a], [False] * len(prompt) + [True] * len(a), False) for a in answers]


@pytest.mark.parametrize(("policy", "kept"), [("keep_end", [1, 5, 6]), ("keep_start", [1, 3, 4])])
def test_the_prompt_is_cut_once_for_all_answers(policy: Any, kept: list[int]) -> None:
    group = truncate_group(encoded([1, 3, 4, 5, 6], [7], [8, 9, 10], [11, 12]), 6, policy, 1)
    assert group is not None
    assert [side.tokens for side in group] == [[*kept, 7], [*kept, 8, 9, 10], [*kept, 11, 12]]
    assert [sum(side.mask) for side in group] == [1, 3, 2]


def test_no_token_is_cut_in_which_answers_differ() -> None:
    """The third answer begins with another piece: the boundary of all three lies before it."""
    group = [*encoded([1, 3, 4, 5], [7, 7], [8, 8]), Encoded([1, 3, 4, 6, 9, 9], [False] * 4 + [True] * 2, True)]
    cut = truncate_group(group, 5, "keep_start", None)
    assert cut is not None
    assert [side.tokens for side in cut] == [[1, 3, 5, 7, 7], [1, 3, 5, 8, 8], [1, 3, 6, 9, 9]]
    assert truncate_group(group, 3, "keep_start", None) is None, "of the three shared tokens one must remain"
    assert truncate_group(group, 5, "drop", None) is None


# --- the data module -------------------------------------------------------------------------------------------------


@pytest.fixture
def module(tmp_path: Path) -> Callable[..., RankingDataModule]:
    def make(rows: list[Any], algorithm: Any = None, **options: Any) -> RankingDataModule:
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        data = RankingDataModule(train=Source(str(tmp_path / "rows.jsonl")), cache=None, **options)
        own = algorithm or SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(PLAYGROUND))
        data.trainer = SimpleNamespace(lightning_module=own, global_rank=0, world_size=1)  # type: ignore[assignment]
        data.setup("fit")
        return data

    return make


def test_batches_hold_whole_lists(module, capsys) -> None:
    rows = [
        {"prompt": f"what is {i}?", "answers": ["one", "two", "three four"][:count], "scores": [i, 9, -1][:count]}
        for i, count in enumerate([2, 3, 2, 3, 2])
    ]
    data = module(rows, batch_size=2, micro_batch_tokens=64)
    assert "train: 5 lists of 12 answers, 9 ranked pairs" in capsys.readouterr().err
    batches = list(data.batches_in_order(5))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    (batch, *_) = batches
    assert isinstance(batch, RankedBatch)
    assert batch.counts.tolist() == [2, 3]
    assert batch.rank.tolist() == [1, 0, 1, 0, 2]
    assert batch.rating.tolist() == [0, 9, 1, 9, -1]
    own = AutoTokenizer.from_pretrained(PLAYGROUND)
    answers = [
        own.decode(t[m], skip_special_tokens=True).strip()
        for t, m in zip(batch.sequences.tokens, batch.sequences.mask, strict=True)
    ]
    assert answers == ["one", "two", "one", "two", "three four"]


def test_only_what_learns_from_lists_is_given_them(module) -> None:
    with pytest.raises(
        UserError, match="gives ranked lists of answers, and SimpleNamespace learns from preference pairs"
    ):
        module([{"prompt": "p", "ranked": ["a", "b"]}], SimpleNamespace(tokenizer=None, learns_from=(PreferenceBatch,)))


# --- the built-in world ----------------------------------------------------------------------------------------------


def test_the_worlds_lists_order_as_its_pairs_do() -> None:
    """Ties are equal worths; without noise the order is the gold one; with noise any two are Bradley–Terry's."""
    asked = [row["prompt"] for row in prompts(World(), "train")][:800]
    samples = [["1", "it is 1.", "i cannot help.", "2", " ", "1"] for _ in asked]
    pair_samples = [["1", "it is 1.", "i cannot help.", "2"] for _ in asked]
    exact = ranked_lists(asked, samples, World(noise=0))
    assert len(exact) > 700
    for row in exact:
        assert len(row["answers"]) == 4, "each text once, and no blank one"
        golds = gold_reward([row["prompt"]] * len(row["answers"]), row["answers"])
        order = sorted(set(golds), reverse=True)
        assert row["ranks"] == [order.index(gold) for gold in golds]
    noisy = ranked_lists(asked, samples, World(noise=0.5))
    assert noisy == ranked_lists(asked, samples, World(noise=0.5))
    assert noisy[:5] == ranked_lists(asked[:5], samples[:5], World(noise=0.5))
    right, expected, variance, count = 0, 0.0, 0.0, 0
    for row in noisy:
        golds = gold_reward([row["prompt"]] * len(row["answers"]), row["answers"])
        for i, a in enumerate(golds):
            for j, b in enumerate(golds):
                if a > b:
                    p = 1 / (1 + math.exp(-(a - b) / 0.5))
                    right, expected, count = right + (row["ranks"][i] < row["ranks"][j]), expected + p, count + 1
                    variance += p * (1 - p)
    assert count == len(preference_pairs(asked, pair_samples, World(noise=0.5)))
    assert abs(right - expected) < 5 * math.sqrt(variance)
    assert abs(count - expected) > 10 * math.sqrt(variance), "noise enough to tell"
