"""The command ``sweep``."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path

from rlhf_lit.commands.shipped import find
from rlhf_lit.commands.sweep_arms import resolve
from rlhf_lit.commands.training import Parser
from rlhf_lit.errors import UserError, hand_over, say
from rlhf_lit.sweep.file import read
from rlhf_lit.sweep.records import Call, Folder, read_arms
from rlhf_lit.sweep.runner import Runner, begin, check_arms, plan

FOLDER = Path("runs/sweeps")


def sweep(
    file: str,
    jobs: int = 1,
    count: int | None = None,
    seed: int | None = None,
    to: Path | None = None,
    resume: bool = False,
    dry_run: bool = False,
) -> int:
    """Run the arms of a sweep file.

    Args:
        file: a W&B sweep file, or the name of one that is shipped.
        jobs: arms at a time.
        count: how many arms the sweep has: the first so many of a grid, so many draws of a random search.
        seed: of a random search's draws (0 where it is not given).
        to: the sweep's folder (default: runs/sweeps/, and the file's name).
        resume: go on with the sweep in that folder: finished arms stay, the others continue from their checkpoints.
        dry_run: check every arm, print its command, and start nothing.

    Returns:
        The number of arms that failed.

    Raises:
        UserError: a bad file, a bad arm, or a folder that another sweep has.
    """
    if jobs < 1:
        raise UserError(f"--jobs: at least one arm at a time, not {jobs}")
    if count is not None and count < 1:
        raise UserError(f"--count: at least one arm, not {count}")
    path = find(file, "sweeps", "sweep")
    content = read(path)
    folder = Folder(to or FOLDER / path.stem)
    with ExitStack() as held:
        if resume:
            if not folder.exists():
                raise UserError(f"--resume: no sweep in {folder.path}; leave it out to start one")
            lock = held.enter_context(folder.lock())  # before the records are read: nobody else is changing them
            call = _continued(folder, Call(content.method, seed or 0, count, content.metric), seed)
        else:
            _refuse_taken(folder)
            call = Call(content.method, seed or 0, count, content.metric)
        whole = plan(content, folder, call)
        say(f"checking {len(whole.arms)} arms")
        resolved = check_arms(whole, resolve)
        if dry_run:
            for arm in whole.arms:
                if arm.status != "finished":
                    hand_over(shlex.join(whole.command(arm)))
            return 0
        if not resume:
            lock = held.enter_context(folder.lock())
            _refuse_taken(folder)  # somebody may have been faster
        begin(whole, resolved)
        return Runner(whole, jobs, lock).run()


def _refuse_taken(folder: Folder) -> None:
    if folder.exists():
        raise UserError(f"{folder.path} is a sweep already: --resume goes on with it, --to names another folder")


def _continued(folder: Folder, asked: Call, seed: int | None) -> Call:
    """How the sweep goes on: as it began, with more arms where that is asked for."""
    began = folder.call()
    known = len(read_arms(folder.path))
    if asked.method != began.method:
        raise UserError(f"--resume: {folder.path} began as a {began.method} search; start another sweep with --to")
    if seed is not None and seed != began.seed:
        raise UserError(f"--seed {seed}: {folder.path} began with {began.seed}; start another sweep with --to")
    if asked.count is not None and asked.count < known:
        raise UserError(f"--count {asked.count}: {folder.path} has {known} arms already")
    count = began.count if asked.count is None else asked.count
    return Call(began.method, began.seed, count, asked.metric)


def main(argv: list[str]) -> int:
    """Run ``sweep``: status 0 where all arms finished, 1 where some failed."""
    parser = Parser(prog="rlhf-lit sweep", description="Run a W&B sweep file here: no account, no network.")
    parser.add_argument("file", type=str, help="A W&B sweep file, or the name of one that `rlhf-lit configs` lists.")
    parser.add_argument("--jobs", type=int, default=1, help="Arms at a time.")
    parser.add_argument("--count", type=int | None, default=None, help="How many arms the sweep has (null: all).")
    parser.add_argument("--seed", type=int | None, default=None, help="Of a random search's draws (null: 0).")
    parser.add_argument(
        "--to", type=Path | None, default=None, help="The sweep's folder (null: runs/sweeps/ and the file's name)."
    )
    parser.add_argument("--resume", action="store_true", help="Go on with the sweep in that folder.")
    parser.add_argument("--dry-run", action="store_true", help="Check every arm, print its command, start nothing.")
    arguments = parser.parse_args(argv)
    return min(1, sweep(**arguments.as_dict()))
