"""Judges of pairs: which of two answers to a prompt is better, asked in both orders.

A judge that reads both answers may like the one it sees first (Zheng et al. 2023, arXiv 2306.05685, section 3.3), so
every pair is shown twice, each answer first once, and a comparison's outcome is the mean of the two.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np

from rlhf_lit.errors import UserError, say
from rlhf_lit.evaluation.answers import Answers
from rlhf_lit.evaluation.estimates import Array, Estimate
from rlhf_lit.randomness import global_seed
from rlhf_lit.rollout.rewards import shown
from rlhf_lit.rollout.server import SEEDS, Body, Server, ask, require_answers

Winner = Literal["first", "second", "tie"]

TEMPLATE = """\
Which of two answers to a request is better? Judge by whether an answer does what was asked, is correct and is helpful.
Neither the order in which the answers stand nor their length counts.

[Request]
{prompt}

[Answer A]
{first}

[Answer B]
{second}

[End]
Give your reasons in a few sentences. Then end with your verdict on a line of its own: [[A]] if answer A is better,
[[B]] if answer B is better, [[tie]] if neither is."""

_PLACES = re.compile(r"\{(prompt|first|second)\}")
_WINNERS: dict[str, Winner] = {"a": "first", "b": "second", "c": "tie", "tie": "tie"}
_MARKED = re.compile(r"\[\[\s*(a|b|c|tie)\s*\]\]", re.IGNORECASE)
_STATED = re.compile(
    r"(?:^|\b(?:verdict|winner|answer|better)\b(?:\s+is\b|\s*:)+)\s*(?:answer\s+|a\s+(?=tie))?(a|b|c|tie)$",
    re.IGNORECASE,
)
_MARKUP = re.compile(r"[*_`\"'()\[\].]")


@dataclass(frozen=True)
class Verdict:
    """What a judge makes of two answers.

    Attributes:
        winner: None where it cannot be told from its words.
        words: the judge's own.
    """

    winner: Winner | None
    words: str = ""


class PairJudge:
    """Compares two answers to a prompt, where a ``RewardSource`` scores one."""

    def prepare(self, role: str) -> None:
        """Find out whether it can judge, before anything is sampled.

        Args:
            role: the option it stands under, `judge` or `gold`: what its complaints begin with.

        Raises:
            UserError: it cannot.
        """

    def compare(
        self, prompts: list[str], first: list[str], second: list[str], rows: list[dict[str, Any]]
    ) -> list[Verdict]:
        """A verdict on each pair of answers.

        Args:
            prompts: the requests; of a dialogue all turns, with their roles.
            first, second: the answers, as they are to be shown.
            rows: the rows of the data file the prompts came from.
        """
        raise NotImplementedError

    def in_words(self) -> str:
        """What it is, for the record."""
        return type(self).__name__


class ServerJudge(PairJudge):
    """A model of a server reads a request and two answers, and says which is better; at temperature 0.

    Args:
        server: where it is.
        template: what it is shown, with `{prompt}`, `{first}` and `{second}`. It must ask for a verdict: `[[A]]` for
            the first answer, `[[B]]` for the second, `[[tie]]` or `[[C]]` for neither; the last such mark counts.
        max_tokens: of its reasons and its verdict.

    Raises:
        ValueError: a template that does not show all three, or no tokens.
    """

    def __init__(self, server: Server, template: str = TEMPLATE, max_tokens: int = 1024) -> None:
        missing = {"prompt", "first", "second"} - set(_PLACES.findall(template))
        if missing:
            raise ValueError(
                f"template shows no {{{sorted(missing)[0]}}}: name all of {{prompt}}, {{first}}, {{second}}"
            )
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        self.server = server
        self.template = template
        self.max_tokens = max_tokens
        self.role = "judge"

    def prepare(self, role: str) -> None:
        self.role = role
        require_answers(self.server, self._settings, f"{role}.server")

    def compare(
        self, prompts: list[str], first: list[str], second: list[str], rows: list[dict[str, Any]]
    ) -> list[Verdict]:
        """As the base class has it.

        Raises:
            UserError: the server does not answer, or no answer of it holds a verdict.
        """
        shown_pairs = [self._filled(*pair) for pair in zip(prompts, first, second, strict=True)]
        bodies = [{"messages": [{"role": "user", "content": text}], **self._settings} for text in shown_pairs]
        replies = ask(self.server, bodies, f"{self.role}.server")
        verdicts = [Verdict(verdict_in(reply.text), reply.text or "") for reply in replies]
        cut = sum(reply.finish == "length" for reply in replies)
        if verdicts and all(verdict.winner is None for verdict in verdicts):
            much = f"; {cut} were cut, so raise max_tokens" if cut else ""
            raise UserError(
                f"{self.role}: no answer of {self.server.address} holds a verdict, of {len(verdicts)}{much}; the first "
                f"is {shown(verdicts[0].words)}. Let the template ask for [[A]], [[B]] or [[tie]]"
            )
        if cut:
            say(
                f"note: {self.role}: {cut} of {len(replies)} answers of {self.server.address} were cut at "
                f"{self.max_tokens} tokens; raise {self.role}.max_tokens"
            )
        return verdicts

    def in_words(self) -> str:
        return self.server.address

    @property
    def _settings(self) -> Body:
        return {"temperature": 0.0, "max_tokens": self.max_tokens, "seed": global_seed() % SEEDS}

    def _filled(self, prompt: str, first: str, second: str) -> str:
        """At once: what stands in an answer is not a place of the template."""
        values = {"prompt": prompt, "first": first, "second": second}
        return _PLACES.sub(lambda place: values[place[1]], self.template)


def verdict_in(text: str | None) -> Winner | None:
    """The verdict of a judge's words: their last mark, else their last line if it is one and nothing else, or says
    that one is "the verdict". None where there is none, as in what was cut before it."""
    if text is None:
        return None
    said = text.rpartition("</think>")[2]  # what a judge considers is no verdict
    if marks := _MARKED.findall(said):
        return _WINNERS[marks[-1].lower()]
    lines = [plain for line in said.splitlines() if (plain := _MARKUP.sub("", line).strip())]
    stated = _STATED.search(lines[-1]) if lines else None
    return _WINNERS[stated[1].lower()] if stated else None


@dataclass(frozen=True)
class Verdicts:
    """How a judge of pairs judged.

    Attributes:
        count: verdicts: two for each pair of a model's and a baseline's sample.
        unreadable: share of them that could not be read, and count as ties.
        first: share of the verdicts for one of the answers that went to the one shown first; ½ without position bias.
        consistent: share of the pairs with the same outcome in both orders.
    """

    count: int
    unreadable: Estimate
    first: Estimate
    consistent: Estimate


@dataclass(frozen=True)
class Comparison:
    """A judge's verdicts on all pairs of samples.

    Attributes:
        verdicts: [prompts, S, S', 2] objects: with the model's answer first, and second.
    """

    verdicts: Any

    @classmethod
    def of(
        cls, judge: PairJudge, prompts: Sequence[str], ours: Answers, theirs: Answers, rows: Sequence[dict[str, Any]]
    ) -> Comparison:
        """Let a judge compare every sample of the model with every sample of the baseline to the same prompt.

        Args:
            judge: asked once, about all of them.
            prompts: as the judge is to see them.
            ours, theirs: the model's and the baseline's answers.
            rows: the prompts' rows of their file.
        """
        pairs = [
            (prompt, (a, b) if model_first else (b, a), row)
            for prompt, our, their, row in zip(prompts, ours.texts, theirs.texts, rows, strict=True)
            for a in our
            for b in their
            for model_first in (True, False)
        ]
        found = judge.compare(
            [prompt for prompt, _, _ in pairs],
            [first for _, (first, _), _ in pairs],
            [second for _, (_, second), _ in pairs],
            [row for _, _, row in pairs],
        )
        table = np.empty(len(found), dtype=object)
        table[:] = found
        return cls(table.reshape(len(prompts), ours.samples, theirs.samples, 2))

    def _is(self, *winners: Winner | None) -> Array:
        """[prompts, S, S', 2] whether a verdict is one of these; 0 or 1."""
        return cast(
            Array, np.vectorize(lambda verdict: float(verdict.winner in winners), otypes=[float])(self.verdicts)
        )

    @property
    def _won(self) -> Array:
        """[prompts, S, S', 2] whether the model's answer is the better one."""
        return np.stack([self._is("first")[..., 0], self._is("second")[..., 1]], -1)

    @property
    def _tied(self) -> Array:
        return self._is("tie", None)

    @property
    def outcomes(self) -> tuple[Array, Array]:
        """[prompts, S, S'] shares of the two orders in which the model wins, and in which there is a tie."""
        return self._won.mean(-1), self._tied.mean(-1)

    def in_numbers(self) -> Verdicts:
        """With intervals over prompts."""
        points = self._won + self._tied / 2
        first, decided = self._is("first"), self._is("first", "second")

        def by_prompt(values: Array) -> Array:
            return cast(Array, values.reshape(len(values), -1).mean(-1))

        each = by_prompt(decided)
        among = np.divide(by_prompt(first), each, out=np.zeros_like(each), where=each > 0)
        return Verdicts(
            int(self.verdicts.size),
            Estimate.bootstrap(by_prompt(self._is(None))),
            Estimate.ratio(among, each),
            Estimate.bootstrap(by_prompt((points[..., 0] == points[..., 1]).astype(float))),
        )

    def told(self, prompt: int, sample: int) -> list[dict[str, Any]]:
        """The verdicts on one sample of the model, for ``samples.jsonl``: a line for each sample of the baseline."""
        names: list[dict[Winner | None, str | None]] = [
            {"first": "model", "second": "baseline", "tie": "tie", None: None},
            {"first": "baseline", "second": "model", "tie": "tie", None: None},
        ]
        return [
            {
                "baseline_sample": other,
                **{
                    key: {"winner": name[verdict.winner], "words": verdict.words}
                    for key, name, verdict in zip(("model_first", "baseline_first"), names, both, strict=True)
                },
            }
            for other, both in enumerate(self.verdicts[prompt, sample])
        ]
