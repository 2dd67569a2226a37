"""The experiments' own arithmetic, and their settings held against the commands that they call."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[2]))  # experiments are not part of the installed package

from experiments.controlled_sentiment import prepare
from experiments.overoptimisation import run as overoptimisation
from experiments.run import Curve, Run, Settings, at_equal_kl, results
from experiments.steps import Step, every
from rlhf_lit.commands import report as report_command
from rlhf_lit.commands.sweep_arms import resolve
from rlhf_lit.report.sections.overoptimisation import Trace
from rlhf_lit.sweep.file import read

ROOT = Path(__file__).parents[2]
FILES = sorted(ROOT.glob("experiments/*/*.yaml"))
SWEEPS = [path for path in FILES if "\nmethod:" in path.read_text()]
SETTINGS = [path for path in FILES if "\nsweeps:" in path.read_text()]
FOLDERS = sorted({path.parent.name for path in SETTINGS} | {"overoptimisation"})


def named(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


# --- settings --------------------------------------------------------------------------------------------------------


def test_every_arm_that_a_sweep_begins_and_ends_with_is_one_that_fit_accepts(monkeypatch):
    """All experiments' sweeps, the ones for real models included, through the parser of their runs."""
    monkeypatch.chdir(ROOT)
    commands = {}
    for path in SWEEPS:
        file = read(path)
        arms = file.arms(0, None)
        assert f"--name={yaml.safe_load(file.text)['name']}" in file.command
        assert len({arm["seed_everything"] for arm in arms}) >= 3
        commands |= {f"{named(path)} {i}": file.argv(arms[i]) for i in (0, -1)}
    assert len(commands) == 2 * len(SWEEPS) >= 20
    assert len(list(resolve(commands))) == len(commands)


@pytest.mark.parametrize("path", SETTINGS, ids=named)
def test_settings_name_sweeps_and_options_that_exist(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(path.read_text())
    content["curve"] = Curve(**content["curve"]) if "curve" in content else None
    settings = Settings(**content)
    asked: list[dict[str, Any]] = []

    def report(**options: Any) -> SimpleNamespace:
        asked.append(options)
        return SimpleNamespace(left_out=(), arms=(), runs=())

    monkeypatch.setattr(report_command, "report", report)
    for file in settings.sweeps:
        assert read(Path(file)).arms(0, None)
    assert report_command.main(["runs/x", *settings.report, "--out=reports/x"]) == 0
    assert asked[0]["evaluate"]
    assert f"python -m experiments.run {path.relative_to(ROOT)}" in path.read_text()


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_experiment_has_a_page_a_result_and_a_real_model(folder):
    files = {file.name for file in (ROOT / "experiments" / folder).iterdir()}
    page = (ROOT / "experiments" / folder / "README.md").read_text()
    for part in ("**Question.**", "**Command**", "**Measured", "**Answer.**", "**What did not work.**", "real model"):
        assert part in page
    assert {"arms.csv", "results.csv"} & files
    assert any(name.endswith(".png") and f"]({name})" in page for name in files)
    assert files & {"qwen_0.5b.yaml", "gpt2_imdb.yaml"}


@pytest.mark.parametrize("name", ["quickstart", "qwen_0.5b"])
def test_proxies_and_policies_of_over_optimisation_are_ones_that_fit_accepts(name, monkeypatch, tmp_path):
    content = yaml.safe_load((ROOT / f"experiments/overoptimisation/{name}.yaml").read_text())
    (tmp_path / "pairs.jsonl").write_text("1\n2\n3\n")
    content |= {"folder": str(tmp_path), "pairs": str(tmp_path / "pairs.jsonl")}
    settings = overoptimisation.Settings(**content)
    monkeypatch.chdir(ROOT)
    proxies, policies, choices = settings.proxies(), settings.policies(), settings.choices()
    assert len(proxies) == len(policies) == len(choices) == len(settings.sizes) * len(settings.seeds)
    assert sorted((tmp_path / "pairs_1.jsonl").read_text()) == sorted("1\n2\n3\n")
    proxy, policy = resolve({"proxy": proxies[0].words, "policy": policies[-1].words})
    assert proxy["data"]["init_args"]["train"]["limit"] == settings.sizes[0]
    assert proxy["trainer"]["max_steps"] >= settings.least_steps
    reward = policy["model"]["init_args"]["reward"]["init_args"]
    assert reward["weights"] == {"proxy": 1.0, "gold": 0.0}
    assert reward["sources"]["proxy"]["init_args"]["path"] == f"{tmp_path}/proxy_{settings.sizes[-1]}_seed_2"


# --- arithmetic ------------------------------------------------------------------------------------------------------


def arms(*points: tuple[str, int, float, float]) -> list[Run]:
    """Runs by algorithm, seed, KL and reward; an arm for each KL in a whole number of nats."""
    return [
        Run(f"{algorithm} {round(kl)}", seed, kl, reward, {"algorithm": algorithm, "β": str(1 / (1 + round(kl)))})
        for algorithm, seed, kl, reward in points
    ]


def test_equal_kl_is_on_the_line_between_the_curves_two_nearest_arms_of_the_same_seed():
    runs = arms(("DPO", 0, 0.0, 0.0), ("DPO", 0, 2.0, 1.0), ("DPO", 1, 0.0, 9.0), ("DPO", 1, 2.0, 9.0))
    curve = Curve("DPO")
    (one,) = arms(("PPO", 0, 0.5, 0.75))
    assert at_equal_kl(curve, runs, one) == pytest.approx(0.5)
    (beyond,) = arms(("PPO", 0, 2.5, 0.75))
    assert at_equal_kl(curve, runs, beyond) is None


def test_the_tables_say_what_was_measured():
    """Means, Student's interval for three seeds (t = 4.3027), ρ = −1 for KL that falls with β, and the comparison."""
    runs = arms(
        *(("DPO", seed, kl, kl / 2) for seed in range(3) for kl in (0.0, 1.0, 2.0)),
        *(("PPO", seed, 1.0, 0.5 + 0.1 * seed) for seed in range(3)),
    )
    text = results(Settings([], [], numbers={"DPO": "β"}, curve=Curve("DPO")), runs)
    half = 4.302653 * 0.1 / 3**0.5
    assert f"| PPO 1 | 3 | 1 [1, 1] | 0.6 [{0.6 - half:.3g}, {0.6 + half:.3g}] |" in text
    assert "| DPO | β | 9 | -1.000 | -1.000 |" in text
    assert f"| PPO 1 | 1 [1, 1] | 0.1 [{0.1 - half:.3g}, {0.1 + half:.3g}] |" in text
    outside = results(Settings([], [], curve=Curve("DPO")), [*runs, *arms(("PPO", 0, 7.0, 1.0))])
    assert "| PPO 7 | 7 | its KL is outside the curve's |" in outside


def trace(gold: Sequence[float], proxy: Sequence[float]) -> Trace:
    """Rollouts that go a tenth of a nat further each time."""
    return Trace("", np.sqrt(0.1 * np.arange(1, len(gold) + 1)), np.array(gold), np.array(proxy))


def test_over_optimisation_is_a_gold_reward_that_falls_while_the_proxy_rises():
    rise, fall = np.linspace(0, 1, 20), np.linspace(1, 0, 20)
    found = overoptimisation.over_rollouts(trace([*rise, *fall], np.arange(40.0).tolist()))
    assert found["over_optimised"]
    # Moving means of five: the highest is around the two tops, (18/19 + 1 + 1 + 18/19 + 17/19)/5.
    assert found["gold_peak"] == pytest.approx((18 + 19 + 19 + 18 + 17) / 19 / 5)
    assert found["gold_end"] == pytest.approx(2 / 19)
    assert found["kl_end"] == pytest.approx(0.1 * 38)
    assert not overoptimisation.over_rollouts(trace([*rise, *rise + 1], np.arange(40.0).tolist()))["over_optimised"]
    assert not overoptimisation.over_rollouts(trace([*rise, *fall], np.zeros(40).tolist()))["over_optimised"]


def test_steps_that_have_run_are_passed_over_and_a_failure_stops_no_other(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "done").mkdir()
    bad = Step(("configs", "copy", "nowhere"), "never", tmp_path / "logs/bad.log")  # commands that need no torch
    skipped = Step(("configs", "copy", "nowhere"), "do*", tmp_path / "logs/skipped.log")
    good = Step(("configs",), "never", tmp_path / "logs/good.log")
    with pytest.raises(RuntimeError, match=r"bad\.log: ended with status 2: .*nowhere"):
        every([bad, skipped, good], 2)
    assert "dpo_beta" in (tmp_path / "logs/good.log").read_text()
    assert not (tmp_path / "logs/skipped.log").exists()
    assert capfd.readouterr().out.count("$ python -m rlhf_lit") == 2


# --- sentiment -------------------------------------------------------------------------------------------------------


def test_openings_and_how_they_go_on():
    text = 'One two three four five. Six seven. Eight nine.\n\nToo short.\n\nA b c d e f. G "h i." J k.'
    assert list(prepare.beginnings(text, 3, 2)) == [
        ("One two three", "four five. Six seven."),
        ("A b c", 'd e f. G "h i."'),
    ]


def test_the_more_cheerful_of_two_continuations_is_chosen_and_ties_make_no_pair():
    pytest.importorskip("vaderSentiment", reason="the sentiment score needs the package vaderSentiment")
    rows = list(prepare.pairs(["p"], [["a sad day", "a happy day", "a day", "the day"]]))
    told = {(row["chosen"], row["rejected"]) for row in rows}
    assert told == {
        ("a happy day", "a sad day"), ("a day", "a sad day"), ("the day", "a sad day"),
        ("a happy day", "a day"), ("a happy day", "the day"),
    }  # fmt: skip
    assert {row["prompt"] for row in rows} == {"p"}
    assert json.dumps(rows)


def test_the_committed_results_are_those_of_three_seeds():
    for folder in FOLDERS:
        for file in (ROOT / "experiments" / folder).glob("arms.csv"):
            with file.open(newline="") as lines:
                assert {row["seeds"] for row in csv.DictReader(lines)} == {"3"}, file
