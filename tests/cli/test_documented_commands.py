"""What the documents tell one to type is typed: after a small quickstart, with small stand-ins for the hub's names."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import chat_server
import hub_cache
import hub_stand_in
import pytest
import torch
import yaml
from documented import FIRST, LATER, NOT_RUN, ROOT, TYPED, words_of
from run_folders import metrics

from rlhf_lit.__main__ import TRAINING, main
from rlhf_lit.runs import versions
from rlhf_lit.sweep.records import read_arms

# --- what stands for the documents' placeholders, and what is made on the way ----------------------------------------

# A small built-in world.
SIZES = ("demonstrations=1000", "prompts=200", "held_out=80")
WORLD = ", ".join(size.replace("=", ": ") for size in SIZES)
PAIRS = "runs/quickstart/pairs_held_out.jsonl"
PLACEHOLDERS = {
    "MODEL": "runs/quickstart/dpo",
    "BASE": "runs/quickstart/sft",
    "SFT_RUN": "runs/quickstart/sft",
    "RUN": "runs/quickstart/reward",
    "REWARD_RUN": "runs/quickstart/reward",
    "PAIRS": PAIRS,
    "ANSWERS": "verdicts.jsonl",
    "FILE": PAIRS,
    "NAME": chat_server.MODEL,
}
# Where a command means a FILE or a RUN of another kind: by what else is in it.
OTHERWISE = {
    "reward/ranked.yaml": {"FILE": "runs/quickstart/ranked.jsonl"},
    "prompt: question": {"FILE": "questions.jsonl"},
    "export RUN": {"RUN": "runs/dpo"},
}
FIT = "python -m rlhf_lit fit --config configs/"
# What a command takes up → the documented command that makes it.
MADE_BY = {
    "runs/qwen-sft": f"{FIT}sft/qwen_0.5b.yaml",
    "runs/qwen-reward": f"{FIT}reward/qwen_0.5b.yaml",
    "runs/qwen-dpo": f"{FIT}dpo/qwen_0.5b.yaml --model.loss.beta=0.3",
    "runs/qwen7-sft": f"{FIT}sft/qwen_7b.yaml",
    "runs/qwen7-reward": f"{FIT}reward/qwen_7b.yaml",
    "runs/llama-sft": f"{FIT}sft/llama_8b.yaml",
    "runs/llama-reward": f"{FIT}reward/llama_8b.yaml",
    "runs/llama-ppo": f"{FIT}ppo/llama_8b.yaml",
    "runs/quickstart/ranked.jsonl": (
        "python -m rlhf_lit playground --model runs/quickstart/sft --ranked true --to runs/quickstart/ranked.jsonl"
    ),
    "runs/sweeps/dpo_beta": "python -m rlhf_lit sweep sweeps/dpo_beta.yaml --jobs 2",
    "runs/sweeps/ppo_kl": "python -m rlhf_lit sweep sweeps/ppo_kl.yaml --jobs 2",
}
# Runs and models that the pages speak of as the reader's own → what is copied.
SUPPOSED = {
    "runs/dpo": "own/qlora",
    "runs/dpo/version_3": "runs/quickstart/dpo/version_0",
    "runs/full": "runs/quickstart/sft",
    "runs/mine": "runs/quickstart/dpo",
    "models/llama": "runs/quickstart/sft/version_0/hf",
}


@dataclass
class Place:
    """A working folder in which the quickstart has run, and what has been typed there since."""

    folder: Path
    typed: set[str] = field(default_factory=set)

    def type(self, command: str, server: str = "") -> None:
        """Run a command, made short, after those that make what it takes up; it must end well, and keep its promise.

        Args:
            command: of the documents.
            server: the address that stands for the one of a server in it.
        """
        words = [re.sub(r"https?://[\w.:]+/v1", server, meant(word, command)) for word in words_of(command) or ()]
        words += shorter(words)
        self.provide(command, words)
        words = [reference() if word == "28806d" else word for word in words]
        status, out, err = called(words)
        assert status == 0, f"{' '.join(words)}\n{err}"
        self.typed.add(command)
        keep_promise(words, out)

    def type_once(self, command: str) -> None:
        """Run it, unless one of the others has needed it already."""
        if command not in self.typed:
            self.type(command)

    def provide(self, command: str, words: list[str]) -> None:
        """Make the runs that a command takes up, where they are not there yet."""
        text = " ".join([*words, *(path.read_text() for path in configs_of(words))])
        wanted = re.findall(r"(?<![\w./-])(?:runs|models)/[\w./-]+", text)
        if "--ckpt_path=last" in words:
            wanted.append(f"runs/{config_of(words)['name']}")
        for name in dict.fromkeys(wanted):
            maker = MADE_BY.get(name)
            if maker not in (None, command):
                self.type_once(maker)
            if name in SUPPOSED and not Path(name).exists():
                shutil.copytree(SUPPOSED[name], name)


def reference() -> str:
    """The first digits of a reference that is cached."""
    words = ["fit", "--config=configs/dpo/quickstart.yaml", "--model.reference.precompute=true", "--name=reference"]
    status, _, err = called([*words, *shorter(words)])
    assert status == 0, err
    return next(Path(".cache/rlhf_lit/reference").iterdir()).name[:6]


def called(words: list[str]) -> tuple[int, str, str]:
    """The command line in this process. → its status, and what it wrote to stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        status = main(words)
    torch.set_grad_enabled(True)
    return status, out.getvalue(), err.getvalue()


def meant(word: str, command: str) -> str:
    """A word of a command with names for its placeholders."""
    names = dict(PLACEHOLDERS)
    for part, others in OTHERWISE.items():
        names |= others if part in command else {}
    return re.sub(r"(?<![A-Z_])[A-Z_]{3,}(?![A-Z_])", lambda match: names.get(match[0], match[0]), word)


def configs_of(words: list[str]) -> list[Path]:
    """The configs and sweeps of the working folder that a command names, by their short names too."""
    rooms = [Path("configs"), Path("sweeps")]
    named = [word.removeprefix("--config=") for word in words]
    places = [Path(name) for name in named] + [room / f"{name}.yaml" for name in named for room in rooms]
    return [path for path in places if path.suffix == ".yaml" and path.is_file()]


def config_of(words: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(configs_of(words)[0].read_text())
    return found


def shorter(words: list[str]) -> list[str]:
    """Options that leave a command what it is, and its work small."""
    verb = words[0]
    if any("help" in word for word in words):
        return []
    if verb in TRAINING:
        return shorter_run(words)
    if verb == "memory":
        return [] if configs_of(words) else ["--config=configs/sft/quickstart.yaml"]  # the name alone
    if verb == "evaluate" and any(word.startswith("--pairs") for word in words):
        return ["--pairs.limit=8"]
    if verb == "evaluate" or "--evaluate" in words:
        prompts = any(word.startswith("--prompts") for word in words) or bool(configs_of(words))
        return [*(["--prompts.limit=4"] if prompts else []), "--sampling.max_new_tokens=4"]
    if verb == "playground":
        return [f"--world.{size}" for size in SIZES]
    if verb == "quickstart":
        return ["--overlays", "few.yaml", *(f"--world.{size}" for size in SIZES)]
    if verb == "sweep":  # the short name's in a folder of its own, beside that of the same file's path
        return ["--count=2", *([] if "/" in words[1] else ["--to=runs/sweeps/by_name"])]
    return []


def shorter_run(words: list[str]) -> list[str]:
    """Few rows, and one step (two where a run goes on)."""
    config = config_of(words)
    data, rows = config["data"]["init_args"], 4
    options = ["--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=1"]
    if not any(word.startswith("--trainer.max_steps") for word in words):
        options += ["--data.train.limit=16", f"--trainer.max_steps={2 if '--ckpt_path=last' in words else 1}"]
    if config["data"]["class_path"] == "RolloutDataModule":
        options.append(f"--data.rollout_size={rows}")
        if "samples_per_prompt" in data:
            options.append("--data.samples_per_prompt=2")
            rows *= 2
    options.append(f"--data.batch_size={rows}")
    options += ["--data.validation.limit=4"] if "validation" in data else []
    options += ["--data.validation_fraction=0.25"] if "validation_fraction" in data else []
    if config["model"]["class_path"] != "RewardModel":
        options.append("--model.sampling.max_new_tokens=4")
    return options


# --- what commands promise -------------------------------------------------------------------------------------------


def keep_promise(words: list[str], out: str) -> None:
    """What a command was typed for is there."""
    verb, options = words[0], dict(re.findall(r"--(\w+)[ =](?!--)(\S+)", " ".join(words)))
    if any("help" in word for word in words):
        assert "usage:" in out.lower() or "Help for" in out
    elif verb in TRAINING:
        keep_promise_of_a_run(verb, words)
    elif verb == "memory":
        assert re.search(r"^largest data.micro_batch_tokens within [\d.]+ [MG]iB: \d+", out, re.M)
    elif verb == "chat":
        assert out.strip(), "an answer"
    elif verb == "evaluate":
        folder = Path(options["to"]) if "to" in options else next(versions(Path("runs/evaluate")))
        assert json.loads((folder / "evaluation.json").read_text())
        assert (folder / "samples.jsonl").is_file() != ("--pairs.limit=8" in words)
    elif verb == "report":
        assert "<html" in (Path(options["out"]) / "report.html").read_text()
    elif verb == "export":
        folder = Path(options["to"]) if "to" in options else next(versions(Path(words[1]))) / "export"
        kind = "config.json" if "--merge" in words or "adapter" not in words else "adapter_config.json"
        assert {kind, "README.md", "tokenizer.json"} <= {file.name for file in folder.iterdir()}
    elif verb == "score":
        text = out if options.get("to") == "-" else Path(out.split()[-1]).read_text()
        assert all("score" in line for line in text.splitlines())
        assert text
    elif verb == "playground":
        assert all(json.loads(line) for line in Path(options["to"]).read_text().splitlines())
    elif verb == "sweep" and "--dry-run" in words:
        assert sum(" -m rlhf_lit fit " in line for line in out.splitlines()) == 2
    elif verb == "sweep":
        folder = Path(options.get("to", f"runs/sweeps/{Path(words[1]).stem}"))
        assert [arm.status for arm in read_arms(folder)] == ["finished"] * 2
    elif verb == "quickstart":
        assert json.loads(Path("runs/quickstart/scoreboard.json").read_text())["prompts"] == 80
    elif words[:2] == ["configs", "copy"]:
        copied = Path(f"{words[2]}.yaml")
        assert yaml.safe_load(copied.read_text())["name"]
        copied.unlink()  # it would come before the shipped one
    else:
        assert verb in ("cache", "configs")
        assert out


def keep_promise_of_a_run(verb: str, words: list[str]) -> None:
    run = next(versions(Path("runs") / config_of(words)["name"]))
    if verb == "fit":
        (steps,) = (int(word.split("=")[1]) for word in words if word.startswith("--trainer.max_steps="))
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == steps
        assert {"config.json", "adapter_config.json"} & {file.name for file in (run / "hf").iterdir()}
    elif verb == "predict":
        assert (run / "predictions.jsonl").read_text()
    else:
        assert metrics(run)[-1]["val/loss"]


# --- the place -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """As after ``make quickstart`` in a checkout, but for the scoreboard and the length of it."""
    folder = tmp_path_factory.mktemp("documented")
    for room in ("configs", "sweeps"):
        shutil.copytree(ROOT / room, folder / room)
    for config in folder.glob("configs/*/quickstart.yaml"):
        small = config.read_text().replace("path: playground", f"path: playground, world: {{{WORLD}}}")
        config.write_text(small)
    hub_cache.build(folder / "hub")
    with at_work(folder):
        few = {"trainer": {"max_steps": 32, "limit_val_batches": 1, "enable_progress_bar": False}}
        Path("few.yaml").write_text(yaml.safe_dump(few))
        for words in quickstart():
            status, _, err = called(words)
            assert status == 0, err
        pairs = [json.loads(line) for line in Path(PAIRS).read_text().splitlines()]
        for name, rows in own_rows(pairs).items():
            Path(name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        shutil.copytree("runs/quickstart", "pristine")
    return Place(folder)


def quickstart() -> Iterator[list[str]]:
    """Its stages, each no longer than the next needs it; and a run with an adapter on 4 bits."""

    def fit(algorithm: str, steps: int, *more: str) -> list[str]:
        options = [] if algorithm == "sft" else ["--data.validation.limit=8"]
        return [
            "fit", f"--config=configs/{algorithm}/quickstart.yaml", *more, *options, f"--trainer.max_steps={steps}",
            "--trainer.enable_progress_bar=false", "--trainer.limit_val_batches=1", "--preflight=false",
        ]  # fmt: skip

    yield fit("sft", 32)
    for split, file in (("train", "pairs"), ("held_out", "pairs_held_out")):
        words = ["playground", f"--to=runs/quickstart/{file}.jsonl", f"--split={split}"]
        yield [*words, "--model=runs/quickstart/sft", *(f"--world.{size}" for size in SIZES)]
    yield fit("reward", 4)
    yield fit("ppo", 1)
    yield fit("dpo", 1)
    yield [*fit("dpo", 1, "--config=configs/overlays/qlora.yaml"), "--runs=own", "--name=qlora"]


def own_rows(pairs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Files of the kinds that the pages speak of as the reader's own."""
    sides = [(row["prompt"], row[side], side == "chosen") for row in pairs for side in ("chosen", "rejected")]
    return {
        "answers.jsonl": [{"prompt": row["prompt"], "response": row["chosen"]} for row in pairs],
        "verdicts.jsonl": [{"prompt": prompt, "completion": text, "label": label} for prompt, text, label in sides],
        "questions.jsonl": [{"question": row["prompt"], "completion": row["chosen"]} for row in pairs],
    }


def bring(real: Path) -> None:
    """The files that the configs on small real data name, in the places that they name."""
    if Path("data").exists():
        return
    shutil.copytree(real / "stories260k" / "hf", "data/stories260k")
    shutil.copy(real / "hh_harmless_test" / "test.jsonl.gz", "data/hh_harmless.jsonl.gz")
    shutil.copy(real / "rasbt_llm_book" / "instruction-data.json", "data")
    stories = (real / "tinystories_head" / "tinystories.txt").read_text().split("<|endoftext|>")
    openings = [" ".join(story.split()[:6]) for story in stories[:32] if story.split()]
    for name in ("openings", "openings_held_out"):
        Path(f"data/{name}.txt").write_text("".join(f"{opening}\n" for opening in openings))


@contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """This process in the folder, with its own caches."""
    with pytest.MonkeyPatch.context() as patch, hub_cache.serving(folder / "hub"):
        patch.chdir(folder)
        patch.setenv("HOME", str(folder))
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
        patch.syspath_prepend(ROOT)  # rewards of the experiments, as from the repository's root
        patch.setattr("sys.stdin", io.StringIO("what is 1 plus 2?\n/quit\n"))
        yield


@pytest.fixture
def here(place: Place) -> Iterator[Place]:
    """The place as the quickstart left it, whatever other commands have written under its names."""
    with at_work(place.folder):
        yield place
        shutil.rmtree("runs/quickstart")
        shutil.copytree("pristine", "runs/quickstart")


# --- the commands ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", FIRST, ids=str)
def test_a_command_of_a_page_does_what_it_says(here: Place, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "--push_to_hub" in command:
        with hub_stand_in.reached(monkeypatch) as hub:
            here.type(command)
        assert [one["name"] for one in hub.created] == ["my-model"]
        assert {"config.json", "README.md"} <= set(hub.files)
    elif "base_url=" in command:
        monkeypatch.setenv("OPENAI_API_KEY", chat_server.KEY)
        with chat_server.serving(lambda body: "better is [[A]]") as server:
            here.type(command, server.base_url)
        assert server.asked
    else:
        here.type_once(command)


@pytest.mark.soak
@pytest.mark.parametrize("command", LATER, ids=str)
def test_a_command_of_a_config_does_what_it_says(here: Place, command: str, request: pytest.FixtureRequest) -> None:
    if any("{path: data/" in path.read_text() for path in configs_of(words_of(command) or [])):
        bring(request.getfixturevalue("real_data"))
    here.type_once(command)


def test_what_is_not_run_is_known() -> None:
    """A command that is in no list would go untried."""
    ours = {command for command in TYPED if words_of(command) is not None}
    assert {*FIRST} | {*LATER} | {*NOT_RUN} == ours
    assert all("vllm" in command for command in NOT_RUN)
    assert len(NOT_RUN) == 2
