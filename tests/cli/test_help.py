"""`--help` of every command: what is typed, and what a person needs first."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import yaml

from rlhf_lit.__main__ import COMMANDS, TRAINING

TRAINED = "--config NAME_OR_FILE [--config OVERLAY ...] [--key=value ...]"
USAGE = {
    **dict.fromkeys((*TRAINING, "memory"), TRAINED),
    "configs": "[copy NAME [TO]]",
    "sweep": "FILE [--option=value ...]",
    "evaluate": "MODEL [--config FILE] [--option=value ...]",
    "report": "RUN_OR_SWEEP [...] --out DIR [--evaluate] [--option=value ...]",
    "chat": "MODEL [--option=value ...]",
    "export": "RUN [--option=value ...]",
    "cache": "[--option=value ...]",
    "playground": "--model=MODEL --to=TO [--option=value ...]",
    "score": "MODEL FILE [--option=value ...]",
    "quickstart": "[--option=value ...]",
}
"""What is typed after `rlhf-lit COMMAND`."""


def groups(text: str) -> list[str]:
    """Titles of the groups of options."""
    return [line.removesuffix(":") for line in re.findall(r"^\S.*:$", text, re.M)]


@pytest.mark.parametrize("name", COMMANDS)
def test_what_is_typed(command: Callable, name: str) -> None:
    answer = command(name, "--help")
    assert (answer.status, answer.err) == (0, "")
    usage, blank, about = answer.out.splitlines()[:3]
    assert usage == f"usage: rlhf-lit {name} {USAGE[name]}"
    assert (blank, about[0].isupper()) == ("", True)
    assert "__main__" not in answer.out
    opening = groups(answer.out)[0]
    assert opening == ("positional arguments" if name in ("sweep", "export", "report") else "options")


@pytest.mark.parametrize("name", [*TRAINING, "memory"])
def test_a_training_command_says_first_what_matters_first(
    command: Callable, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")  # no word is broken
    text = command(name, "--help").out
    order = ["options", "the algorithm", "the rows", "the state to start from", "how often", "to look", "Lightning's"]
    found = groups(text)
    assert len(found) == len(order)
    assert all(title.startswith(start) for title, start in zip(found, order, strict=True)), found
    words = " ".join(text.split())
    assert f"`rlhf-lit {name} --model DPO --help`" in words
    assert f"`rlhf-lit {name} --data PreferenceDataModule --help`" in words
    assert "`rlhf-lit configs` lists" in words
    options = re.findall(r"^  (?:-\w \w+, )?--([\w.]+)", text, re.M)
    assert options.index("config") < options.index("name") < options.index("model") < options.index("data")
    first = [option for option in options if option.startswith("trainer.")][:6]
    assert first[:4] == ["trainer.max_epochs", "trainer.max_steps", "trainer.accelerator.help", "trainer.accelerator"]
    assert not {"trainer.gradient_clip_val", "trainer.accumulate_grad_batches", "trainer.default_root_dir"} & {*options}


def test_the_options_of_an_algorithm_and_of_its_rows(command: Callable) -> None:
    answer = command("fit", "--model", "DPO", "--data=PreferenceDataModule", "--help")
    assert (answer.status, answer.err) == (0, "")
    model, rows = answer.out.split("usage: ")[1:]
    assert model.startswith("rlhf-lit fit --model.base.name=NAME --model.loss=LOSS [--option=value ...]\n")
    assert "--model.sft_coefficient SFT_COEFFICIENT" in model
    assert rows.startswith("rlhf-lit fit [--option=value ...]\n")
    assert "--data.micro_batch_tokens" in rows
    assert "--trainer.max_steps" not in answer.out
    alone = command("validate", "-h", "--model=PPO").out
    assert alone.startswith("usage: rlhf-lit validate --model.base.name=NAME")
    assert "--model.critic.init" in alone
    loss = command("fit", "--model.help=DPO", "--model.loss.help=DPOLoss").out
    assert loss.startswith("usage: rlhf-lit fit --model.loss.beta=BETA [--option=value ...]\n")


def test_what_help_leaves_out_is_still_on_record(command: Callable) -> None:
    answer = command("fit", "--config=sft/quickstart", "--print_config")
    assert {"gradient_clip_val", "default_root_dir", "accumulate_grad_batches"} <= {
        *yaml.safe_load(answer.out)["trainer"]
    }


def test_an_algorithm_that_there_is_not(command: Callable) -> None:
    answer = command("fit", "--model", "DPOO", "--help")
    assert (answer.status, answer.out, answer.err) == (2, "", "error: there is no class named 'DPOO'\n")
