"""The part of an evaluation in which a model answers prompts: scores, win rates, KL, best-of-n."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from rlhf_lit.evaluation.pair_judge import Comparison, PairJudge
from rlhf_lit.evaluation.report import Divergence, Evaluation, Responses
from rlhf_lit.evaluation.sampling import prompt_text, transcript
from rlhf_lit.evaluation.server_answers import require_no_tools, server_answers
from rlhf_lit.evaluation.setup import Setup
from rlhf_lit.evaluation.win_rate import HeadToHead, head_to_head, head_to_head_of
from rlhf_lit.models.loading import load_tokenizer
from rlhf_lit.rollout.server import Server

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
    baseline: str | Server | None,
    reference: str | None,
    judges: Sequence[Judge],
    pair_judges: Mapping[str, PairJudge],
    source: Source,
) -> Evaluation:
    """Let the model answer prompts, and judge what it says.

    Model and baseline are never in memory together; the reference stands beside the policy, and so do judges.

    Args:
        found: what is known so far.
        setup: how to carry it out.
        model, baseline, reference: as the command's options.
        judges: `judge` and `gold`, as far as they were named and score responses.
        pair_judges: the same of those that compare responses, by their names.
        source: of the prompts.

    Returns:
        The evaluation with that part of it.
    """
    prompts, report = read_prompts(source, setup.on_bad_row)
    if isinstance(baseline, Server):
        require_no_tools(prompts, source)
    policy = setup.policy(model, reference)
    prompts = fitting(prompts, policy, setup.template, report, setup.vllm)
    tokenizer = policy.tokenizer
    for judge in judges:
        judge.prepare(tokenizer)
    prompts = with_readable_gold(prompts, judges, report)
    chat = ChatFormat(tokenizer, setup.template)
    texts = [prompt_text(chat, prompt.prompt) for prompt in prompts]
    ours = sampled(policy, prompts, setup.samples, setup.template, MODEL, setup.vllm)
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
    asked = [transcript(prompt.prompt) for prompt in prompts]
    compared = {
        name: Comparison.of(judge, asked, ours, judged["baseline"].answers, rows) for name, judge in pair_judges.items()
    }
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
        }
        | {name: _compared(one, ours, judged["baseline"].answers) for name, one in compared.items()},
        verdicts={name: one.in_numbers() for name, one in compared.items()},
        best_of_n=best_of_n_curve(scores["judge"], scores.get("gold"), setup.best_of) if setup.best_of else [],
        kl=kl,
        samples=_table(prompts, texts, judged, compared),
    )


def _judged(answers: Answers, judges: Sequence[Judge], texts: list[str], rows: list[dict[str, Any]]) -> Judged:
    return Judged(answers, {judge.name: judge.scores(answers, texts, rows) for judge in judges})


def _compared(comparison: Comparison, ours: Answers, theirs: Answers) -> HeadToHead:
    won, tied = comparison.outcomes
    return head_to_head_of(won, tied, (2 * won + tied - 1).mean((1, 2)), ours.lengths, theirs.lengths)


def _baseline(
    baseline: str | Server, prompts: Sequence[Prompt], texts: Sequence[str], tokenizer: Any, setup: Setup
) -> tuple[Answers, Any, RowReport | None]:
    """The baseline's responses, the tokenizer they are in, and the report of the file they are from."""
    if isinstance(baseline, Server):
        chat = ChatFormat(tokenizer, setup.template)
        return server_answers(baseline, prompts, setup.samples, setup.sampling, chat, BASELINE), tokenizer, None
    if is_local_file(baseline):
        answers, report = read_answers(Source(baseline), texts, ChatFormat(tokenizer, setup.template), setup.on_bad_row)
        return answers, tokenizer, report
    policy = setup.policy(baseline)
    return sampled(policy, prompts, setup.samples, setup.template, BASELINE, setup.vllm), policy.tokenizer, None


def _table(
    prompts: Sequence[Prompt], texts: Sequence[str], judged: dict[str, Judged], compared: dict[str, Comparison]
) -> list[dict[str, Any]]:
    """A line for each prompt and sample: one response per model, with its length, its scores and the verdicts on it."""
    table = []
    for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        for sample in range(max(one.answers.samples for one in judged.values())):
            line: dict[str, Any] = {"row": prompt.row, "sample": sample, "prompt": text}
            for name, one in judged.items():
                if sample < one.answers.samples:
                    line[name] = one.answers.texts[i][sample]
                    line[f"{name}/tokens"] = int(one.answers.lengths[i, sample])
                    line |= {f"{name}/{judge}": float(x[i, sample]) for judge, x in one.scores.items()}
            if sample < judged["model"].answers.samples:
                line |= {f"verdicts/{name}": one.told(i, sample) for name, one in compared.items()}
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
