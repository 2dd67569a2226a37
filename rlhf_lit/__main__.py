"""The front door: answers ``--help`` before anything heavy is imported, and turns errors into one line.

Exit status: 0 done, 1 a bug (with its traceback), 2 something the user can mend (one line), 75 another rank of the
run was lost, 130 interrupted, 141 nobody reads what it prints (`| head`), 143 terminated (by SIGTERM or SIGUSR1; `fit`
has saved its last step); `sweep` ends with 1 where an arm failed.
"""

from __future__ import annotations

import sys
from typing import Any

COMMANDS: dict[str, tuple[str, str]] = {
    "fit": ("train a model: SFT, RewardModel, PPO, RLOO, GRPO, DPO or KTO", "rlhf_lit.commands.training:main"),
    "validate": ("losses and accuracies on the validation rows", "rlhf_lit.commands.training:main"),
    "test": ("the same on the test rows", "rlhf_lit.commands.training:main"),
    "predict": ("completions, or a reward model's scores, to predictions.jsonl", "rlhf_lit.commands.training:main"),
    "configs": ("the configs and sweeps that are shipped, and a copy of one to edit", "rlhf_lit.commands.configs:main"),
    "sweep": ("the arms of a W&B sweep file, without W&B", "rlhf_lit.commands.sweep:main"),
    "memory": ("what a configuration needs, and the largest micro-batch that fits", "rlhf_lit.commands.memory:main"),
    "evaluate": ("win rate, best-of-n, KL and accuracy on pairs", "rlhf_lit.commands.evaluate:main"),
    "report": ("runs and sweeps compared on one page", "rlhf_lit.commands.report:main"),
    "chat": ("talk to a model in the terminal", "rlhf_lit.commands.chat:main"),
    "export": (
        "write a trained model for plain transformers or peft, merged or as an adapter",
        "rlhf_lit.commands.export:main",
    ),
    "cache": ("what is cached (tokens, log-probs of references), and clearing it", "rlhf_lit.commands.cache:main"),
    "playground": (
        "make pairs or ranked lists in the built-in world from a model's samples",
        "rlhf_lit.commands.playground:main",
    ),
    "score": ("a reward model's scores of every row of a file", "rlhf_lit.commands.score:main"),
    "quickstart": (
        "SFT, reward model, PPO and DPO in the built-in world, with a scoreboard",
        "rlhf_lit.commands.quickstart:main",
    ),
}
"""name → (one line, where its ``main(argv) -> int`` lives)."""

TRAINING = ("fit", "validate", "test", "predict")


def usage() -> str:
    """The text of bare ``--help``."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {line}" for name, (line, _) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rlhf-lit COMMAND [options]          (or: python -m rlhf_lit COMMAND [options])",
            "",
            *lines,
            "",
            "  rlhf-lit fit --config NAME_OR_FILE [--config OVERLAY ...] [--key=value ...]",
            "  rlhf-lit COMMAND --help shows the options of one command; --print_config a whole configuration",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status; ``argv`` without the program's name (default: ``sys.argv[1:]``)."""
    if argv is None:
        sys.excepthook = _traceback
    arguments = sys.argv[1:] if argv is None else list(argv)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    name = arguments[0]
    if name not in COMMANDS:
        return _complain(_unknown(name))
    _quiet()
    from rlhf_lit.errors import UserError

    try:
        status = _load(COMMANDS[name][1])(arguments if name in TRAINING else arguments[1:])
        sys.stdout.flush()
        return status
    except BrokenPipeError:
        if not _unread():
            raise
        return 128 + 13
    except UserError as error:
        return _complain(" ".join(str(error).split()))
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as stop:
        # Lightning leaves with status 1 after an interrupt; argparse leaves with 0 (help) or 2 (its line is printed).
        if isinstance(stop.__context__, KeyboardInterrupt):
            return _interrupted()
        if isinstance(stop.code, str):
            return _complain(stop.code)
        return stop.code or 0


def _load(place: str):  # type: ignore[no-untyped-def]
    from importlib import import_module

    module, function = place.split(":")
    return getattr(import_module(module), function)


def _unknown(name: str) -> str:
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(COMMANDS)}"
    return f"no command {name!r}: {hint}"


def _complain(line: str) -> int:
    from rlhf_lit.errors import printable

    print(f"error: {printable(line)}", file=sys.stderr)
    return 2


def _traceback(*error: Any) -> None:
    """A bug's, in which there may be anything that a row or a model says."""
    from traceback import format_exception

    from rlhf_lit.errors import printable

    sys.stderr.write(printable("".join(format_exception(*error))))


def _unread() -> bool:
    """Whether nobody reads standard output any more, as after `| head`; what is left of it then goes nowhere."""
    import os
    import select

    reader = select.poll()
    reader.register(sys.stdout, 0)
    if not any(event & select.POLLERR for _, event in reader.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True


def _interrupted() -> int:
    print("interrupted", file=sys.stderr)
    return 130


def _quiet() -> None:
    """Keep libraries from talking while they are imported; what the user has set stays."""
    import logging
    import os

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else it warns in every forked data worker
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # "no CPU kernel", at import


if __name__ == "__main__":
    sys.exit(main())
