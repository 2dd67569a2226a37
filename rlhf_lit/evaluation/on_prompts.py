"""The part of an evaluation in which a model answers prompts: scores, win rates, KL, best-of-n."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf_lit.data.chat import ChatFormat
from rlhf_lit.data.records import Prompt, RowReport, Source
from rlhf_lit.data.sources import is_local_file
from rlhf_lit.errors import UserError
from rlhf_lit.evaluation.answers import Answers, Judge, fitting, read_answers, read_prompts, sampled, with_readable_gold
from rlhf_lit.evaluation.best_of_n import best_of_n_curve
from rlhf_lit.evaluation.divergence import kl_per_response
from rlhf_lit.evaluation.estimates import Array, Estimate
from rlhf_lit.evaluation.report import Divergence, Evaluation, Responses
from rlhf_lit.evaluation.sampling import prompt_text
from rlhf_lit.evaluation.setup import Setup
from rlhf_lit.evaluation.win_rate import head_to_head
from rlhf_lit.models.loading import load_tokenizer

# The streams of sampling noise: a baseline that is the model itself gives other samples than the model.
MODEL, BASELINE = 0, 1


@dataclass(frozen=True)
class Judged:
    """Responses with their scores.

    Attributes:
        answers: the responses.
        scores: [prompts, samples] by the name of the judge.
    """

    answers: Answers
    scores: dict[str, Array]

    def in_numbers(self) -> Responses:
        """Means over prompts."""
        ended = self.answers.ended
        return Responses(
            Estimate.bootstrap(self.answers.lengths.mean(1)),
            None if ended is None else Estimate.bootstrap(ended.mean(1)),
            {name: Estimate.bootstrap(scores.mean(1)) for name, scores in self.scores.items()},
        )


def on_prompts(
    found: Evaluation,
    setup: Setup,
    model: str,
    baseline: str | None,
    reference: str | None,
    judges: Sequence[Judge],
    source: Source,
) -> Evaluation:
    """Let the model answer prompts, and judge what it says.

    Model and baseline are never in memory together; the reference stands beside the policy, and so do judges.

    Args:
        found: what is known so far.
        setup: how to carry it out.
        model, baseline, reference: as the command's options.
        judges: `judge` and `gold`, as far as they were named.
        source: of the prompts.

    Returns:
        The evaluation with that part of it.
    """
    prompts, report = read_prompts(source, setup.on_bad_row)
    policy = setup.policy(model, reference)
    prompts = fitting(prompts, policy, setup.template, report)
    tokenizer = policy.tokenizer
    for judge in judges:
        judge.prepare(tokenizer)
    prompts = with_readable_gold(prompts, judges, report)
    chat = ChatFormat(tokenizer, setup.template)
    texts = [prompt_text(chat, prompt.prompt) for prompt in prompts]
    ours = sampled(policy, prompts, setup.samples, setup.template, MODEL)
    kl = None
    if reference is not None:
        exact, k1 = (
            Estimate.bootstrap(per_row.reshape(len(prompts), -1).mean(1))
            for per_row in kl_per_response(policy, ours.sequences, setup.micro_batch_tokens)
        )
        kl = Divergence(exact, k1)
    del policy
    rows = [prompt.source for prompt in prompts]
    judged = {"model": _judged(ours, judges, texts, rows)}
    files = {"prompts": report}
    if baseline is not None:
        theirs, theirs_tokenizer, theirs_report = _baseline(baseline, prompts, texts, tokenizer, setup)
        files |= {"baseline": theirs_report} if theirs_report else {}
        for judge in judges:
            judge.prepare(theirs_tokenizer)
        judged["baseline"] = _judged(theirs, judges, texts, rows)
    scores = judged["model"].scores
    return replace(
        found,
        files={**found.files, **files},
        responses={name: one.in_numbers() for name, one in judged.items()},
        win_rates={
            judge.name: head_to_head(
                scores[judge.name],
                judged["baseline"].scores[judge.name],
                ours.lengths,
                judged["baseline"].answers.lengths,
            )
            for judge in judges
            if baseline is not None
        },
        best_of_n=best_of_n_curve(scores["judge"], scores.get("gold"), setup.best_of) if setup.best_of else [],
        kl=kl,
        samples=_table(prompts, texts, judged),
    )


def _judged(answers: Answers, judges: Sequence[Judge], texts: list[str], rows: list[dict[str, Any]]) -> Judged:
    return Judged(answers, {judge.name: judge.scores(answers, texts, rows) for judge in judges})


def _baseline(
    baseline: str, prompts: Sequence[Prompt], texts: Sequence[str], tokenizer: Any, setup: Setup
) -> tuple[Answers, Any, RowReport | None]:
    """The baseline's responses, the tokenizer they are in, and the report of the file they are from."""
    if is_local_file(baseline):
        answers, report = read_answers(Source(baseline), texts, ChatFormat(tokenizer, setup.template), setup.on_bad_row)
        return answers, tokenizer, report
    policy = setup.policy(baseline)
    return sampled(policy, prompts, setup.samples, setup.template, BASELINE), policy.tokenizer, None


def _table(prompts: Sequence[Prompt], texts: Sequence[str], judged: dict[str, Judged]) -> list[dict[str, Any]]:
    """A line for each prompt and sample: one response per model, with its length and its scores."""
    table = []
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        for sample in range(max(one.answers.samples for one in judged.values())):
            line: dict[str, Any] = {"row": prompt.row, "sample": sample, "prompt": text}
            for name, one in judged.items():
                if sample < one.answers.samples:
                    line[name] = one.answers.texts[i][sample]
                    line[f"{name}/tokens"] = int(one.answers.lengths[i, sample])
                    line |= {f"{name}/{judge}": float(x[i, sample]) for judge, x in one.scores.items()}
            table.append(line)
    return table


def check_vocabulary(model: str, reference: str, setup: Setup) -> None:
    """Refuse a reference that writes in other tokens: no log-prob of one could be compared with the other's.

    Raises:
        UserError: it does.
    """
    ours, theirs = (load_tokenizer(setup.base(name)).get_vocab() for name in (model, reference))
    if ours != theirs:
        raise UserError(f"reference: {reference} has another vocabulary than {model}, so there is no KL between them")
