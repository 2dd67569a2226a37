"""The experiment with a real model: instructions that can be checked, commands that parse, tables that are right."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))  # experiments are not part of the installed package

from experiments.real_assistant import results
from experiments.real_assistant.instructions import AT_ODDS, KINDS, compose, within_reach
from experiments.real_assistant.prepare import PAIR_CHARACTERS, demo_pairs, dialogues, polite_pairs, prepare, tasks
from experiments.real_assistant.run import STAGES, Settings
from rlhf_lit.commands.sweep_arms import resolve

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "experiments" / "real_assistant"


# --- instructions ----------------------------------------------------------------------------------------------------


def test_every_composed_instruction_can_be_checked_and_none_rules_another_out():
    checks = pytest.importorskip("rlhf_lit.rollout.ifeval_checks", reason="needs the extra `instructions`")
    rows = list(compose([f"Task {i}." for i in range(2000)], seed=0))
    assert len({name for row in rows for name in row["instruction_id_list"]}) == len(KINDS)
    for row in rows:
        for name, arguments in zip(row["instruction_id_list"], row["kwargs"], strict=True):
            assert checks.problem(name, arguments) is None
        assert all(len(group & set(row["instruction_id_list"])) < 2 for group in AT_ODDS)
        assert within_reach(row)
    assert {len(row["instruction_id_list"]) for row in rows} == {1, 2}
    assert rows == list(compose([f"Task {i}." for i in range(2000)], seed=0))


FOLLOWED = {
    "Use no commas at all.": "One two three.",
    "Write in lower case only.": "the sun is warm and the sea is blue.",
    "Put the whole answer between double quotation marks.": '"A word."',
    "Begin with a title in double angular brackets, such as <<a title>>.": "<<Sun>>\nIt is warm.",
    "Close with a postscript that starts with P.S.": "It is warm.\n\nP.S. Bring water.",
    "Give two different answers, with ****** (six asterisks) between them.": "One.\n******\nTwo.",
    "Give exactly 3 bullet points, each a line that begins with an asterisk: * like this": "* a\n* b\n* c",
    "Highlight at least 2 phrases with asterisks, as in *these words*.": "A *b c* and *d*.",
    "Leave at least 1 placeholder in square brackets, for example [name].": "Dear [name],",
    "Put at least 1 word in CAPITALS.": "It is HOT.",
    "Write at least 2 sentences.": "It is warm. I swim.",
}


def test_an_answer_that_does_what_is_asked_passes_the_check_and_another_does_not():
    """The wording is ours, the check is IFEval's: they must mean the same."""
    pytest.importorskip("if_verifiable", reason="needs the extra `instructions`")
    from rlhf_lit.rollout.instruction_reward import InstructionReward

    reward = InstructionReward()
    rows = {row["prompt"]: row for row in compose(["T."] * 3000, seed=1) if len(row["kwargs"]) == 1}
    for asked, answer in FOLLOWED.items():
        row = rows[f"T. {asked}"]
        good, bad = reward.judge(None, [answer, "Yes, WELL"], [row, row])
        assert (good, bad) == (1.0, 1.0 if "CAPITALS" in asked else 0.0), asked


def test_a_prompt_is_within_reach_by_the_numbers_it_asks_for():
    def row(**arguments):
        return {"kwargs": [arguments, {}, None]}

    assert within_reach(row(relation="at least", num_words=50))
    assert not within_reach(row(relation="at least", num_words=51))
    assert within_reach(row(relation="less than", num_words=300))
    assert not within_reach(row(num_bullets=6))
    assert not within_reach(row(prompt_to_repeat="a" * 201))
    assert within_reach(row(num_bullets=None))


# --- rows ------------------------------------------------------------------------------------------------------------


def test_what_of_the_public_files_is_taken():
    assert tasks(
        [
            {"instruction": "Name a fruit. ", "input": ""},
            {"instruction": "Name a fruit.", "input": ""},
            {"instruction": "Sort.", "input": "3 1"},
            {"instruction": "word " * 13, "input": ""},
        ]
    ) == ["Name a fruit."]
    long = "a" * (PAIR_CHARACTERS + 1)
    rows = [
        {"instruction": "Sort.", "input": "3 1", "chosen": "Gladly: 1 3", "rejected": "1 3"},
        {"instruction": "Sort.", "input": "", "chosen": "same", "rejected": "same"},
        {"instruction": "Sort.", "input": "", "chosen": long, "rejected": "b"},
    ]
    assert polite_pairs(rows) == [{"prompt": "Sort.\n3 1", "chosen": "Gladly: 1 3", "rejected": "1 3"}]
    turn = {"from": "human", "value": "Q"}
    pair = {"chosen": {"value": "A"}, "rejected": {"value": "B"}}
    assert demo_pairs([{"conversations": [turn], **pair}, {"conversations": [turn] * 3, **pair}]) == [
        {"prompt": "Q", "chosen": "A", "rejected": "B"}
    ]
    assert dialogues(
        [{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "a"}, {"chosen": "a" * 801, "rejected": "b"}]
    ) == [{"chosen": "a", "rejected": "b"}]


def test_no_held_out_pair_is_learned_from(real_data, tmp_path, capsys):
    prepare(real_data, tmp_path)
    for name in ("polite", "hh"):
        held_out, train = (
            {json.dumps(json.loads(line)) for line in (tmp_path / f"{name}_{part}.jsonl").read_text().splitlines()}
            for part in ("held_out", "train")
        )
        assert len(held_out) == 200
        assert not held_out & train
    ifeval = {json.loads(line)["prompt"] for line in (tmp_path / "ifeval_within_reach.jsonl").read_text().splitlines()}
    own = {json.loads(line)["prompt"] for line in (tmp_path / "instructions.jsonl").read_text().splitlines()}
    assert len(ifeval) == 417
    assert not ifeval & own
    assert "447 rows" in capsys.readouterr().out


# --- stages ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["laptop", "gpu"])
def test_every_stage_is_one_that_fit_accepts(name, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    text = (FOLDER / f"{name}.yaml").read_text()
    settings = Settings(**yaml.safe_load(text) | {"folder": str(tmp_path)})
    assert f"python -m experiments.real_assistant.run experiments/real_assistant/{name}.yaml" in text
    to = settings.evaluation(f"dpo_{settings.seeds[0]}_polite")
    for seed in settings.seeds:
        to = settings.evaluation(f"dpo_{seed}_polite")
        to.mkdir(parents=True)
        (to / "evaluation.json").write_text('{"kl": {"exact": {"mean": 3.14159, "low": 3, "high": 4}}}')
    steps = [step for part in (*settings.stages(STAGES), *settings.matched()) for step in part]
    fits = {step.log.stem: step.words for step in steps if step.words[0] == "fit"}
    assert len(fits) == 4 * len(settings.seeds) + 1
    resolved = dict(zip(fits, resolve(fits), strict=True))
    last = resolved[f"ppo_reward_{settings.seeds[-1]}"]["model"]["init_args"]
    assert last["kl"]["init_args"]["target"] == 3.14
    assert last["reward"]["init_args"]["path"] == str(settings.run("reward", settings.seeds[0]))
    assert {one["model"]["init_args"]["base"]["name"] for one in resolved.values()} == {settings.model}


# --- numbers ---------------------------------------------------------------------------------------------------------


def test_the_exact_test_counts_the_prompts_that_changed():
    """9 won and 1 lost of 10 that changed: p = 2·(1 + 10)/2¹⁰."""
    before, after = np.array([0.0] * 9 + [1.0] + [1.0] * 5), np.array([1.0] * 9 + [0.0] + [1.0] * 5)
    assert results.exact_test(before, after) == (9, 1, pytest.approx(22 / 1024))
    assert results.exact_test(before, before) == (0, 0, 1.0)


def evaluation(folder: Path, scores: list[float], kl: float | None) -> None:
    """As `evaluate` writes it."""

    def estimate(value: float) -> dict[str, float]:
        return {"mean": value, "low": value - 0.1, "high": value + 0.1}

    folder.mkdir(parents=True)
    mean = float(np.mean(scores))
    model = {"scores": {"judge": estimate(mean), "gold": estimate(mean / 2)}, "ended": estimate(0.5)}
    numbers = {"responses": {"model": model}, "kl": None if kl is None else {"exact": estimate(kl)}}
    (folder / "evaluation.json").write_text(json.dumps(numbers))
    lines = [{"row": i + 1, "model/judge": score, "model/tokens": 10 + i} for i, score in enumerate(scores)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_tables_and_the_figure_say_what_was_measured(tmp_path, capsys):
    folder = tmp_path / "evaluations"
    evaluation(folder / "before_instructions", [0, 0, 0, 1], None)
    evaluation(folder / "grpo_0_instructions", [1, 1, 0, 1], 2.5)
    rows = tmp_path / "rows" / "ifeval_within_reach.jsonl"
    rows.parent.mkdir()
    asked = [["a:first"], ["a:first", "b:second"], ["b:second"], ["b:second"]]
    rows.write_text("".join(json.dumps({"instruction_id_list": names}) + "\n" for names in asked))
    results.write(folder, [0, 1], tmp_path / "out")
    text = (tmp_path / "out" / "results.md").read_text()
    assert "| before | 0.250 [0.150, 0.350] | | | 0.125 [0.025, 0.225] | 0 | 12 | 0.50 |" in text
    assert "| grpo, seed 0 | 0.750 [0.650, 0.850] | 0.500 [" in text
    assert "| 2 / 0, 0.5 |" in text
    assert "2.500 [2.400, 2.600] | 12 | 0.50 |" in text
    assert text in capsys.readouterr().out
    assert results.by_check(folder / "before_instructions", folder / "grpo_0_instructions", rows) == {
        "a:first": (2, 0.0, 1.0),
        "b:second": (3, pytest.approx(1 / 3), pytest.approx(2 / 3)),
    }
    assert (tmp_path / "out" / "checks.png").read_bytes().startswith(b"\x89PNG")
