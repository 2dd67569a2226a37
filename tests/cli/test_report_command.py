"""``report`` on runs that the command line has made, and its page in a real browser."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from browser import CHROMIUM, Browser, chromium
from run_folders import metrics

from rlhf_lit.__main__ import main
from rlhf_lit.sweep import runner

SECTIONS = ["arms", "frontier", "numbers", "wins", "overoptimisation", "curves", "lengths", "completions", "configs"]
SWEEP = "runs/sweeps/beta"
JUDGED = [
    "--evaluate", "--judge=RewardFromFunction", "--judge.function=test_report_command.letters",
    "--prompts.path=sft.jsonl", "--prompts.limit=9", "--samples=2",
]  # fmt: skip


def letters(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """A score that differs from response to response, and ties now and then."""
    return [float(sum(map(ord, response)) % 5) for response in responses]


class Here:
    """An arm of a sweep in this process: to import everything anew takes longer than all that it does."""

    def __init__(self, status: int, slot: int) -> None:
        self.popen = SimpleNamespace(pid=os.getpid(), returncode=status, poll=lambda: status)
        self.slot, self.began = slot, time.monotonic()

    @classmethod
    def start(cls, words: list[str], environment: dict[str, str], log: Path, slot: int, lock: int) -> Here:
        return cls(main(words[words.index("rlhf_lit") + 1 :]), slot)

    def signal(self, number: int) -> None:
        """There is nothing left to end."""


@pytest.fixture(scope="module")
def made(materials: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real sweep of two β and two seeds, and a PPO run that watches a second reward."""
    place = tmp_path_factory.mktemp("report") / "place"
    shutil.copytree(materials, place)
    sweep = {
        "program": "rlhf_lit",
        "method": "grid",
        "parameters": {"model.loss.beta": {"values": [0.1, 0.5]}, "seed_everything": {"values": [0, 1]}},
        "command": [
            "${env}", "${interpreter}", "-m", "${program}", "fit", "--config", "dpo.yaml", "--preflight=false",
            "--data.validation.limit=8", "--trainer.max_epochs=2", "${args}",
        ],
    }  # fmt: skip
    (place / "beta.yaml").write_text(yaml.safe_dump(sweep))
    reward = {
        "class_path": "RewardSum",
        "init_args": {
            "sources": {
                name: {"class_path": "RewardFromFunction", "init_args": {"function": function}}
                for name, function in (("proxy", "test_command_line.brevity"), ("gold", "test_report_command.letters"))
            },
            "weights": {"proxy": 1.0, "gold": 0.0},
        },
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(runner, "Process", Here)
        assert main(["sweep", "beta.yaml"]) == 0
        options = [f"--model.reward={json.dumps(reward)}", "--data.validation={path: sft.jsonl, limit: 8}"]
        assert main(["fit", "--config=ppo.yaml", "--preflight=false", "--data.ppo_epochs=2", *options]) == 0
    return place


@pytest.fixture
def here(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    folder = tmp_path / "here"
    shutil.copytree(made, folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(command: Callable, here: Path) -> Callable:
    """The command line, at work there (made after ``command``, which works elsewhere)."""
    return command


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


# --- from run folders alone ------------------------------------------------------------------------------------------


def test_a_sweep_and_a_run_on_one_page(call: Callable, here: Path) -> None:
    answer = call("report", SWEEP, "runs/ppo", "--out", "out")
    assert answer.status == 0, answer.err
    assert answer.out == "3 arms, 5 runs · 3 arms with fewer than 3 seeds: no interval over seeds · out/report.html\n"
    page = Path("out/report.html").read_text()
    assert re.findall(r'<section id="(\w+)">', page) == SECTIONS
    assert "1 seed: no interval over seeds" in page
    assert "2 seeds: " in page
    assert "reward beside KL of DPO beta=0.1, DPO beta=0.5: rlhf-lit report … --evaluate" in page
    assert "<script" not in page
    assert not re.findall(r'(?:src|href)="(?!data:image/svg|#)', page), "nothing is loaded from elsewhere"
    found = rows(Path("out/report.csv"))
    assert [(row["arm"], row["seed"]) for row in found] == [
        ("DPO beta=0.1", "0"), ("DPO beta=0.1", "1"), ("DPO beta=0.5", "0"), ("DPO beta=0.5", "1"), ("PPO", "0"),
    ]  # fmt: skip
    for row in found:
        name = "val/scores" if row["arm"] == "PPO" else "val/margin"
        last = [line[name] for line in metrics(here / row["run"]) if line[name]][-1]
        assert float(row[name]) == float(last)
    arms = rows(Path("out/arms.csv"))
    margins = [float(row["val/margin"]) for row in found[:2]]
    assert float(arms[0]["val/margin"]) == pytest.approx(sum(margins) / 2)
    figures = {file.name for file in Path("out/figures").iterdir()}
    assert {"frontier_logged.svg", "frontier_logged.png", "overoptimisation_rollouts.svg"} <= figures
    assert page.count("data:image/svg+xml") == len(figures) / 2

    # What is not a report's is not touched.
    Path("out/mine.txt").write_text("mine")
    before = contents(here / "out")
    answer = call("report", SWEEP, "--out=out")
    assert answer.status == 2
    assert answer.err == (
        "error: --out out: mine.txt in it is not a report's; name a new folder, or that of an earlier report\n"
    )
    assert contents(here / "out") == before
    Path("out/mine.txt").unlink()
    # Another report takes the earlier one's place, and an arm that failed is left out by its name.
    arm = next(Path(SWEEP).glob("003-*/arm.json"))
    arm.write_text(json.dumps({**json.loads(arm.read_text()), "status": "failed", "error": "a < b"}))
    answer = call("report", SWEEP, "--out=out")
    assert answer.status == 0, answer.err
    assert f"left out: {arm.parent}: the sweep has it as failed: a < b" in answer.err
    page = Path("out/report.html").read_text()
    assert "1 left out, named below" in page
    assert "the sweep has it as failed: a &lt; b" in page
    assert len(rows(Path("out/report.csv"))) == 3
    assert not list(Path("out/figures").glob("overoptimisation*"))


@pytest.mark.parametrize(
    ("spoil", "names", "complaint"),
    [
        (None, ["runs/nothing"], "runs/nothing: no such run; name a run folder"),
        (None, ["sft.jsonl"], "sft.jsonl is a file: name the run's folder"),
        (None, ["tiny"], "tiny: not a run folder: it has no config.yaml, no version_0 and no sweep.json"),
        (None, [SWEEP, "--ignore=[model.bate]"], "--ignore model.bate: no run has such a key"),
        (None, [SWEEP, "--evaluate"], "was not trained in the built-in world: name prompts (--prompts.path=FILE)"),
        ("hf", ["runs/ppo"], "nothing finished to report on: runs/ppo/version_0: it has no hf/"),
        ("metrics.csv", ["runs/ppo"], "nothing finished to report on: runs/ppo/version_0: metrics.csv is torn: row "),
        ("config.yaml", ["runs/ppo/version_0"], "config.yaml is not a run's configuration"),
    ],
)
def test_bad_input_is_one_line(call: Callable, here: Path, spoil: str | None, names: list[str], complaint: str) -> None:
    if spoil == "hf":
        shutil.rmtree(here / "runs/ppo/version_0/hf")
    elif spoil is not None:
        file = here / "runs/ppo/version_0" / spoil
        file.write_text(file.read_text()[:-40] if spoil == "metrics.csv" else "model: [")
    answer = call("report", *names, "--out=out")
    assert answer.status == 2
    assert answer.err.startswith("error: ")
    assert complaint in answer.err
    assert answer.err.count("\n") == 1
    assert not Path("out").exists()


# --- with evaluations ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def evaluated(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same, its runs evaluated; with their first report in `out`."""
    folder = tmp_path_factory.mktemp("evaluated") / "place"
    shutil.copytree(made, folder, symlinks=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["report", SWEEP, "runs/ppo", "--out=out", *JUDGED]) == 0
    return folder


def test_runs_are_evaluated_once_and_compared(
    command: Callable, evaluated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(evaluated)
    answer = command("report", SWEEP, "runs/ppo", "--out=again", *JUDGED)
    assert answer.status == 0, answer.err
    assert "evaluate " not in answer.err, "all of them were"
    assert contents(evaluated / "out") == contents(evaluated / "again"), "the same runs give the same bytes"

    found = {row["run"]: row for row in rows(evaluated / "out/report.csv")}
    scores: dict[str, list[list[float]]] = {}
    for run, row in found.items():
        (folder,) = (evaluated / run / "evaluation").iterdir()
        lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
        assert len(lines) == 18
        own = letters([], [line["model"] for line in lines], [])
        assert float(row["evaluation/judge"]) == pytest.approx(sum(own) / 18)
        numbers = json.loads((folder / "evaluation.json").read_text())
        assert numbers["reference"] == numbers["baseline"] == str(evaluated / "tiny")
        assert float(row["evaluation/kl_exact"]) == numbers["kl"]["exact"]["mean"]
        scores.setdefault(row["arm"], []).append(own)
    ours, theirs = scores["DPO beta=0.1"], scores["DPO beta=0.5"]
    pairs = [
        (x > y) + (x == y) / 2
        for a, b in itertools.product(ours, theirs)
        for i in range(9)
        for x, y in itertools.product(a[2 * i : 2 * i + 2], b[2 * i : 2 * i + 2])
    ]
    page = (evaluated / "out/report.html").read_text()
    matrix = page[page.index('<section id="wins">') : page.index('<section id="overoptimisation">')]
    assert f"<td>{sum(pairs) / len(pairs):.4g}<small>prompts [" in matrix
    assert "Missing" not in page[page.index('<section id="frontier">') : page.index('<section id="overoptimisation">')]


def test_another_evaluation_is_made_beside_the_first(call: Callable, here: Path, evaluated: Path) -> None:
    found = "runs/ppo/version_0/evaluation"
    shutil.copytree(evaluated / found, here / found)
    answer = call("report", "runs/ppo", "--out=other", *JUDGED, "--seed=1")
    assert answer.status == 0, answer.err
    assert answer.err.count("evaluate ") == 1
    assert len(list(Path(found).iterdir())) == 2
    assert f"left out: {found}/version_0: another kind of evaluation" in answer.err


# --- in a browser ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here (Debian: apt-get install chromium)")
    with chromium(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture(scope="module")
def page(evaluated: Path) -> Path:
    """The page, with a model that tries to be markup; evaluations are found without being asked for."""
    file = next((evaluated / SWEEP).glob("000-*/version_0/evaluation/*/samples.jsonl"))
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    lines[0]["model"] = (
        "</pre><script>document.title = 'broken'</script><img src=x onerror=\"document.title='broken'\">"
    )
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(evaluated)
        assert main(["report", SWEEP, "runs/ppo", "--out=shown"]) == 0
    return evaluated / "shown/report.html"


@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1280, "light")])
def test_the_page_in_a_browser(browser: Browser, page: Path, tmp_path: Path, width: int, scheme: str) -> None:
    browser.open(page, width, scheme=scheme)
    assert browser.evaluate("document.documentElement.scrollWidth") == width, "no sideways scrolling"
    assert browser.evaluate("[...document.querySelectorAll('section')].map(one => one.id)") == SECTIONS
    figures = browser.evaluate(
        "[...document.images].map(one => { const box = one.getBoundingClientRect(); "
        "return [one.naturalWidth, box.left, box.right, one.alt.length] })"
    )
    assert len(figures) == len(list((page.parent / "figures").glob("*.svg"))) > 8
    for natural, left, right, described in figures:
        assert natural > 300
        assert 0 <= left < right <= width
        assert described > 10
    assert browser.evaluate("document.title").startswith("Report on"), "a model's answer is text, and nothing runs"
    assert browser.evaluate("document.scripts.length") == 0
    assert all(url.startswith(("file:", "data:")) for url in browser.requested)
    ink, paper = browser.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        ".map(text => text.match(/\\d+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0))"
    )
    assert (ink > paper) == (scheme == "dark")
    browser.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 50_000


def test_the_page_in_print(browser: Browser, page: Path, tmp_path: Path) -> None:
    browser.open(page, 1280)
    browser.print_to(tmp_path / "page.pdf")
    printed = (tmp_path / "page.pdf").read_bytes()
    assert printed.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", printed)) > 2
    browser.call("Emulation.setEmulatedMedia", media="print")
    browser.call("Emulation.setDeviceMetricsOverride", width=794, height=1123, deviceScaleFactor=1, mobile=False)  # A4
    assert browser.evaluate("document.documentElement.scrollWidth") <= 794, "no table is cut at the paper's edge"
