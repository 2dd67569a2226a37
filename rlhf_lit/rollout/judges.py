"""Rewards that another library's code decides: in worker processes, within a time limit."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

from rlhf_lit.errors import UserError, say
from rlhf_lit.rollout.killable import Failure, KillablePool
from rlhf_lit.rollout.rewards import shown

MOST_WORKERS = 4


class Judges:
    """Worker processes that judge responses; one that takes too long over a response is killed.

    Args:
        function: `module:name` of the function that judges: of a response and something of JSON values.
        reward: the class it is for, in messages.
        seconds: how long it may take over one response.
        workers: processes; null is one for each core, ``MOST_WORKERS`` at most.

    Attributes:
        lost: responses so far whose judge took too long or died.

    Raises:
        UserError: a limit or a number of workers that is not positive.
    """

    def __init__(self, function: str, reward: str, seconds: float, workers: int | None) -> None:
        if not 0 < seconds < math.inf:
            raise UserError(f"reward.seconds must be greater than 0 and finite, not {seconds}")
        if workers is not None and workers < 1:
            raise UserError(f"reward.workers must be at least 1 or null, not {workers}")
        self.reward = reward
        self.seconds = seconds
        self.pool = KillablePool(function, workers or min(MOST_WORKERS, os.cpu_count() or 1))
        self.lost = 0

    def __call__(self, responses: list[str], others: Sequence[Any]) -> list[Any | None]:
        """What the function says of each response; None where it raised, or was lost.

        Lost ones are said at the 1st, 10th, 100th, ….
        """
        results = self.pool.map(list(zip(responses, others, strict=True)), self.seconds)
        for response, result in zip(responses, results, strict=True):
            if isinstance(result, Failure) and result.lost:
                self.lost += 1
                if math.log10(self.lost).is_integer():
                    say(
                        f"note: reward: {self.reward}: judging the response {shown(response)}: {result.reason}; it "
                        f"counts as wrong ({self.lost} so far)",
                        every_rank=True,
                    )
        return [None if isinstance(result, Failure) else result for result in results]
