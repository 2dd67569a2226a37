"""Evaluating the runs that were not evaluated yet, each in its own folder, where the next report finds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf_lit import playground
from rlhf_lit import runs as run_folders
from rlhf_lit.data.chat import Template
from rlhf_lit.data.records import OnBadRow, Source
from rlhf_lit.errors import UserError, say
from rlhf_lit.evaluation.answers import read_prompts
from rlhf_lit.evaluation.evaluate import evaluate, in_words
from rlhf_lit.files import load_yaml, short_path
from rlhf_lit.models.base import Base
from rlhf_lit.report.evaluations import FOLDER, evaluations_of, kind_of
from rlhf_lit.report.reading import Run
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import RewardFromFunction, RewardSource
from rlhf_lit.runs import PLAYGROUND, versions

DEEPEST = 8  # runs that began from one another


@dataclass(frozen=True)
class Asked:
    """How runs are to be evaluated: options of `evaluate`, by the same names.

    Args:
        judge: what scores responses; of an arm trained on a reward model this may be that model, the proxy.
        gold: the truth beside it. In the built-in world its exact reward, where neither is named.
        prompts: what is to be answered; in the built-in world its held-out prompts.
        reference: what KL is measured to, and whose responses every run's are compared with; null is each run's own
            `model.base`, where its algorithm compares with that (SFT does not).
        samples: responses to each prompt.
        best_of: the n of best-of-n, each at most `samples`; needs a judge.
        sampling: of the responses; null is the runs' own, where they agree.
        template: how conversations become text.
        on_bad_row: what a bad row of the prompts leads to.
        micro_batch_tokens: padded tokens that go through the device at once. Changes no result.
        seed: of the samples and of the report's intervals.
    """

    judge: RewardSource | None = None
    gold: RewardSource | None = None
    prompts: Source | None = None
    reference: str | None = None
    samples: int = 1
    best_of: list[int] | None = None
    sampling: Sampling | None = None
    template: Template = "auto"
    on_bad_row: OnBadRow = "skip"
    micro_batch_tokens: int = 32768
    seed: int = 0


def evaluate_missing(runs: Sequence[Run], asked: Asked) -> str:
    """Evaluate every run that was not yet evaluated as asked.

    Returns:
        The kind of evaluation that all of them have now.

    Raises:
        UserError: nothing to evaluate on or by, or what `evaluate` refuses.
    """
    writers = [run for run in runs if run.kind.writes]
    if not writers:
        raise UserError("--evaluate: none of these runs writes responses: reward models are judged by val/accuracy")
    prompts, gold = _prompts_and_gold(writers, asked)
    sampling = asked.sampling or _shared_sampling(writers)
    sources = {name: source for name, source in (("judge", asked.judge), ("gold", gold)) if source is not None}
    settings = {"seed": asked.seed, "samples": asked.samples, "sampling": asdict(sampling), "template": asked.template}
    judges = {name: in_words(source) for name, source in sources.items()}
    _, rows = read_prompts(prompts, asked.on_bad_row)
    kind = kind_of(settings, judges, rows.file, rows.total)
    left = [run for run in writers if not _has(run, kind, _reference(run, asked), asked)]
    for number, run in enumerate(left, 1):
        say(f"evaluate {run.name} ({number} of {len(left)})")
        reference = _reference(run, asked)
        evaluate(
            str(run.folder),
            baseline=reference,
            reference=reference,
            judge=asked.judge,
            gold=gold,
            prompts=prompts,
            samples=asked.samples,
            best_of=asked.best_of,
            sampling=sampling,
            template=asked.template,
            on_bad_row=asked.on_bad_row,
            micro_batch_tokens=asked.micro_batch_tokens,
            seed=asked.seed,
            to=str(run_folders.new_run(run.folder, FOLDER)),
        )
    return kind


def _has(run: Run, kind: str, reference: str | None, asked: Asked) -> bool:
    address = None if reference is None else Base(name=reference).address
    return any(
        one.kind == kind
        and one.reference == address
        and set(asked.best_of or ()) <= {point["n"] for point in one.numbers["best_of_n"]}
        for one in evaluations_of(run)
    )


def _reference(run: Run, asked: Asked) -> str | None:
    """What the run's KL is measured to."""
    if asked.reference is not None or not run.kind.has_reference:
        return asked.reference
    return str(run.model["base"]["name"])


def _shared_sampling(runs: Sequence[Run]) -> Sampling:
    """How the runs themselves sample.

    Raises:
        UserError: not all alike, or one does not say.
    """
    if silent := [run.name for run in runs if not run.model.get("sampling")]:
        raise UserError(f"--sampling: {silent[0]} has no model.sampling in its configuration; say how all are to")
    found = [Sampling(**{**run.model["sampling"], "rows_at_once": Sampling.rows_at_once}) for run in runs]
    other = next((i for i, sampling in enumerate(found) if sampling != found[0]), None)
    if other is not None:
        raise UserError(
            f"--sampling: {runs[0].name} and {runs[other].name} sample differently; say how all of them are to"
        )
    return Sampling(**{**asdict(found[0]), "rows_at_once": max(run.model["sampling"]["rows_at_once"] for run in runs)})


def _prompts_and_gold(runs: Sequence[Run], asked: Asked) -> tuple[Source, RewardSource | None]:
    """The prompts, where none are named the held-out ones of the runs' built-in world; and the gold judge.

    Raises:
        UserError: no prompts or no judge for runs that were not trained in the built-in world.
    """
    worlds = {run.name: world_of(run.config) for run in runs}
    at_home = next((world for world in worlds.values() if world is not None), None)
    outside = next((name for name, world in worlds.items() if world is None), None)
    needs_world = asked.prompts is None or (asked.judge is None and asked.gold is None)
    if needs_world and outside is not None:
        raise UserError(
            f"--evaluate: {outside} was not trained in the built-in world: name prompts (--prompts.path=FILE) and what "
            "judges (--judge=RewardFromModel --judge.path=RUN, or --gold)"
        )
    if needs_world and any(world != at_home for world in worlds.values()):
        raise UserError("--evaluate: these runs are of different built-in worlds; report on each by itself")
    gold = asked.gold
    if gold is None and asked.judge is None:
        gold = RewardFromFunction(playground.gold_reward)
    world = at_home or playground.World()
    return asked.prompts or Source(PLAYGROUND, split="held_out", world=world), gold


def world_of(config: dict[str, Any]) -> playground.World | None:
    """The built-in world a run was trained in: its data are the playground, or those of the run it began from are.

    None for a run on other data, and where the run it began from cannot be found from here.
    """
    for _ in range(DEEPEST):
        data = config["data"].get("init_args") or {}
        train = data.get("train") or {}
        if train.get("path") == PLAYGROUND:
            # Runs made while the world was a setting of the data module have it there.
            return playground.World(**(train.get("world") or data.get("world") or {}))
        before = _began_from(config)
        if before is None:
            return None
        config = before
    return None


def _began_from(config: dict[str, Any]) -> dict[str, Any] | None:
    """The configuration of the run whose model a run began with."""
    name = ((config["model"].get("init_args") or {}).get("base") or {}).get("name")
    if not isinstance(name, str):
        return None
    path = Path(name).expanduser()
    for folder in (path, path.parent, *versions(path)):
        file = folder / "config.yaml"
        if file.is_file():
            found = load_yaml(file.read_text(encoding="utf-8"), short_path(file))
            return found if isinstance(found, dict) and "data" in found and "model" in found else None
    return None
