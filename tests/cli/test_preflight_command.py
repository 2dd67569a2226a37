"""The checks before the first step, through the real command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

BOS_EACH_TURN = "{% for m in messages %}{{ bos_token + bos_token + m['content'] }}{% endfor %}"


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert found
    return found


def give_template(model: Path, template: str) -> None:
    file = model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": template}))


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "ppo"])
def test_a_run_is_the_same_with_and_without_it(run: Callable, place: Path, name: str) -> None:
    """To the bit, its random numbers (dropout, samples) included; and it is checked unless told otherwise."""
    options = ["--trainer.max_epochs=1", "--data.train.limit=16"]
    if name in ("sft", "reward"):
        options += ["--model.base.lora.rank=2", "--model.base.lora.dropout=0.3"]
    with_it = run("fit", f"--config={name}.yaml", "--name=with", *options)
    without = run("fit", f"--config={name}.yaml", "--name=without", *options, "--preflight=false")
    assert (with_it.status, without.status) == (0, 0), with_it.err + without.err
    assert " checks passed" in with_it.out
    assert "preflight" not in without.out
    ours, theirs = weights(place / "runs/with/version_0"), weights(place / "runs/without/version_0")
    assert ours.keys() == theirs.keys()
    assert all(ours[key].equal(theirs[key]) for key in ours)


def test_a_failed_check_is_one_line_and_no_checkpoint(run: Callable, place: Path) -> None:
    give_template(place / "tiny", BOS_EACH_TURN)
    answer = run("fit", "--config=sft.yaml")
    assert answer.status == 2
    line = answer.err.splitlines()[-1]
    assert line.startswith("error: preflight: one BOS: a second one in 32 of 32 rows, first in row ")
    assert line.endswith("(data.template); to go on without it, preflight: {skip: [one BOS]}")
    assert "Traceback" not in answer.err
    assert any(said.startswith("failed  one BOS") for said in answer.out.splitlines())
    assert not list(place.rglob("*.ckpt"))
    assert not list(place.rglob("metrics.csv"))
    Path("go_on.yaml").write_text("preflight: false\n")
    assert run("fit", "--config=sft.yaml", "--config=go_on.yaml", "--trainer.max_steps=1").status == 0


def test_single_checks_are_left_out_by_name(run: Callable, place: Path) -> None:
    """What was left out is said; the others are made, and the run's record says so too."""
    give_template(place / "tiny", BOS_EACH_TURN)
    answer = run("fit", "--config=sft.yaml", "--trainer.max_steps=1", "--preflight={skip: [one BOS, padding]}")
    assert answer.status == 0, answer.err
    said = answer.out.splitlines()
    assert [line for line in said if line.startswith("left out")] == [
        "left out  one BOS               by preflight.skip",
        "left out  padding               by preflight.skip",
    ]
    assert any(line.startswith("preflight: 6 checks passed, 2 left out in ") for line in said)
    record = place / "runs/sft/version_0/config.yaml"
    assert yaml.safe_load(record.read_text())["preflight"] == {"skip": ["one BOS", "padding"]}
    again = run("fit", f"--config={record}", "--preflight.skip=[one BOS]")
    assert again.status == 0, again.err
    assert "preflight: 7 checks passed, 1 left out in " in again.out
    assert run("fit", f"--config={record}", "--preflight=true").status == 2, "the record's are no longer left out"


@pytest.mark.parametrize(
    ("option", "line"),
    [
        ("{skip: [one bos]}", "preflight.skip: there is no check 'one bos'; did you mean 'one BOS'?"),
        ("{skip: [everything]}", "preflight.skip: there is no check 'everything'; there are trainable parameters, "),
        ("{skp: [padding]}", "preflight.skp: unknown key"),
        ("[padding]", "preflight: expected bool or "),
    ],
)
def test_a_check_of_an_unknown_name_is_one_line(run: Callable, place: Path, option: str, line: str) -> None:
    answer = run("fit", "--config=sft.yaml", f"--preflight={option}")
    assert answer.status == 2
    assert answer.err.splitlines()[-1].startswith(f"error: {line}")
    assert not list(place.rglob("config.yaml"))


def test_a_run_that_goes_on_skips_what_holds_at_step_0(run: Callable, place: Path) -> None:
    assert run("fit", "--config=dpo.yaml", "--trainer.max_steps=2").status == 0
    answer = run("fit", "--config=dpo.yaml", "--trainer.max_epochs=2", "--ckpt_path=last")
    assert answer.status == 0, answer.err
    skipped = [said for said in answer.out.splitlines() if said.startswith("skipped")]
    assert [said.split("  ")[1].strip() for said in skipped] == ["KL = 0", "loss at step 0"]
    assert all(said.endswith("this run goes on from step 2") for said in skipped)


def test_the_other_commands_take_a_runs_config_and_check_nothing(run: Callable, place: Path) -> None:
    assert run("fit", "--config=sft.yaml", "--trainer.max_steps=1").status == 0
    record = place / "runs/sft/version_0/config.yaml"
    assert yaml.safe_load(record.read_text())["preflight"] is True
    answer = run("validate", f"--config={record}")
    assert answer.status == 0, answer.err
    assert "preflight" not in answer.out
    assert "preflight" not in run("validate", f"--config={record}", "--preflight=false").err
