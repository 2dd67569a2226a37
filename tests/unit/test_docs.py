"""The documents, held against the code: paths, names, keys, commands, metrics, row shapes, and the code of a page."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shlex
import sys
import tomllib
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rlhf_lit.__main__ import TRAINING, main
from rlhf_lit.commands import quickstart
from rlhf_lit.commands.training import Parser
from rlhf_lit.data import records
from rlhf_lit.errors import UserError

ROOT = Path(__file__).parents[2]
EXTENDING = [*sorted((ROOT / "docs").glob("add_a*.md")), ROOT / "docs" / "extending.md"]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EXPERIMENTS = sorted((ROOT / "experiments").rglob("README.md"))
CONFIGS = sorted(ROOT.glob("configs/*/*.yaml"))
ALGORITHMS = ("SFT", "RewardModel", "PPO", "RLOO", "GRPO", "DPO", "KTO")
ON_POLICY = ("PPO", "RLOO", "GRPO")
OVERLAYS = [f"--config=configs/overlays/{name}.yaml" for name in ("qlora", "wandb", "hsdp")]
ROOMS = ("configs", "docs", "experiments", "rlhf_lit", "sweeps", "tests")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```\n", "", page.read_text(), flags=re.S | re.M)


def spans(page: Path) -> list[str]:
    """What stands between backticks, on one line each."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), flags=re.S | re.M)


# --- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", [*PAGES, *EXPERIMENTS], ids=lambda page: str(page.relative_to(ROOT)))
def test_every_path_and_link_exists(page: Path) -> None:
    paths = re.findall(rf"(?<![\w./-])(?:{'|'.join(ROOMS)})/[\w./*-]*", "\n".join(spans(page)))
    assert paths or page.name == "python.md" or page in EXPERIMENTS
    missing = [path for path in paths if not list(ROOT.glob(path.rstrip("/")))]
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)) if "://" not in link]
    missing += [link for link in links if not (page.parent / link.split("#")[0]).exists()]
    assert not missing


@pages
def test_every_function_and_class_exists(page: Path) -> None:
    for span in spans(page):
        if match := re.fullmatch(r"(rlhf_lit/[\w/]+)\.py:([\w.]+)", span):
            found: Any = import_module(match[1].replace("/", "."))
            for name in match[2].split("."):
                assert hasattr(found, name), span
                found = getattr(found, name)


def parsed(argv: list[str]) -> dict[str, Any]:
    """What a command of the four resolves to."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main([*argv, "--print_config"])
    assert status == 0, err.getvalue()
    return yaml.safe_load(out.getvalue()) or {}


def keys_of(config: Any, path: str = "") -> Iterator[str]:
    """Every dotted key of a resolved configuration, as it is typed on the command line."""
    for name, value in config.items():
        key = path if name == "init_args" else f"{path}.{name}".lstrip(".")
        yield key
        if isinstance(value, dict):
            yield from keys_of(value, key)


@pytest.fixture(scope="module")
def known_keys() -> set[str]:
    """What the algorithms' configurations have, LoRA, 4-bit, vLLM, Weights & Biases and FSDP2 included."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        found: set[str] = set()
        for name in (
            *(f"{algorithm}/qwen_0.5b" for algorithm in ("sft", "ppo", "dpo")),
            "reward/ranked",
            "grpo/gsm8k",
            "dpo/kto",
            "dpo/tr_dpo",
            "dpo/simpo",
        ):
            found |= set(keys_of(parsed(["fit", f"--config=configs/{name}.yaml", *OVERLAYS])))
        world = ["--config=configs/sft/quickstart.yaml", "--data.train.world={seed: 3}"]
        found |= set(keys_of(parsed(["fit", *world])))
        vllm = "--config=configs/overlays/vllm.yaml"
        return found | set(keys_of(parsed(["fit", "--config=configs/ppo/qwen_0.5b.yaml", vllm])))


@pages
def test_every_key_exists(page: Path, known_keys: set[str]) -> None:
    for span in spans(page):
        if match := re.match(r"(?:--)?((?:model|data|trainer|checkpoint)(?:\.[a-z_]+)+)(\+?=|: |$)", span):
            key = match[1].replace(".init_args", "")
            assert key in known_keys, f"{page.name}: {key}"


# --- commands --------------------------------------------------------------------------------------------------------


def commands(text: str) -> list[str]:
    """The commands of a shell text, comments and `&&` taken apart."""
    lines = [line.split("  #")[0].strip() for line in text.splitlines()]
    return [command.strip() for line in lines for command in line.split("&&") if command.strip()]


def commands_of(page: Path) -> list[str]:
    """What a page asks to be typed, in blocks and in its text."""
    typed = [command for block in blocks(page, "sh") for command in commands(block)]
    return typed + [span for span in spans(page) if span.startswith(("python -m", "make ", "pip install"))]


def commands_in(config: Path) -> list[str]:
    """The commands of the comment at a config's head."""
    lines = [line.removeprefix("#").strip() for line in config.read_text().splitlines() if line.startswith("#")]
    return [command for command in commands("\n".join(lines)) if command.startswith("python -m rlhf_lit")]


TYPED = sorted(
    {command for page in [*PAGES, *EXPERIMENTS] if page not in EXTENDING for command in commands_of(page)}
    | {command for config in CONFIGS for command in commands_in(config)}
)


class Accepted(Exception):
    """The parser took the command; nothing more is run."""


@pytest.mark.parametrize("command", TYPED)
def test_every_command_is_accepted(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(ROOT)  # reward functions of the tests, as from the repository's root
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert all(word in targets for word in words[1:] if "=" not in word)
        return
    if words[0] == "pip":
        assert words[1] == "install"
        return
    assert words[:2] == ["python", "-m"]
    argv = words[3:]
    if words[2].startswith("experiments."):
        assert all((ROOT / word).exists() for word in argv if word.endswith((".yaml", ".jsonl")) and "{" not in word)
        monkeypatch.setattr(sys, "argv", words[2:])
        parse_arguments = ArgumentParser.parse_args

        def parse_only(parser: ArgumentParser) -> None:
            parse_arguments(parser)
            raise Accepted

        monkeypatch.setattr(ArgumentParser, "parse_args", parse_only)
        with pytest.raises(Accepted):
            import_module(words[2]).main()
        return
    assert words[2] == "rlhf_lit"
    if any("help" in word for word in argv):
        assert main(argv) == 0
        return
    if argv[0] in (*TRAINING, "memory"):
        parsed(argv)
        return
    if argv[0] == "configs":  # is run as it stands
        monkeypatch.chdir(tmp_path)
        assert main(argv) == 0
        return

    parse = Parser.parse_args

    def parse_alone(parser: Parser, *arguments: Any) -> Any:
        parse(parser, *arguments)
        raise Accepted

    monkeypatch.setattr(Parser, "parse_args", parse_alone)
    with pytest.raises(Accepted):
        main(argv)


def test_the_documents_name_commands() -> None:
    """The search above finds them: a page that it cannot read would pass for a page without any."""
    assert {"make quickstart", "make test", "pip install -e ."} <= set(TYPED)
    assert sum(command.startswith("python -m rlhf_lit fit") for command in TYPED) > 20
    assert sum(command.startswith("python -m rlhf_lit chat") for command in TYPED) == 3


def test_what_is_said_of_versions_and_places() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11"
    assert "Python 3.11 or newer" in (ROOT / "README.md").read_text()
    assert Path("runs/quickstart/scoreboard.json") == quickstart.FOLDER / "scoreboard.json"


@pytest.mark.parametrize("page", [page for page in PAGES if page not in EXTENDING], ids=lambda page: page.name)
def test_every_yaml_block_fits_the_config_it_names(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "yaml"):
        match = re.match(r"# over (\S+)\n", block)
        assert match, f"{page.name}: a block of YAML must say which config it is laid over"
        (tmp_path / "block.yaml").write_text(block)
        resolved = parsed(["fit", f"--config={match[1]}", f"--config={tmp_path / 'block.yaml'}"])
        assert resolved != parsed(["fit", f"--config={match[1]}"])


# --- rows ------------------------------------------------------------------------------------------------------------


def shape_rows() -> list[tuple[dict[str, Any], list[bool]]]:
    """The table of row shapes: an example, and which of the five kinds of data it is said to serve."""
    found = []
    for line in (ROOT / "README.md").read_text().splitlines():
        if match := re.match(r"\| `(\{\".*?\})`[^|]*" + r"\|([^|]*)" * 5 + r"\|$", line):
            found.append((json.loads(match[1]), ["✓" in cell for cell in match.groups()[1:]]))
    return found


@pytest.mark.parametrize(
    ("row", "serves"), shape_rows(), ids=lambda value: "+".join(value) if isinstance(value, dict) else ""
)
def test_row_shapes_serve_what_the_table_says(row: dict[str, Any], serves: list[bool]) -> None:
    readers = (records.demonstrations, records.preferences, records.prompts, records.judged, records.rankings)
    for reader, expected in zip(readers, serves, strict=True):
        try:
            found, _ = reader([row], records.Source("rows.jsonl"), on_bad_row="error")
            accepted = len(found) == (2 if reader is records.judged and "label" not in row else 1)
        except UserError:
            accepted = False
        assert accepted is expected, reader.__name__


def test_the_table_of_row_shapes_is_read() -> None:
    assert len(shape_rows()) == 17


# --- metrics, and the page that is run -------------------------------------------------------------------------------


RUNS = {
    "SFT": "sft",
    "RewardModel": "rewardmodel",
    "KTO": "kto",
    "DPO": "positive",
    "PPO": "matching",
    "SimPO": "simpo",
    "CISPO": "cispo",
    "REINFORCE++": "reinforce",
    "Variety": "variety",
}
TESTS = ("test_my_losses", "test_cispo", "test_reinforce", "test_my_source")


@dataclass
class Ran:
    """Runs by algorithm: the rows of their metrics.csv."""

    rows: dict[str, list[dict[str, str]]] = field(default_factory=dict)

    def take(self, name: str, folder: Path) -> None:
        with (folder / "version_0" / "metrics.csv").open(newline="") as file:
            self.rows[name] = list(csv.DictReader(file))

    def columns(self, name: str) -> set[str]:
        """Metrics that were written at least once, by the run or by one named `run/variant`."""
        rows = [row for run, rows in self.rows.items() if run.split("/")[0] == name for row in rows]
        found = {key for row in rows for key, value in row.items() if value} - {"step", "epoch"}
        return {re.sub(r"^objective/scores/.*", "objective/scores/<source>", key) for key in found}


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ran]:
    """The blocks of the pages on extending saved and their commands run; beside them what they do not run."""
    place = tmp_path_factory.mktemp("extending")
    pairs = [{"prompt": f"what is {i} plus 1?", "chosen": f"{i + 1}.", "rejected": "i cannot help."} for i in range(16)]
    questions = [{"prompt": f"what is {i} plus 1?", "answer": f"{i + 1}"} for i in range(8)]
    for name, rows in (("pairs", pairs), ("questions", questions)):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    typed = [command for page in EXTENDING for command in commands_of(page)]
    for block in (block for page in EXTENDING for kind in ("python", "yaml") for block in blocks(page, kind)):
        name = re.match(r"# (\w+\.(?:py|yaml))\n", block)
        assert name, "the first line of a block names its file"
        (place / name[1]).write_text(block)
    result = Ran()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setenv("HOME", str(place))  # the tokenisation cache
        patch.syspath_prepend(place)
        for test in TESTS:
            import_module(test)
        for command in typed:
            assert main(shlex.split(command)[3:]) == 0, command
        for algorithm, data in (
            ("SFT", "SFTDataModule"),
            ("RewardModel", "PreferenceDataModule"),
            ("KTO", "UnpairedDataModule"),
        ):
            status = main(
                [
                    "fit", f"--model={algorithm}", "--model.base.name=playground", "--model.base.fresh=true",
                    f"--data={data}", "--data.train.path=pairs.jsonl", "--data.validation.path=pairs.jsonl",
                    "--data.batch_size=8", "--trainer.max_epochs=1", "--trainer.accelerator=cpu",
                    *(["--model.loss.beta=0.1"] if algorithm == "KTO" else []),
                ]
            )  # fmt: skip
            assert status == 0
        for name, run in RUNS.items():
            result.take(name, place / "runs" / run)
        # Some metrics are there where their option is.
        options = [
            "--model.kl.placement=loss", "--model.policy_loss.entropy_coefficient=0.01",
            "--model.policy_loss.importance_cap=2", "--model.reward=RewardSum",
            "--model.reward.sources={brief: {class_path: LengthReward, init_args: {target: 4}}}",
            "--model.reward.weights={brief: 1.0}",
        ]  # fmt: skip
        again = next(shlex.split(c)[3:] for c in typed if "matching" in c)
        variants = {
            "PPO/with options": [*again, *options, "--model.critic.learning_rate=1e-3"],
            **{name: [*again, f"--model={name}", "--data.samples_per_prompt=2"] for name in ("RLOO", "GRPO")},
        }
        variants |= {f"{name}/with options": [*variants[name], *options] for name in ("RLOO", "GRPO")}
        positive = next(shlex.split(c)[3:] for c in typed if "positive" in c)
        variants["DPO/with options"] = [*positive, "--model.sft_coefficient=0.5"]
        for run, argv in variants.items():
            name = run.replace(" ", "_")
            assert main([*argv, f"--name={name}"]) == 0
            result.take(run, place / "runs" / name)
    yield result
    for module in ("my_losses", "my_rewards", "my_source", "my_kl", "simpo", "openings", "cispo", "reinforce", *TESTS):
        sys.modules.pop(module, None)
    torch.set_grad_enabled(True)


def table_of_metrics() -> dict[str, set[str]]:
    """Algorithm → the metrics that docs/metrics.md says it logs; an empty first cell goes on with the name above."""
    found: dict[str, set[str]] = {algorithm: set() for algorithm in ALGORITHMS}
    metric = ""
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")[1:-1]]
        if len(cells) != 6 or not (match := re.fullmatch(r"`([\w/<>]+)`|", cells[0])):
            continue
        metric = match[1] or metric
        assert all(cells[1:]), f"{metric}: a cell is empty"
        if "where the device's peak is known" in cells[5] or "where the model has experts" in cells[5]:  # no such run
            continue
        for algorithm in {"all": ALGORITHMS, "on-policy": ON_POLICY}.get(cells[1], cells[1].split(", ")):
            assert metric not in found[algorithm], f"{metric} is defined twice for {algorithm}"
            found[algorithm].add(metric)
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_metric_is_defined_and_every_definition_is_logged(algorithm: str, ran: Ran) -> None:
    defined, logged = table_of_metrics()[algorithm], ran.columns(algorithm)
    assert logged - defined == set(), "logged, but not in docs/metrics.md"
    assert defined - logged == set(), "in docs/metrics.md, but not logged"


def first(ran: Ran, name: str, column: str) -> float:
    return next(float(row[column]) for row in ran.rows[name] if row[column])


def test_the_loss_of_the_page_starts_where_it_says(ran: Ran) -> None:
    assert first(ran, "DPO", "train/loss") == pytest.approx(math.log(2), abs=1e-6)


def test_the_test_of_the_page_passes_and_can_fail(ran: Ran) -> None:
    page, loss = sys.modules["test_my_losses"], sys.modules["my_losses"].DPOPositiveLoss
    page.test_by_hand()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "logratios", lambda self, pairs: (pairs.rejected_logratio, pairs.chosen_logratio))
        with pytest.raises(AssertionError):
            page.test_by_hand()


def test_the_policy_loss_of_the_page_clips_and_its_test_can_fail(ran: Ran) -> None:
    assert [row for row in ran.rows["CISPO"] if row["policy/clipfrac"]]
    page, loss = sys.modules["test_cispo"], sys.modules["cispo"]
    page.test_gradient_by_hand()
    with pytest.MonkeyPatch.context() as patch:
        attached = sys.modules["rlhf_lit.losses.policy_gradient"].token_ratio
        patch.setattr(loss, "token_ratio", lambda *logprobs: Attached(attached(*logprobs)))
        with pytest.raises(AssertionError):
            page.test_gradient_by_hand()


class Attached(torch.Tensor):
    """A ratio whose gradient is not stopped."""

    def detach(self) -> torch.Tensor:
        return self.as_subclass(torch.Tensor)


def test_the_estimator_of_the_page_is_at_work_and_its_test_can_fail(ran: Ran) -> None:
    assert "rollout/zero_advantages" not in ran.columns("REINFORCE++"), "which RLOO's own estimator logs"
    page, file = sys.modules["test_reinforce"], sys.modules["reinforce"]
    page.test_by_hand()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(file.RolloutRewards, "whitened", lambda self, advantages: advantages)
        with pytest.raises(AssertionError):
            page.test_by_hand()


def test_the_reward_class_of_the_page_is_logged_beside_the_function(ran: Ran) -> None:
    for row in ran.rows["Variety"]:
        if row["objective/scores"]:
            variety, matches = (float(row[f"objective/scores/{name}"]) for name in ("variety", "matches"))
            assert 0 < variety <= 2
            assert float(row["objective/scores"]) == pytest.approx(0.5 * variety + matches, abs=1e-5)
    sys.modules["test_my_source"].test_by_hand()


@pytest.mark.parametrize(("page", "file", "lines"), [("policy_loss", "cispo", 15), ("an_advantage", "reinforce", 20)])
def test_a_member_of_a_family_is_a_short_file(page: str, file: str, lines: int) -> None:
    (found,) = (
        block
        for path in EXTENDING
        if page in path.name
        for block in blocks(path, "python")
        if block.startswith(f"# {file}.py")
    )
    assert len([line for line in found.splitlines()[1:] if line.strip()]) <= lines


def test_the_reward_and_the_controller_of_the_page_are_at_work(ran: Ran) -> None:
    coefficients = [float(row["objective/kl_coef"]) for row in ran.rows["PPO"] if row["objective/kl_coef"]]
    assert coefficients == pytest.approx([0.1, 0.05]), "KL is 0 in the first rollout, so β is halved once"
    assert first(ran, "PPO", "objective/scores") < 0, "an untrained model does not find the answers"


def test_the_algorithm_of_the_page_trains(ran: Ran) -> None:
    losses = [float(row["train/loss"]) for row in ran.rows["SimPO"] if row["train/loss"]]
    assert len(losses) == 2
    # −log σ(−γ) = 0.974 where both sides are alike, as they nearly are for random weights.
    assert losses[0] == pytest.approx(math.log(1 + math.exp(0.5)), abs=0.5)
    assert losses[1] < losses[0]
    assert {"train/accuracy", "val/loss", "val/accuracy"} <= ran.columns("SimPO")
