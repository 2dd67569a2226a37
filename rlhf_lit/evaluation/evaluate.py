"""Measuring a trained model next to a baseline, a reference and a file of pairs, from the options to the folder."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from lightning import seed_everything

from rlhf_lit import runs
from rlhf_lit.data.chat import Template
from rlhf_lit.data.records import OnBadRow, Source
from rlhf_lit.data.sources import is_local_file
from rlhf_lit.errors import UserError, say
from rlhf_lit.evaluation import report
from rlhf_lit.evaluation.answers import Judge, by_own_names
from rlhf_lit.evaluation.best_of_n import check_sizes
from rlhf_lit.evaluation.on_pairs import on_pairs
from rlhf_lit.evaluation.on_prompts import check_vocabulary, on_prompts
from rlhf_lit.evaluation.pair_judge import PairJudge
from rlhf_lit.evaluation.report import Evaluation
from rlhf_lit.evaluation.server_answers import require_server
from rlhf_lit.evaluation.setup import Setup
from rlhf_lit.files import append_rows, replace_file
from rlhf_lit.models.base import Base
from rlhf_lit.models.quantization import Dtype
from rlhf_lit.rollout.engine import Sampling
from rlhf_lit.rollout.rewards import RewardFromFunction, RewardFromModel, RewardSource, RewardSum
from rlhf_lit.rollout.server import Server
from rlhf_lit.rollout.vllm_engine import VLLM, require_vllm
from rlhf_lit.trainer.callbacks import environment
from rlhf_lit.trainer.loggers import WandB

WANDB_SAMPLES = 256


def evaluate(
    model: str,
    baseline: Server | str | None = None,
    reference: str | None = None,
    judge: RewardSource | PairJudge | None = None,
    gold: RewardSource | PairJudge | None = None,
    prompts: Source | None = None,
    pairs: Source | None = None,
    samples: int = 1,
    best_of: list[int] | None = None,
    sampling: Sampling = Sampling(),
    vllm: VLLM | None = None,
    template: Template = "auto",
    on_bad_row: OnBadRow = "skip",
    dtype: Dtype = "float32",
    micro_batch_tokens: int = 32768,
    seed: int = 0,
    to: str | None = None,
    wandb: WandB | None = None,
) -> tuple[Evaluation, Path]:
    """Measure a model by what its options name, and write the numbers, the samples and a picture.

    Args:
        model: a run folder, an `hf/` folder or a hub name: a policy, or for `pairs` alone a reward model.
        baseline: what its responses are compared with: another model, a file of prompts and responses (.jsonl, …), or a
            server with OpenAI's interface.
        reference: the model that KL is measured to; a policy judges `pairs` by its log-ratio to it.
        judge: what scores responses: decides who wins, and is the proxy that best-of-n chooses by. Or what compares two
            of them (ServerJudge): decides who wins.
        gold: a second judge, the truth beside the first one's.
        prompts: what is to be answered; the built-in world's are `playground`, split held_out.
        pairs: preference pairs, or a file in RewardBench's or RewardBench 2's shape.
        samples: responses to each prompt.
        best_of: the n of best-of-n, each at most `samples`.
        sampling: length and temperature of the responses. Of it, `rows_at_once` changes no result.
        vllm: draw the responses of model and baseline with vLLM; null draws with transformers.
        template: how conversations become text, as in training.
        on_bad_row: `skip` counts and reports bad rows, `error` stops at the first.
        dtype: of the weights of model, baseline and reference.
        micro_batch_tokens: padded tokens that go through the device at once. Changes no result.
        seed: of the samples and of the intervals.
        to: the folder to make; null is a new version of `runs/evaluate`.
        wandb: log the numbers and samples to Weights & Biases too.

    Returns:
        What was found; and the folder, with `evaluation.json`, `samples.jsonl` and `evaluation.png`.

    Raises:
        UserError: options that do not fit together, or what cannot be read or loaded; nothing is written.
    """
    seed_everything(seed, verbose=False)
    setup = Setup(
        samples,
        tuple(best_of or ()),
        sampling,
        template,
        on_bad_row,
        dtype,
        micro_batch_tokens,
        torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        vllm,
    )
    sources = {name: source for name, source in (("judge", judge), ("gold", gold)) if source is not None}
    scoring = {name: source for name, source in sources.items() if isinstance(source, RewardSource)}
    comparing = {name: source for name, source in sources.items() if isinstance(source, PairJudge)}
    _check(setup, baseline, reference, list(sources), list(comparing), prompts, pairs)
    target = None if to is None else _free_folder(Path(to))
    found = Evaluation(
        model=Base(name=model).address,
        baseline=None if baseline is None else _address(baseline),
        reference=None if reference is None else Base(name=reference).address,
        judges={name: in_words(source) for name, source in sources.items()},
        settings={
            "seed": seed,
            "samples": samples,
            "sampling": asdict(sampling),
            **({} if vllm is None else {"vllm": asdict(vllm)}),  # another sampler draws other samples
            "template": template,
            "dtype": dtype,
            "intervals": report.INTERVALS,
        },
    )
    if reference is not None:
        check_vocabulary(model, reference, setup)
    if prompts is not None:
        # Hours of sampling would be lost to a server that does not answer, or a package that is not there.
        if vllm is not None:
            with by_own_names():
                require_vllm(setup.device, 1)
        if isinstance(baseline, Server):
            require_server(baseline, sampling)
        for name, source in comparing.items():
            source.prepare(name)
        judges = [Judge(name, source, micro_batch_tokens, setup.device) for name, source in scoring.items()]
        found = on_prompts(found, setup, model, baseline, reference, judges, comparing, prompts)
    if pairs is not None:
        found = on_pairs(found, setup, model, reference, pairs)
    for name, rows in found.files.items():
        for line in (rows.summary(), *rows.remarks()):
            say(f"{name}: {line}")
    return found, _write(found, target, wandb)


def _check(
    setup: Setup,
    baseline: Server | str | None,
    reference: str | None,
    judges: list[str],
    comparing: list[str],
    prompts: Source | None,
    pairs: Source | None,
) -> None:
    """Refuse what can be told from the options alone."""
    if prompts is None and pairs is None:
        raise UserError("nothing to evaluate on: name prompts to answer (--prompts.path=FILE), or --pairs.path=FILE")
    for name, value in (("samples", setup.samples), ("micro_batch_tokens", setup.micro_batch_tokens)):
        if value < 1:
            raise UserError(f"{name} must be at least 1, not {value}")
    if isinstance(baseline, str) and baseline.startswith(("http://", "https://", "{")):
        raise UserError("baseline: a server is named by its parts: --baseline.base_url=URL --baseline.model=NAME")
    idle = {
        "baseline": baseline is not None,
        "best_of": bool(setup.best_of),
        "vllm": setup.vllm is not None,
        **dict.fromkeys(judges, True),
    }
    for name, given in idle.items():
        if given and prompts is None:
            raise UserError(f"{name}: it speaks of responses, and there are no prompts to answer: name --prompts.path")
    if baseline is not None and not judges:
        raise UserError("baseline: name a judge (--judge=RewardFromModel --judge.path=RUN), or nobody can win")
    for name in comparing:
        if baseline is None:
            raise UserError(f"{name}: it compares responses with a baseline's, and there is none: name --baseline")
    if setup.best_of and "judge" in comparing:
        raise UserError("best_of: the judge compares responses and scores none; name one that scores, this as --gold")
    if setup.best_of and "judge" not in judges:
        raise UserError("best_of: name the judge that chooses (--judge=RewardFromModel --judge.path=RUN)")
    check_sizes(setup.best_of, setup.samples)
    if pairs is not None and prompts is not None and reference is None:
        raise UserError("pairs: a policy judges pairs by its log-ratio to a reference: name --reference")
    filtered = setup.sampling.top_k is not None or setup.sampling.top_p is not None
    if reference is not None and prompts is not None and filtered:
        raise UserError(
            "sampling.top_k, sampling.top_p: KL is that of the whole distribution, and a filtered sampler draws from "
            "another; leave them null, or leave out --reference"
        )


def _free_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--to {folder}: it is there, with something in it; name a new folder")
    return folder


def _address(baseline: Server | str) -> str:
    if isinstance(baseline, Server):
        return baseline.address
    return str(Path(baseline).absolute()) if is_local_file(baseline) else Base(name=baseline).address


def in_words(source: RewardSource | PairJudge) -> str:
    """What a judge is, for the record."""
    if isinstance(source, PairJudge):
        return source.in_words()
    if isinstance(source, RewardFromModel):
        return source.base.address
    if isinstance(source, RewardFromFunction):
        return f"{source.function.__module__}.{source.name}"
    if isinstance(source, RewardSum):
        return " + ".join(f"{source.weights[name]} · {in_words(part)}" for name, part in source.sources.items())
    return type(source).__name__


def _write(found: Evaluation, target: Path | None, wandb: WandB | None) -> Path:
    """The folder with everything in it; ``evaluation.json`` comes last, so that where it is, all is."""
    try:
        if target is None:
            target = runs.new_run("runs", "evaluate")
        target.mkdir(parents=True, exist_ok=True)
        if found.samples:
            append_rows(target / "samples.jsonl", found.samples)
        report.picture(found, target / "evaluation.png")
        numbers = {**report.plain(found), "environment": environment()}
        replace_file(target / "evaluation.json", lambda file: file.write(json.dumps(numbers, indent=2) + "\n"))
    except OSError as error:
        raise UserError(f"--to {target}: cannot be written: {error.strerror or error}") from error
    if wandb is not None:
        wandb.use_folder(target, f"evaluate/{target.name}")
        wandb.log_hyperparams({key: numbers[key] for key in ("model", "baseline", "reference", "judges", "settings")})
        parts = ("responses", "win_rates", "verdicts", "best_of_n", "kl", "pairs")
        wandb.log_metrics(dict(report.flat({part: numbers[part] for part in parts})), step=0)
        if found.samples:
            wandb.log_samples(found.samples[:WANDB_SAMPLES], step=0)
        wandb.finalize("success")
    return target
