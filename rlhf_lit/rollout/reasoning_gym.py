"""A reward for the tasks of `reasoning-gym`: the score of the task's own program."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from rlhf_lit.batches import Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.rollout.judges import Judges
from rlhf_lit.rollout.rewards import shown
from rlhf_lit.rollout.verifiable import RuleReward, UnreadableGold


class ReasoningGymReward(RuleReward):
    """The score, from 0 to 1, that the row's task of `reasoning-gym` gives to the response.

    Rows are those of a source `reasoning-gym:TASK`, or of a file with the library's own `answer` and `metadata`, whose
    `source_dataset` names the task. The answer is what stands in the response's last `<answer>…</answer>`, else the
    whole response. Some tasks give a little for any answer. Needs the extra `tasks`.

    Args:
        seconds: how long scoring one response may take, in a process that is then killed; it counts as 0, as does an
            answer that the task's program breaks off on.
        workers: processes that score; null is one for each core, four at most.

    Raises:
        UserError: the extra is not installed, or a limit or a number of workers is not positive.
    """

    def __init__(self, seconds: float = 10.0, workers: int | None = None) -> None:
        super().__init__()
        if find_spec("reasoning_gym") is None:
            raise UserError("reward: ReasoningGymReward needs reasoning-gym: pip install 'rlhf_lit[tasks]'")
        self.judges = Judges("rlhf_lit.rollout.reasoning_gym_score:score", "ReasoningGymReward", seconds, workers)

    def unreadable(self, row: dict[str, Any]) -> str | None:
        try:
            self._entry(row)
        except UnreadableGold as reason:
            return str(reason)
        return None

    def judge(self, sequences: Sequences, responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        entries = []
        for row in rows:
            try:
                entries.append(self._entry(row))
            except UnreadableGold as reason:
                raise UserError(f"reward: {reason}; a row has {shown(row.get('metadata'))}") from reason
        return [0.0 if score is None else float(score) for score in self.judges(responses, entries)]

    def _entry(self, row: dict[str, Any]) -> dict[str, Any]:
        """What the task's program reads. Raises UnreadableGold."""
        from reasoning_gym.factory import DATASETS

        metadata = row.get("metadata")
        if isinstance(metadata, str):
            try:
                metadata = json.loads(metadata)
            except json.JSONDecodeError:
                raise UnreadableGold("metadata is not JSON") from None
        if not isinstance(metadata, Mapping) or "answer" not in row:
            raise UnreadableGold("no answer and metadata of reasoning-gym")
        if metadata.get("source_dataset") not in DATASETS:
            raise UnreadableGold("metadata names no task of reasoning-gym in source_dataset")
        return {"question": row.get("question"), "answer": row["answer"], "metadata": dict(metadata)}
