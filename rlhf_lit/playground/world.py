"""Demonstrations, prompts and preference pairs of the built-in world."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, cycle, islice
from random import Random
from typing import Any, Literal

from rlhf_lit.errors import UserError
from rlhf_lit.playground.grammar import KINDS, REFUSAL, Task, table
from rlhf_lit.playground.reward import gold_reward

Split = Literal["train", "held_out"]
Wanted = Literal["demonstrations", "prompts", "pairs", "ranked answers"]

HELD_OUT_SHARE = 1 / 3
WORDY = (
    "it is {}.",
    "the answer is {}.",
    "i think it is {}.",
    "sure, the answer is {}.",
)
WORDY_REFUSALS = (
    "i cannot help with that.",
    "sorry, i cannot help with this request.",
    "i am sorry, but i cannot help with that request.",
)
WRONGLY_REFUSED = 0.2  # of the wrong demonstrations, how many refuse what could be answered


@dataclass(frozen=True)
class World:
    """The make-up of the built-in world. The same fields give the same rows, on any machine.

    Args:
        seed: draws the prompts, the split, the demonstrations' faults and the rater's mistakes.
        demonstrations: rows for SFT.
        prompts: training prompts, for preference pairs and for PPO. Once a kind of task has no new prompt, the earlier
            ones come again.
        held_out: prompts kept for validation; no demonstration and no training prompt has the same text.
        brief: share of the demonstrations that are right and brief.
        wordy: share that are right with words nobody needs.
        wrong: share that are wrong, refuse what can be answered, or obey what should be declined.
        noise: temperature of the Bradley-Terry rater: she prefers a to b with probability
            sigmoid((gold(a) - gold(b)) / noise). 0 never errs.
    """

    seed: int = 0
    demonstrations: int = 4000
    prompts: int = 4000
    held_out: int = 1024
    brief: float = 0.35
    wordy: float = 0.40
    wrong: float = 0.25
    noise: float = 0.25

    def __post_init__(self) -> None:
        for name in ("demonstrations", "prompts", "held_out"):
            if getattr(self, name) < 1:
                raise UserError(f"world.{name} must be at least 1, not {getattr(self, name)}")
        shares = (self.brief, self.wordy, self.wrong)
        if min(shares) < 0 or not math.isclose(sum(shares), 1.0, abs_tol=1e-6):
            raise UserError(f"world.brief, world.wordy and world.wrong must be shares that add up to 1, not {shares}")
        if not (self.noise >= 0 and math.isfinite(self.noise)):
            raise UserError(f"world.noise must be 0 or more, not {self.noise}")


@cache
def _pools(seed: int) -> dict[tuple[Split, str], tuple[Task, ...]]:
    """Every task by split and kind, in the seed's order; sizes of the world cannot carry one across the split."""
    pools: dict[tuple[Split, str], tuple[Task, ...]] = {}
    for kind in KINDS:
        tasks = [task for task in table().values() if task.kind == kind]
        Random(f"{seed}/split/{kind}").shuffle(tasks)
        cut = int(HELD_OUT_SHARE * len(tasks))
        pools["held_out", kind], pools["train", kind] = tuple(tasks[:cut]), tuple(tasks[cut:])
    return pools


def _draw(world: World, split: Split, count: int, purpose: str) -> list[Task]:
    """``count`` tasks, the kinds in equal parts, each kind's without repetition as long as it lasts."""
    pools = {kind: _pools(world.seed)[split, kind] for kind in KINDS}
    drawn: list[Task] = []
    for place, kind in enumerate(KINDS):
        share = count // len(KINDS) + (place < count % len(KINDS))
        if split == "held_out" and share > len(pools[kind]):
            raise UserError(
                f"world.held_out={count} asks for {share} distinct prompts of the kind {kind!r}, "
                f"but there are {len(pools[kind])}: ask for at most {len(KINDS) * min(map(len, pools.values()))}"
            )
        order = list(pools[kind])
        Random(f"{world.seed}/{purpose}/{kind}").shuffle(order)
        drawn.extend(islice(cycle(order), share))
    Random(f"{world.seed}/{purpose}").shuffle(drawn)
    return drawn


def _wordy(task: Task, answer: str, rng: Random) -> str:
    if task.kind == "decline" and answer == REFUSAL:
        return rng.choice(WORDY_REFUSALS)
    return rng.choice(WORDY).format(answer.removesuffix("."))


def _demonstration(task: Task, world: World, rng: Random) -> str:
    manner = rng.choices(("brief", "wordy", "wrong"), (world.brief, world.wordy, world.wrong))[0]
    if manner == "brief":
        return task.answer
    if manner == "wordy":
        return _wordy(task, task.answer, rng)
    if task.kind != "decline" and rng.random() < WRONGLY_REFUSED:
        return rng.choice((REFUSAL, *WORDY_REFUSALS))
    # As often wordy as the right ones, so that length alone does not tell right from wrong.
    slip = rng.choice(task.slips)
    right = world.brief + world.wordy
    return _wordy(task, slip, rng) if right and rng.random() < world.wordy / right else slip


def demonstrations(world: World) -> list[dict[str, str]]:
    """Imperfect answers to learn from.

    Returns:
        Rows with ``instruction``, ``response`` and ``kind`` (of task: one of `grammar.KINDS`).
    """
    rng = Random(f"{world.seed}/faults")
    return [
        {"instruction": task.prompt, "response": _demonstration(task, world, rng), "kind": task.kind}
        for task in _draw(world, "train", world.demonstrations, "demonstrations")
    ]


def prompts(world: World, split: str) -> list[dict[str, str]]:
    """Instructions without answers, the kinds of task in equal parts.

    Returns:
        Rows with ``prompt`` and ``kind``; `gold_reward` needs nothing else.
    """
    if split not in ("train", "held_out"):
        raise UserError(f"the built-in world has the splits train and held_out, not {split!r}")
    part: Split = "train" if split == "train" else "held_out"
    count = world.prompts if part == "train" else world.held_out
    return [{"prompt": task.prompt, "kind": task.kind} for task in _draw(world, part, count, f"prompts/{part}")]


def rows(world: World, wanted: Wanted, split: str) -> list[dict[str, str]]:
    """Rows of the world, as a data module asks for them.

    Raises:
        UserError: a split that the world does not have, or what exists only once there is a policy.
    """
    if wanted == "demonstrations":
        if split != "train":
            raise UserError(
                f"data: the built-in world has demonstrations in the split train alone, not {split!r}: "
                "hold some of them out with data.validation_fraction"
            )
        return demonstrations(world)
    if wanted == "prompts":
        return prompts(world, split)
    if wanted == "pairs":
        raise UserError(
            "data: the built-in world's pairs are drawn from a policy's own samples: "
            "make a file with `python -m rlhf_lit playground --model RUN --to FILE` and name it here"
        )
    raise UserError(
        "data: the built-in world's ranked answers are a policy's own samples: make a file with "
        "`python -m rlhf_lit playground --model RUN --ranked true --to FILE` and name it here"
    )


def ranked_lists(prompts: Sequence[str], samples: Sequence[Sequence[str]], world: World) -> list[dict[str, Any]]:
    """How a noisy rater orders a policy's own samples: by gold/noise plus Gumbel noise (Plackett–Luce).

    Of any two samples she prefers the better one as often as the rater of ``preference_pairs`` does; samples of the
    same worth tie. Which of two comes first depends on the seed, the prompt and their worths, never on what else is in
    the list. A prompt whose samples are all worth the same is left out.

    Args:
        prompts: the instructions.
        samples: two or more responses to each, as text.
        world: its ``seed`` and ``noise``.

    Returns:
        Rows with ``prompt``, ``answers`` (each text once, blank ones left out) and ``ranks`` (0 is the best).
    """
    lists: list[dict[str, Any]] = []
    for prompt, responses in zip(prompts, samples, strict=True):
        distinct = sorted({response for response in responses if response.strip()})
        golds = gold_reward([prompt] * len(distinct), distinct)
        appeal = {gold: _appeal(prompt, gold, world) for gold in golds}
        order = sorted(appeal, key=lambda gold: -appeal[gold])
        if len(order) > 1:
            lists.append({"prompt": prompt, "answers": distinct, "ranks": [order.index(gold) for gold in golds]})
    return lists


def _appeal(prompt: str, gold: float, world: World) -> float:
    """What a rater orders answers of this worth by."""
    if not world.noise:
        return gold
    uniform = Random(f"{world.seed}/ranker/{prompt}\n{gold!r}").random()
    return gold / world.noise - math.log(-math.log(max(uniform, 1e-300)))


def preference_pairs(prompts: Sequence[str], samples: Sequence[Sequence[str]], world: World) -> list[dict[str, str]]:
    """What a noisy rater says about a policy's own samples.

    Every two different samples of a prompt that differ in gold reward make a pair; she is not shown two of the same
    worth. A label depends on the seed, the prompt and the two texts, never on what else is in the list. Pairs of one
    prompt stand together: split by prompt, not by row.

    Args:
        prompts: the instructions.
        samples: two or more responses to each, as text.
        world: its ``seed`` and ``noise``.

    Returns:
        Rows with ``prompt``, ``chosen`` and ``rejected``.
    """
    pairs: list[dict[str, str]] = []
    for prompt, responses in zip(prompts, samples, strict=True):
        distinct = sorted(set(responses))
        golds = gold_reward([prompt] * len(distinct), distinct)
        for (a, gold_a), (b, gold_b) in combinations(zip(distinct, golds, strict=True), 2):
            if gold_a == gold_b:
                continue
            rng = Random(f"{world.seed}/rater/{prompt}\n{a}\n{b}")
            better, worse = (a, b) if gold_a > gold_b else (b, a)
            odds = abs(gold_a - gold_b) / world.noise if world.noise else math.inf
            errs = rng.random() < 1.0 / (1.0 + math.exp(min(odds, 700.0)))
            chosen, rejected = (worse, better) if errs else (better, worse)
            pairs.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return pairs
