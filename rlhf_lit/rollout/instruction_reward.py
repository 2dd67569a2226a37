"""A reward for following instructions that a program can check: IFEval's."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any, Literal

from rlhf_lit.batches import Sequences
from rlhf_lit.errors import UserError
from rlhf_lit.rollout.rewards import shown
from rlhf_lit.rollout.verifiable import RuleReward, UnreadableGold


class InstructionReward(RuleReward):
    """How many of its row's instructions the response follows: IFEval's on length, case, keywords, format, language.

    Instructions and their arguments have IFEval's names (Zhou et al., 2311.07911): `length_constraints:number_words`
    with `{relation: at least, num_words: 300}`. What stands before `</think>` is not checked. Needs the extra
    `instructions`.

    Args:
        column: of the data row: a list of names of instructions.
        arguments: column with a table of arguments for each of them; nulls count as left out.
        scoring: `strict` checks the response as it is. `loose` also takes it without its first line, its last line or
            both, and without asterisks, as the paper does against false alarms.
        credit: the `fraction` of the instructions followed, or 1 where `all` are, else 0.

    Raises:
        UserError: the extra is not installed.
    """

    def __init__(
        self,
        column: str = "instruction_id_list",
        arguments: str = "kwargs",
        scoring: Literal["strict", "loose"] = "strict",
        credit: Literal["fraction", "all"] = "fraction",
    ) -> None:
        super().__init__()
        if missing := [name for name in ("if_verifiable", "langdetect", "nltk", "pysbd") if find_spec(name) is None]:
            raise UserError(
                f"reward: InstructionReward needs {', '.join(missing)}: pip install 'rlhf_lit[instructions]'"
            )
        self.column = column
        self.arguments = arguments
        self.scoring = scoring
        self.credit = credit

    def unreadable(self, row: dict[str, Any]) -> str | None:
        from rlhf_lit.rollout.ifeval_checks import problem

        try:
            instructions = self._instructions(row)
        except UnreadableGold as reason:
            return str(reason)
        return next((why for name, given in instructions if (why := problem(name, given))), None)

    def judge(self, sequences: Sequences, responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
        return [self._score(response, row) for response, row in zip(responses, rows, strict=True)]

    def _score(self, response: str, row: dict[str, Any]) -> float:
        from if_verifiable.common import evaluate_instructions

        from rlhf_lit.rollout.ifeval_checks import CHECKS

        if reason := self.unreadable(row):
            raise UserError(f"reward.column: {reason}; a row has {shown(row.get(self.column))}")
        names, arguments = zip(*self._instructions(row), strict=True)
        _, scores = evaluate_instructions(response, list(names), list(arguments), "", CHECKS)
        partial = scores.partial_strict if self.scoring == "strict" else scores.partial_loose
        return float(partial if self.credit == "fraction" else partial == 1)

    def _instructions(self, row: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
        """Names and arguments. Raises UnreadableGold."""
        for column in (self.column, self.arguments):
            if column not in row:
                raise UnreadableGold(f"no column {column!r}")
        names, arguments = row[self.column], row[self.arguments]
        if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) for name in names):
            raise UnreadableGold(f"{self.column} is no list of instructions")
        if not isinstance(arguments, list | tuple) or len(arguments) != len(names):
            raise UnreadableGold(f"{self.arguments} has not one entry for each instruction")
        if not all(isinstance(given, Mapping | None) for given in arguments):
            raise UnreadableGold(f"{self.arguments} has an entry that is no table")
        return [
            (name, {key: value for key, value in (given or {}).items() if value is not None})
            for name, given in zip(names, arguments, strict=True)
        ]
