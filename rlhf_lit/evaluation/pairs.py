"""How often a scorer puts the better answer first: on preference pairs, and on files in RewardBench's two shapes.

RewardBench (Lambert et al. 2024, arXiv 2403.13787): `prompt`, `chosen`, `rejected`, `subset`. RewardBench 2 (Malik et
al. 2025, arXiv 2506.01937): the same with lists of answers; a row is right where the best chosen answer beats every
rejected one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_lit.batches import Sequences
from rlhf_lit.data import records
from rlhf_lit.data.chat import ChatFormat, Template
from rlhf_lit.data.records import Message, OnBadRow, RowReport, Source
from rlhf_lit.errors import UserError
from rlhf_lit.evaluation import reward_bench
from rlhf_lit.evaluation.estimates import Array, Estimate
from rlhf_lit.rollout.rewards import shown

Score = Callable[[Sequences], Tensor]
Turns = tuple[Message, ...]


@dataclass(frozen=True)
class Contest:
    """A prompt with right answers and wrong ones.

    Attributes:
        prompt: the turns before the answers.
        chosen, rejected: the answers, one of each in a pair.
        subset: what part of its file it belongs to; None where the file does not say.
        row: number in its file, from 0.
        id: as the file has it; None where it has none.
    """

    prompt: Turns
    chosen: tuple[Turns, ...]
    rejected: tuple[Turns, ...]
    subset: str | None
    row: int
    id: str | None


@dataclass(frozen=True)
class Accuracy:
    """How often the right answer scored higher, strictly.

    Attributes:
        accuracy: right / count, with Wilson's interval.
        right, ties, count: contests; a tie is not right.
    """

    accuracy: Estimate
    right: int
    ties: int
    count: int


@dataclass(frozen=True)
class PairReport:
    """What a scorer makes of a file.

    Attributes:
        overall: over all rows.
        subsets: by subset, in the file's order; empty where it names none.
        sections: RewardBench's four, where all subsets of a section are there.
        score: RewardBench's: the mean of the four sections; None unless all are there.
        longer: share of the rows whose (longest) chosen answer has more tokens than every rejected one: what a
            preference for length alone would reach.
    """

    overall: Accuracy
    subsets: dict[str, Accuracy]
    sections: dict[str, Estimate]
    score: Estimate | None
    longer: Accuracy


def read_contests(source: Source, on_bad_row: OnBadRow) -> tuple[list[Contest], RowReport]:
    """Rows of any paired shape, or with lists of answers.

    Raises:
        UserError: no known shape, a bad row where that is an error, or no usable row.
    """
    if source.path == "playground":
        raise UserError(
            "pairs: the built-in world's pairs are drawn from a policy's own samples: make a file with "
            "`python -m rlhf_lit playground --model RUN --to FILE` and name it here"
        )
    rows = records.read_rows(source)
    sides = [str(source.columns.get(side, side)) for side in ("chosen", "rejected")]
    # A list of texts is checked like a pair by its first ones, and the others below.
    pairs, report = records.preferences([_first_of_each(row, sides) for row in rows], source, on_bad_row=on_bad_row)
    report.unused -= {"subset", "id"}  # which the contests take
    contests = []
    for pair in pairs:
        raw = rows[pair.row]
        chosen, rejected = (
            _answers(raw.get(side), first) for side, first in zip(sides, (pair.chosen, pair.rejected), strict=True)
        )
        reason = _fault(chosen, rejected) or _no_contest(raw)
        if reason and on_bad_row == "error":
            raise UserError(f"{source.path}, row {pair.row}: {reason}; mend the row, or set on_bad_row to skip")
        if reason:
            report.drop(reason, pair.row)
            continue
        subset, name = raw.get("subset"), raw.get("id")
        contests.append(
            Contest(
                pair.prompt,
                chosen,
                rejected,
                None if subset is None else str(subset),
                pair.row,
                None if name is None else str(name),
            )
        )
    if not contests:
        raise UserError(f"no usable row in {source.path}: {report.summary()}")
    return contests, report


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and not any(isinstance(item, dict) for item in value)


def _first_of_each(row: Any, sides: Sequence[str]) -> Any:
    if not isinstance(row, dict):
        return row
    return {**row, **{side: row[side][0] for side in sides if _is_texts(row.get(side))}}


def _answers(value: Any, first: Turns) -> tuple[Turns, ...]:
    """All answers of a side, the first of which has been read."""
    if not _is_texts(value):
        return (first,)
    return first, *((Message("assistant", text if isinstance(text, str) else ""),) for text in value[1:])


def _fault(chosen: tuple[Turns, ...], rejected: tuple[Turns, ...]) -> str | None:
    for side, answers in (("chosen", chosen), ("rejected", rejected)):
        if any(not turn.content.strip() for answer in answers for turn in answer if turn.role == "assistant"):
            return f"empty {side}"
    return "chosen equals rejected" if set(chosen) & set(rejected) else None


def _no_contest(raw: dict[str, Any]) -> str | None:
    """RewardBench 2 scores its subset Ties by margins over two rows of one prompt, not row by row."""
    if raw.get("subset") == reward_bench.TIES and isinstance(raw.get("chosen"), list):
        return "of RewardBench 2's Ties, which are not scored row by row"
    return None


def score_contests(
    contests: Sequence[Contest],
    score: Score,
    tokenizer: Any,
    context: int | None,
    template: Template,
    report: RowReport,
) -> tuple[list[Contest], list[tuple[Array, Array]], list[tuple[Array, Array]]]:
    """Scores of every answer.

    Args:
        contests: what to score; those with an answer too long for the model are dropped and counted.
        score: [rows] scores of sequences.
        tokenizer: the scorer's.
        context: the longest sequence it takes, in tokens.
        template: how a conversation becomes text.
        report: of the file.

    Returns:
        The contests that were scored; and of each the scores, and the lengths in tokens, of its chosen and its rejected
        answers.

    Raises:
        UserError: nothing fits, or a score is NaN or infinite.
    """
    chat = ChatFormat(tokenizer, template)
    kept, tokens, masks = [], [], []
    for contest in contests:
        encoded = chat.answers(contest.prompt, [*contest.chosen, *contest.rejected])
        if not all(any(answer.mask) for answer in encoded):
            report.drop("zero supervised tokens", contest.row)
        elif context is not None and max(len(answer.tokens) for answer in encoded) > context:
            report.drop("over-long", contest.row)
        else:
            kept.append(contest)
            tokens += [answer.tokens for answer in encoded]
            masks += [answer.mask for answer in encoded]
    if not kept:
        raise UserError(f"no usable row is left of {report.summary()}")
    sequences = Sequences.pad(tokens, masks)
    found: Array = score(sequences).double().cpu().numpy()
    lengths: Array = sequences.mask.sum(-1).double().numpy()
    scores, sizes, start = [], [], 0
    for contest in kept:
        middle = start + len(contest.chosen)
        end = middle + len(contest.rejected)
        if not np.isfinite(found[start:end]).all():
            raise UserError(
                f"{report.file}, row {contest.row}: an answer to {shown(contest.prompt[-1].content)} has a score that "
                "is NaN or infinite; the model is broken, or too wide for its dtype"
            )
        scores.append((found[start:middle], found[middle:end]))
        sizes.append((lengths[start:middle], lengths[middle:end]))
        start = end
    return kept, scores, sizes


def pair_report(
    contests: Sequence[Contest], scores: Sequence[tuple[Array, Array]], lengths: Sequence[tuple[Array, Array]]
) -> PairReport:
    """Count who won; the arguments as ``score_contests`` returns them."""
    best = np.array([[chosen.max(), rejected.max()] for chosen, rejected in scores])
    right, tied = best[:, 0] > best[:, 1], best[:, 0] == best[:, 1]
    longest = np.array([[chosen.max(), rejected.max()] for chosen, rejected in lengths])
    names = [contest.subset for contest in contests]
    subsets = {
        name: _accuracy(right[rows], tied[rows])
        for name in dict.fromkeys(names)
        if name is not None and len(rows := [i for i, own in enumerate(names) if own == name])
    }
    sections = reward_bench.sections(names, right)
    whole = len(sections) == len(reward_bench.SECTIONS)
    return PairReport(
        _accuracy(right, tied),
        subsets,
        sections,
        reward_bench.score(names, right) if whole else None,
        _accuracy(longest[:, 0] > longest[:, 1], longest[:, 0] == longest[:, 1]),
    )


def _accuracy(right: Any, tied: Any) -> Accuracy:
    return Accuracy(Estimate.share(int(right.sum()), len(right)), int(right.sum()), int(tied.sum()), len(right))
