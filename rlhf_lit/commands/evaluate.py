"""The command ``evaluate``."""

from __future__ import annotations

import os
import sys

import rlhf_lit.algorithms  # noqa: F401 - so that judges can be named by their class alone
from rlhf_lit.commands.training import Parser, quiet_libraries
from rlhf_lit.errors import tell
from rlhf_lit.evaluation import report
from rlhf_lit.evaluation.evaluate import evaluate
from rlhf_lit.files import short_path


def main(argv: list[str]) -> int:
    """Run ``evaluate``."""
    parser = Parser(
        prog="rlhf-lit evaluate",
        allow_abbrev=False,
        usage="rlhf-lit evaluate MODEL [--config FILE] [--option=value ...]",
        description="What a model is worth: win rate, best-of-n, KL, accuracy on pairs (docs/evaluation.md).",
    )
    parser.add_argument("--config", action="config", help="YAML file of options; what stands after it goes over it.")
    parser.add_function_arguments(evaluate)
    if argv and not argv[0].startswith("-"):
        # Named first and said last: over what a config says.
        argv = [*argv[1:], f"--model={argv[0]}"]
    quiet_libraries()
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # a judge in the user's folder
    arguments = parser.instantiate_classes(parser.parse_args(argv)).as_dict()
    arguments.pop("config")
    found, folder = evaluate(**arguments)
    report.show(found, wide=sys.stdout.isatty())
    tell(f"{short_path(folder / 'evaluation.json')}")
    return 0
