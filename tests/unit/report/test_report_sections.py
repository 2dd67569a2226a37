"""What the sections make of runs whose every number is known."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
from report_runs import DPO, PPO, changed, made, study_of, write_evaluation

from rlhf_lit.report.evaluations import comparable
from rlhf_lit.report.metrics import Series
from rlhf_lit.report.page import render
from rlhf_lit.report.sections.completions import completions
from rlhf_lit.report.sections.frontier import frontier
from rlhf_lit.report.sections.learning import over_seeds, smoothed
from rlhf_lit.report.sections.lengths import lengths
from rlhf_lit.report.sections.overoptimisation import over_optimisation
from rlhf_lit.report.sections.wins import points, win_rates
from rlhf_lit.report.study import fact
from rlhf_lit.report.tables import arms_csv, runs_csv

BETA = "model__init_args__loss__init_args__beta"
KL = {"exact": {"mean": 2.0, "low": 1.0, "high": 3.0}, "k1": {"mean": 2.0, "low": 1.0, "high": 3.0}}


def lines(scores: list[float], text: str = "yes", judge: str = "gold") -> list[dict]:
    return [
        {"prompt": f"p{i}", "model": text, f"model/{judge}": score, "model/tokens": i + 1}
        for i, score in enumerate(scores)
    ]


@pytest.fixture
def pair(tmp_path: Path):
    """Two arms with two seeds each, evaluated on three prompts."""
    scores = {(0.1, 0): [1, 0, 0], (0.1, 1): [1, 1, 0], (0.5, 0): [0, 0, 0], (0.5, 1): [0, 0, 1]}
    runs = []
    for (beta, seed), values in scores.items():
        run = made(tmp_path / f"{beta}_{seed}", changed(DPO, seed_everything=seed, **{BETA: beta}))
        write_evaluation(run.folder / "evaluation" / "version_0", run, lines(values), kl=KL)
        runs.append(run)
    return study_of(runs, comparable(runs)[0])


# --- win rates -------------------------------------------------------------------------------------------------------


def test_win_rates_are_those_of_enumeration() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = ([rng.integers(0, 3, (5, 2)).astype(float) for _ in range(seeds)] for seeds in (2, 3))
    expected = [
        np.mean(
            [
                (a[i, j] > b[i, k]) + 0.5 * (a[i, j] == b[i, k])
                for a, b in itertools.product(ours, theirs)
                for j, k in itertools.product(range(2), range(2))
            ]
        )
        for i in range(5)
    ]
    assert points(ours, theirs) == pytest.approx(expected)
    assert points(ours, theirs) + points(theirs, ours) == pytest.approx(1)


def test_the_matrix_of_two_arms_by_hand(pair) -> None:
    """Prompt 0: always 1 against 0. Prompt 1: half of ours 1, all theirs 0: ¾. Prompt 2: 0 against half 1: ¼."""
    section = win_rates(pair)
    (table,) = section.tables
    (_, _, ours), (_, theirs, _) = table.rows
    assert ours.text == "0.6667"
    assert theirs.text == "0.3333"
    # Seed 0: (1 + ½ + ½)/3; seed 1: (1 + 1 + 0)/3.
    assert ours.notes[1] == "2 seeds: 0.6667, 0.6667"


def test_without_evaluations_a_line_says_what_makes_them(tmp_path: Path) -> None:
    section = win_rates(study_of([made(tmp_path / "a", DPO)]))
    assert not section.figures
    assert "--evaluate" in section.missing[0]


def test_evaluations_of_another_kind_are_left_out(tmp_path: Path) -> None:
    runs = [made(tmp_path / str(i), changed(DPO, seed_everything=i)) for i in range(3)]
    for i, run in enumerate(runs):
        sampling = {"temperature": 0.5 if i == 1 else 1.0, "rows_at_once": 8 * i + 1}
        settings = {"seed": 0, "samples": 1, "sampling": sampling, "template": "auto"}
        write_evaluation(run.folder / "evaluation", run, lines([1, 0]), settings=settings)
    kept, left = comparable(runs)
    assert set(kept) == {runs[0].folder, runs[2].folder}, "how many rows at once makes no other kind"
    assert "temperature 0.5" in left[0].reason


def test_a_run_evaluated_twice_counts_with_the_kind_that_all_have(tmp_path: Path) -> None:
    runs = [made(tmp_path / str(i), changed(DPO, seed_everything=i)) for i in range(2)]
    for run in runs:
        write_evaluation(run.folder / "evaluation" / "version_0", run, lines([1, 0]))
    write_evaluation(runs[0].folder / "evaluation" / "version_1", runs[0], lines([5, 5, 5]))
    kept, left = comparable(runs)
    assert {one.folder.name for one in kept.values()} == {"version_0"}
    assert len(left) == 1


def test_gold_is_what_counts_where_there_is_a_judge_too(tmp_path: Path) -> None:
    run = made(tmp_path / "a", DPO)
    both = [{**line, "model/judge": 7.0} for line in lines([1, 0])]
    write_evaluation(run.folder / "evaluation", run, both, kl=KL)
    study = study_of([run], comparable([run])[0])
    assert study.reward == "gold"
    assert frontier(study).tables[0].rows[0][3].text == "0.5"


def test_a_judge_of_pairs_tells_who_wins_and_scores_nothing(tmp_path: Path) -> None:
    """Beside a judge that scores, and alone."""
    rate = {"mean": 0.75, "low": 0.5, "high": 1.0}
    compared = {"baseline": "base", "win_rates": {"gold": {"win_rate": rate}}}
    for name, scored in (("alone", []), ("beside", ["judge"])):
        run = made(tmp_path / name, DPO)
        plain = [{key: value for key, value in line.items() if key != "model/gold"} for line in lines([1, 0])]
        plain = [{**line, **dict.fromkeys((f"model/{judge}" for judge in scored), 7.0)} for line in plain]
        judges = {"gold": "teacher at http://a/v1", **dict.fromkeys(scored, "some")}
        write_evaluation(run.folder / "evaluation", run, plain, **compared, judges=judges)
        study = study_of([run], comparable([run])[0])
        assert study.reward == (scored[0] if scored else None)
        rates, over_prompts = fact(study, study.arms[0], "evaluation/win_rate")
        assert rates.values == (0.75,)
        assert over_prompts is not None
        assert (over_prompts.low, over_prompts.high) == (0.5, 1.0)
        page = render(study, [frontier(study), win_rates(study), lengths(study), completions(study)])
        assert ("judge 7" in page) == bool(scored)


def test_an_evaluation_beside_a_run_is_found_by_its_model(tmp_path: Path) -> None:
    runs = [made(tmp_path / f"version_{i}", changed(DPO, seed_everything=i)) for i in range(2)]
    write_evaluation(tmp_path / "evaluated", runs[1], lines([1, 0]))
    assert set(comparable(runs)[0]) == {runs[1].folder}


# --- frontier and final numbers --------------------------------------------------------------------------------------


def test_an_evaluation_stands_in_the_frontier_with_both_intervals(pair) -> None:
    section = frontier(pair)
    table = section.tables[0]
    assert [row[0].text for row in table.rows] == ["beta=0.1", "beta=0.5"]
    assert table.rows[0][2].text == "2"
    assert table.rows[0][3].text == "0.5"
    assert table.rows[0][3].notes[0] == "2 seeds: 0.3333, 0.6667"
    assert table.rows[0][3].notes[1].startswith("prompts [0, ")
    assert [figure.name for figure in section.figures] == ["frontier"]
    assert not section.missing


def test_kl_against_a_swept_number(tmp_path: Path) -> None:
    """KL falls with β: ρ = −1 over arms; over runs −1 + what the ties of β take."""
    rows = [{"step": 4, "val/scores": 1.0, "val/kl_exact": 0.0}]
    runs = []
    for i, kl in enumerate((3.0, 2.0, 1.0)):
        config = changed(PPO, model__init_args__kl={"class_path": "a.FixedKL", "init_args": {"beta": 0.1 * (i + 1)}})
        runs.append(made(tmp_path / str(i), config, [{**rows[0], "val/kl_exact": kl, "val/scores": 0.5 * i}]))
    table = frontier(study_of(runs)).tables[1]
    assert [(row[0].text, row[1].text, row[2].text) for row in table.rows] == [
        ("PPO: KL", "model.kl.beta", "−1"),
        ("PPO: reward on held-out prompts", "model.kl.beta", "1"),
    ]


def test_what_has_no_kl_is_named_with_what_would_measure_it(tmp_path: Path) -> None:
    sft = changed(DPO, model__class_path="rlhf_lit.algorithms.SFT")
    section = frontier(study_of([made(tmp_path / "a", DPO), made(tmp_path / "b", sft)]))
    assert not section.figures
    assert "of DPO: rlhf-lit report … --evaluate" in section.missing[0]
    assert "KL of SFT" in section.missing[1]
    assert "--reference" in section.missing[1]


def test_numbers_of_arms_and_runs_as_csv(pair) -> None:
    runs = [line.split(",") for line in runs_csv(pair).splitlines()]
    at = {name: i for i, name in enumerate(runs[0])}
    assert [float(row[at["evaluation/gold"]]) for row in runs[1:]] == pytest.approx([1 / 3, 2 / 3, 0, 1 / 3])
    assert [row[at["model.loss.beta"]] for row in runs[1:]] == ["0.1", "0.1", "0.5", "0.5"]
    arms = [line.split(",") for line in arms_csv(pair).splitlines()]
    at = {name: i for i, name in enumerate(arms[0])}
    assert float(arms[1][at["evaluation/gold"]]) == pytest.approx(0.5)
    assert arms[1][at["evaluation/gold/low"]] == "", "two seeds"
    assert float(arms[1][at["evaluation/kl_exact/prompts_high"]]) == 3


def test_means_of_prompt_intervals(pair) -> None:
    _, prompts = fact(pair, pair.arms[0], "evaluation/kl_exact")
    assert (prompts.mean, prompts.low, prompts.high) == (2, 1, 3)
    seeds, prompts = fact(pair, pair.arms[0], "evaluation/length")
    assert seeds.values == (2, 2)
    assert (prompts.mean, prompts.low, prompts.high) == (2, 1, 3), "of 1, 2 and 3 tokens"


# --- curves ----------------------------------------------------------------------------------------------------------


def test_a_long_curve_is_averaged_over_a_fortieth_of_it() -> None:
    """80 points: means of two that look back."""
    found = smoothed(Series(np.arange(80.0), np.arange(80.0) + 4))
    assert found.values[:3].tolist() == [4, 4.5, 5.5], "of the first there is no more than itself"
    assert found.values[-1] == 82.5
    short = Series(np.arange(40.0), np.arange(40.0))
    assert smoothed(short) is short


def test_curves_of_seeds_meet_where_all_have_logged(tmp_path: Path) -> None:
    def run(seed: int, *points: tuple[int, float]):
        rows = [{"step": step, "val/loss": value} for step, value in points]
        return made(tmp_path / str(seed), changed(DPO, seed_everything=seed), rows)

    runs = [run(0, (1, 1.0), (2, 5.0), (3, 3.0)), run(1, (1, 2.0), (3, 5.0)), run(2, (1, 3.0), (3, 1.0), (4, 9.0))]
    (two,) = study_of(runs[:2]).arms
    curve = over_seeds(two, "val/loss")
    assert (curve.steps.tolist(), curve.mean.tolist()) == ([1, 3], [1.5, 4])
    assert (curve.low.tolist(), curve.high.tolist()) == ([1, 3], [2, 5]), "the range of two"
    (three,) = study_of(runs).arms
    curve = over_seeds(three, "val/loss")
    assert curve.mean.tolist() == [2, 3]
    assert curve.high[0] == pytest.approx(2 + 2.484138, abs=1e-6)
    (one,) = study_of(runs[:1]).arms
    assert over_seeds(one, "val/loss").low is None
    assert over_seeds(one, "val/accuracy") is None


# --- over-optimisation -----------------------------------------------------------------------------------------------


def rollouts(alpha: float, beta: float) -> list[dict[str, float]]:
    """Rollouts on the law, each beside the two optimizer steps made on it; the start's rewards are not 0."""
    rows = []
    for i, d in enumerate((0.0, 0.4, 0.9, 1.6, 2.5)):
        gold = d * (alpha - beta * math.log(d)) if d else 0.0
        values = {"objective/kl_exact": d * d, "objective/scores": 2 + d, "objective/scores/truth": gold - 0.5}
        rows += [{"step": 2 * i + k, **values} for k in range(2)]
    return rows


def test_the_law_is_found_in_rollouts(tmp_path: Path) -> None:
    runs = [
        made(tmp_path / str(seed), changed(PPO, seed_everything=seed), rollouts(0.8 + 0.1 * seed, 0.3))
        for seed in range(3)
    ]
    section = over_optimisation(study_of(runs))
    assert [figure.name for figure in section.figures] == ["overoptimisation_rollouts"]
    ((label, _, alpha, beta, r2, count, peak),) = section.tables[0].rows
    assert label.text == "PPO"
    assert (alpha.text, beta.text) == ("0.9", "0.3")
    # α of the seeds 0.8, 0.9, 1.0: s = 0.1, 4.30265·0.1/√3 = 0.2484.
    assert alpha.notes == ("3 seeds [0.6516, 1.148]",)
    assert r2.text == "1.00, 1.00, 1.00"
    assert count.text == "12", "a rollout counts once, and the start is not fitted"
    assert peak.text.split(", ")[1] == f"{math.exp(2 * (0.9 / 0.3 - 1)):.4g}"


def test_without_a_source_that_is_only_watched_there_is_no_gold(tmp_path: Path) -> None:
    config = changed(PPO, model__init_args__reward__init_args__weights={"proxy": 1.0, "truth": 0.5})
    section = over_optimisation(study_of([made(tmp_path / "a", config, rollouts(0.8, 0.3))]))
    assert not section.figures
    assert "weight 0" in section.missing[0]


def test_the_law_over_arms_and_of_best_of_n(tmp_path: Path) -> None:
    runs, base = [], "/somewhere/sft/hf"
    for i, d in enumerate((0.5, 1.0, 1.5, 2.0)):
        run = made(tmp_path / str(i), changed(DPO, **{BETA: 1.0 / (i + 1)}))
        gold = 0.25 + d * (0.7 - 0.2 * math.log(d))
        best = []
        for n in (1, 2, 4, 8):
            kl = math.log(n) - (n - 1) / n
            worth = 0.1 + kl**0.5 * (0.6 - 0.4 * kl**0.5)
            best.append({"n": n, "kl": kl, "proxy": {"mean": float(n)}, "gold": {"mean": worth}})
        start = {"gold": {"mean": 0.25}, "judge": {"mean": 0.0}}
        write_evaluation(
            run.folder / "evaluation",
            run,
            [{**line, "model/judge": d} for line in lines([gold, gold])],
            reference=base,
            baseline=base,
            responses={"model": {"length": None}, "baseline": {"scores": start}},
            kl={"exact": {"mean": d * d, "low": None, "high": None}},
            best_of_n=best,
        )
        runs.append(run)
    section = over_optimisation(study_of(runs, comparable(runs)[0]))
    assert [figure.name for figure in section.figures] == ["overoptimisation_arms", "overoptimisation_best_of_n"]
    arms, *best_of = section.tables[0].rows
    assert (arms[2].text, arms[3].text, arms[4].text) == ("0.7", "0.2", "1.00")
    assert len(best_of) == 4
    assert {(row[2].text, row[3].text, row[4].text) for row in best_of} == {("0.6", "0.4", "1.00")}


# --- length and completions ------------------------------------------------------------------------------------------


def test_the_correlation_of_score_and_length(pair) -> None:
    """Scores 1 0 0 with lengths 1 2 3: −√3/2; 1 1 0: the same."""
    section = lengths(pair)
    table = section.tables[-1]
    assert table.rows[0][2].text == "−0.866"
    assert table.rows[0][2].notes == ("2 seeds: −0.866, −0.866",)
    assert section.tables[0].rows[0][2].text == "2", "tokens"


def test_what_models_say_cannot_become_markup(tmp_path: Path) -> None:
    evil = "</pre><script>alert(1)</script><img src=x onerror=alert(1)>"
    run = made(tmp_path / "a", DPO)
    write_evaluation(
        run.folder / "evaluation", run, [{**line, "prompt": f"{evil}{i}"} for i, line in enumerate(lines([1, 0], evil))]
    )
    study = study_of([run], comparable([run])[0])
    section = completions(study)
    assert section.completions[0].responses[0].text == evil
    page = render(study, [section])
    assert "<script" not in page
    assert "<img" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_samples_of_the_last_step_stand_in_for_an_evaluation(tmp_path: Path) -> None:
    run = made(tmp_path / "a", DPO)
    rows = [{"step": step, "prompt": "p", "response": f"at {step}", "tokens": 2, "ended": False} for step in (1, 2)]
    run.samples.extend(rows)
    (shown,) = completions(study_of([run])).completions
    assert shown.responses[0].text == "at 2"
    assert shown.responses[0].notes == "seed 0 · step 2 · 2 tokens · not ended"
