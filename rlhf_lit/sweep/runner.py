"""A sweep from its file to its last arm: listing the arms, checking that all of them will run, and running them."""

from __future__ import annotations

import os
import shlex
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from rlhf_lit.errors import UserError, tell
from rlhf_lit.files import short_path
from rlhf_lit.sweep import check
from rlhf_lit.sweep.file import SweepFile
from rlhf_lit.sweep.processes import Process, end, environment, visible_gpus
from rlhf_lit.sweep.records import LOG, Arm, Call, Folder, arm_name, last_value, number_of, read_arms

Resolver = Callable[[Mapping[str, Sequence[str]]], Iterable[check.Resolved]]
POLL = 0.1  # seconds between two looks at the running arms


@dataclass
class Plan:
    """What a sweep consists of.

    Attributes:
        file: read and checked.
        folder: where its arms are kept.
        call: how it was asked for.
        arms: all of them, those on record first.
        new: names of those that are not on record yet.
    """

    file: SweepFile
    folder: Folder
    call: Call
    arms: list[Arm]
    new: set[str]

    def command(self, arm: Arm) -> list[str]:
        """The words an arm is started with."""
        return self.file.words(arm.parameters, *self._place(arm))

    def argv(self, arm: Arm) -> list[str]:
        """The same from `fit` on."""
        return self.file.argv(arm.parameters, *self._place(arm))

    def _place(self, arm: Arm) -> list[str]:
        last = ["--ckpt_path=last"] if self.folder.has_checkpoint(arm) else []
        return [f"--runs={self.folder.path}", f"--name={arm.name}", *last]


def plan(file: SweepFile, folder: Folder, call: Call) -> Plan:
    """Which arms there are. What is on record stays, what the file adds gets the numbers that follow.

    Raises:
        UserError: an arm on record is not in the file any more.
    """
    known = read_arms(folder.path)
    wanted = file.arms(call.seed, call.count)
    varied = {parameter.name for parameter in file.parameters if parameter.varies}
    number = max((number_of(arm.name) for arm in known), default=-1) + 1
    left, added = list(known), []
    for parameters in wanted:
        arguments = file.arguments(parameters)
        same = next((arm for arm in left if arm.arguments == arguments), None)
        if same is not None:
            left.remove(same)
            continue
        added.append(Arm(arm_name(number, parameters, varied), parameters, arguments))
        number += 1
    if left:
        raise UserError(
            f"{file.path}: arm {left[0].name} of {folder.path} is not among its arms any more; put it back, "
            "or start another sweep with --to"
        )
    return Plan(file, folder, call, [*known, *added], {arm.name for arm in added})


def check_arms(plan: Plan, resolve: Resolver) -> dict[str, check.Resolved]:
    """Every arm's command through the real parser. → what each resolves to, by name.

    Args:
        plan: which arms there are.
        resolve: what each of some commands, by name, resolves to; raises where its run would refuse one.

    Raises:
        UserError: an arm that its run would refuse, that differs from what is on record, or a grid's that does what
            another does.
    """
    found: dict[str, check.Resolved] = {}
    for arm, config in zip(plan.arms, resolve({arm.name: plan.argv(arm) for arm in plan.arms}), strict=True):
        if arm.name not in plan.new and (change := check.difference(plan.folder.resolved(arm), config)):
            raise UserError(
                f"arm {arm.name} would not be what it was when the sweep began: {change}; "
                "undo that, or start another sweep with --to"
            )
        twin = next((name for name, other in found.items() if other == config), None)
        if twin and plan.file.method == "grid":
            raise UserError(f"arms {twin} and {arm.name} are the same run: a parameter of the sweep changes nothing")
        found[arm.name] = config
    return found


def begin(plan: Plan, resolved: dict[str, check.Resolved]) -> None:
    """Put the sweep and its new arms on record."""
    plan.folder.begin(plan.file.text, plan.call)
    for arm in plan.arms:
        if arm.name in plan.new:
            plan.folder.save_resolved(arm, resolved[arm.name])
            plan.folder.save(arm)


class Runner:
    """Runs what is left of a sweep.

    Args:
        plan: on record.
        jobs: arms at a time.
        lock: of the sweep's folder.
    """

    def __init__(self, plan: Plan, jobs: int, lock: int) -> None:
        self.plan = plan
        self.folder = plan.folder
        self.jobs = jobs
        self.lock = lock
        self.waiting = [arm for arm in plan.arms if arm.status != "finished"]
        self.running: dict[str, tuple[Arm, Process]] = {}
        self.ended: list[Arm] = []
        self.began = time.monotonic()
        self.cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.gpus = visible_gpus(os.environ)

    def run(self) -> int:
        """→ how many arms failed.

        Raises:
            KeyboardInterrupt: after Ctrl-C or SIGTERM, once all arms have ended and are on record as interrupted.
        """
        tell(self._opening())
        with _stoppable():
            try:
                while self.waiting or self.running:
                    while self.waiting and len(self.running) < self.jobs:
                        self._start(self.waiting.pop(0))
                    time.sleep(POLL)
                    self._collect()
            except BaseException:
                self._stop()
                raise
        failed = [arm for arm in self.ended if arm.status == "failed"]
        tell(self._closing(failed))
        return len(failed)

    def _start(self, arm: Arm) -> None:
        slot = min(set(range(self.jobs)) - {process.slot for _, process in self.running.values()})
        words = self.plan.command(arm)
        goes_on = words[-1] == "--ckpt_path=last"
        log = self.folder.of(arm) / LOG
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {shlex.join(words)}\n")
        arm.status, arm.started, arm.ended, arm.exit_status, arm.error = "running", _now(), None, None, None
        arm.attempts += 1
        try:
            process = Process.start(words, self._environment(slot), log, slot, self.lock)
        except OSError as error:
            self._record_end(arm, "failed", f"{words[0]}: {error.strerror}")
            return
        arm.process = process.popen.pid
        self.running[arm.name] = arm, process
        self.folder.save(arm)
        tell(f"start  {arm.name}{', from its last checkpoint' if goes_on else ''}")

    def _environment(self, slot: int) -> dict[str, str]:
        given = {"WANDB_RUN_GROUP": self.folder.path.name, **os.environ}
        return environment(slot, self.jobs, given, self.cores, self.gpus)

    def _collect(self) -> None:
        """Put on record which arms have ended."""
        for arm, process in list(self.running.values()):
            if process.popen.poll() is not None:
                process.signal(signal.SIGKILL)  # what it left behind
                self._take(arm, process, "failed")

    def _take(self, arm: Arm, process: Process, otherwise: str) -> None:
        del self.running[arm.name]
        status = process.popen.returncode
        arm.exit_status = status
        arm.seconds += time.monotonic() - process.began
        if status == 0:
            self._record_end(arm, "finished", None)
        elif otherwise == "interrupted":
            self._record_end(arm, "interrupted", None)
        else:
            by_signal = f"ended by {signal.Signals(-status).name}; before it: " if status < 0 else ""
            self._record_end(arm, "failed", by_signal + process.error())

    def _record_end(self, arm: Arm, status: Any, error: str | None) -> None:
        arm.status, arm.ended, arm.error, arm.process = status, _now(), error, None
        if run := self.folder.run_of(arm):
            arm.run = run.name
            arm.metric = last_value(run, self.plan.call.metric) if self.plan.call.metric else None
        self.folder.save(arm)
        self.ended.append(arm)
        tell(self._line(arm))

    def _stop(self) -> None:
        """End every arm, and put it on record as interrupted: the next `--resume` goes on with it."""
        self._collect()
        arms = list(self.running.values())
        if arms:
            tell(f"ending {len(arms)} arm{'s' * (len(arms) > 1)}; again to kill")
        end([process for _, process in arms])
        for arm, process in arms:
            self._take(arm, process, "interrupted")
        left = sum(arm.status != "finished" for arm in self.plan.arms)
        tell(f"{left} of {len(self.plan.arms)} arms left; --resume goes on with them")

    # --- what it says ------------------------------------------------------------------------------------------------

    def _opening(self) -> str:
        done = len(self.plan.arms) - len(self.waiting)
        parts = [f"{len(self.plan.arms)} arms in {short_path(self.folder.path.absolute())}", f"{self.jobs} at a time"]
        if done:
            parts.append(f"{done} finished before")
        return " · ".join(parts)

    def _line(self, arm: Arm) -> str:
        words = {"finished": "done   ", "failed": "FAILED ", "interrupted": "ended  "}
        parts = [f"{words[arm.status]}{arm.name}", clock(arm.seconds)]
        if arm.error:
            parts += [arm.error, f"log {short_path((self.folder.of(arm) / LOG).absolute())}"]
        elif arm.metric is not None:
            parts.append(f"{self.plan.call.metric} {arm.metric:.4g}")
        left = len(self.waiting) + len(self.running)
        if left and arm.status != "interrupted":
            parts.append(f"{left} left, about {clock(self._rest(left))}")
        return " · ".join(parts)

    def _rest(self, left: int) -> float:
        """Seconds, if the others take as long as those that have ended in this call."""
        return (time.monotonic() - self.began) / len(self.ended) * left

    def _closing(self, failed: list[Arm]) -> str:
        finished = sum(arm.status == "finished" for arm in self.plan.arms)
        parts = [f"{finished} of {len(self.plan.arms)} arms finished", clock(time.monotonic() - self.began)]
        if failed:
            parts.append(f"{len(failed)} failed ({', '.join(arm.name for arm in failed)}): --resume tries them again")
        return " · ".join(parts)


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextmanager
def _stoppable() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt.

    SIGINT even where the shell has a background job ignore it: arms would inherit that, and could not be interrupted.
    SIGHUP not where it is ignored: that is what `nohup` is for.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
