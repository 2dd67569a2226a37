"""The shape of a file's rows: which columns hold the prompt, the answers, and what says which of them is better.

It is found once, by the majority of the first rows, with the columns that the user names before all others; a row of
another shape is then one bad row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlhf_lit.data import columns as c
from rlhf_lit.data.columns import Column, Columns, slot
from rlhf_lit.data.messages import (
    begins_before_the_answer,
    check_alternation,
    check_prompt,
    history,
    holds_messages,
    parse_dialogue,
)
from rlhf_lit.data.messages import messages as messages_of
from rlhf_lit.data.messages import tools as tools_of
from rlhf_lit.data.rows import Message, Row, Turns, checked_text, optional_text
from rlhf_lit.data.sources import Source
from rlhf_lit.data.trees import is_tree
from rlhf_lit.data.verdicts import GIVERS, Verdict, verdict_by, verdict_of
from rlhf_lit.errors import UserError

FIRST_ROWS = 10_000  # of a file, by which its shape is found

Form = Literal["chat", "answer", "pair", "versus", "list", "text", "prompt"]
"""A conversation; prompt and answer; chosen and rejected; two answers and a verdict; a list of answers; raw text; a
prompt alone."""


@dataclass(frozen=True)
class Shape:
    """Which column holds which part of a row.

    Attributes:
        form: what a row is, on the whole.
        parts: our name → its column.
        prompt: the column of the prompt, text or messages; None where the answers are whole dialogues.
        answer: that of the answer, of the chosen one, of the first one, of the list, or of the text.
        other: that of the rejected answer, or of the second one.
        verdict: reads which of two answers won.
    """

    form: Form
    prompt: Column | None = None
    answer: Column | None = None
    other: Column | None = None
    verdict: Verdict | None = None
    parts: Mapping[str, Column] = field(default_factory=dict)

    @property
    def core(self) -> tuple[Column, ...]:
        """The columns without which a row does not have this shape."""
        verdict = self.verdict.column if self.verdict is not None else self.parts.get("verdict")
        return tuple(part for part in (self.prompt, self.answer, self.other, verdict) if part is not None)

    @property
    def sources(self) -> frozenset[str]:
        """The file's columns that are read."""
        found = {name for part in (*self.core, *self.parts.values()) for name in part.sources}
        return frozenset(found.union(GIVERS if self.verdict is not None and self.verdict.by_giver else ()))

    def system(self, row: Row) -> Turns:
        """The turn of the ``system`` column, where there is text in it. Raises BadRow."""
        column = self.parts.get("system")
        text = optional_text(column.of(row), column.name) if column is not None else ""
        return (Message("system", text),) if text else ()

    def behind_system(self, turns: Turns, row: Row) -> Turns:
        """The turns behind that of the ``system`` column, unless they begin with the same one. Raises BadRow."""
        system = self.system(row)
        return turns if turns[:1] == system else system + turns

    def tools(self, row: Row) -> tuple[Any, ...]:
        """The tools that the row's conversation may call. Raises BadRow."""
        column = self.parts.get("tools")
        return tools_of(column.of(row), column.name) if column is not None else ()

    def messages(self, column: Column, row: Row) -> Turns:
        """The turns of a column of messages, behind the system turn. Raises BadRow."""
        found = self.behind_system(messages_of(column.of(row), column.name), row)
        check_alternation(found)
        return found

    def prompt_turns(self, row: Row) -> Turns:
        """The turns of the column that holds the prompt, with those of the columns beside it. Raises BadRow."""
        assert self.prompt is not None
        column = self.prompt
        value = column.of(row)
        if column.name in c.CHAT or holds_messages(value):
            return self.messages(column, row)
        prompt = checked_text(value, column.name)
        before: Turns = ()
        if "system" in self.parts:
            before = self.system(row)
        if "history" in self.parts:
            earlier = self.parts["history"]
            before += history(earlier.of(row), earlier.name)
        dialogue = parse_dialogue(prompt)
        if dialogue is not None and dialogue[0].role == "user" and dialogue[-1] == Message("assistant", ""):
            return before + dialogue[:-1]
        if "input" in self.parts:
            extra = self.parts["input"]
            if given := optional_text(extra.of(row), extra.name):
                prompt = f"{prompt}\n\n{given}"
        turn = Message("user", prompt)
        return (*before, turn) if before else (turn,)

    def checked_prompt(self, row: Row) -> Turns:
        """:meth:`prompt_turns`, which end with something to answer. Raises BadRow."""
        found = self.prompt_turns(row)
        check_prompt(found)
        return found


Candidates = Callable[[Mapping[str, Column]], Iterator[Shape]]
"""The shapes that rows with these columns can have, the likeliest first."""


@dataclass(frozen=True)
class RecordKind:
    """A kind of record, as far as a file must have what makes one.

    Attributes:
        wanted: in words, with the known shapes.
        candidates: the shapes that serve.
        needs: our names whose mapping must have a part in the shape that is found.
        beside: our names for columns that are read beside the core.
        judges: a column that may say which of two answers is better must not be passed over.
        word: between "no known shape" and ``wanted``.
    """

    wanted: str
    candidates: Candidates
    needs: Collection[str]
    beside: Collection[str] = ()
    judges: bool = True
    word: str = "of"


def first_rows(rows: Sequence[Any]) -> list[Any]:
    """Those that a shape is found by."""
    return list(rows[:FIRST_ROWS])


def columns_of(rows: Sequence[Any]) -> dict[str, None]:
    """The columns of the rows, in the order of their first appearance."""
    return dict.fromkeys(column for row in rows if isinstance(row, Mapping) for column in row)


def find_shape(rows: Sequence[Any], source: Source, kind: RecordKind) -> Shape:
    """The shape of a file of these first rows.

    Raises:
        UserError: no known shape, a mapping that does not fit, or a verdict that would be passed over or cannot be
            read.
    """
    found = columns_of(rows)
    columns = Columns.of(source, found)
    records = [row for row in rows if isinstance(row, Mapping)]
    shape = _elected(records, columns, kind)
    if shape is None:
        _refuse(found, columns, source, kind, rows)
        raise AssertionError("unreachable")
    here = columns.available(found)
    read = {column.source for column in shape.core}
    beside = {name: here[name] for name in kind.beside if name in here and here[name].source not in read}
    if not _asks_in_one_text(shape, records):  # what stands beside the text of a prompt has no place
        beside = {name: column for name, column in beside.items() if name not in ("input", "history")}
    shape = replace(shape, parts={**shape.parts, **beside})
    _check_mapped(shape, columns, source, kind)
    if shape.form == "versus":
        return replace(shape, verdict=_verdict(shape, columns, records, source))
    if shape.form == "pair" and kind.judges and not columns.no_verdict:
        _refuse_passing_over(shape, columns, found, source)
    return shape


def _asks_in_one_text(shape: Shape, records: Sequence[Row]) -> bool:
    """Whether prompts are the text of one turn, by the first row that has one: not messages, a dialogue, or what the
    answers begin with."""
    if shape.prompt is None or shape.prompt.name in c.CHAT:
        return False
    columns = [column for column in (shape.prompt, shape.answer, shape.other) if column is not None]
    row = next((row for row in records if all(row.get(name) for one in columns for name in one.sources)), None)
    if row is None or shape.prompt.pieces:
        return True
    prompt, *answers = (row.get(column.source) for column in columns)
    if holds_messages(prompt) or (isinstance(prompt, str) and parse_dialogue(prompt) is not None):
        return False
    return shape.form not in ("pair", "versus") or not any(map(begins_before_the_answer, answers))


def _elected(records: Sequence[Row], columns: Columns, kind: RecordKind) -> Shape | None:
    """The shape that most rows have by the columns in which they have something; by their columns, where none has."""
    for filled in (True, False):
        sets = Counter(
            frozenset(name for name, value in row.items() if value is not None and value != "")
            if filled
            else frozenset(row)
            for row in records
        )
        votes: Counter[tuple[Any, ...]] = Counter()
        shapes: dict[tuple[Any, ...], Shape] = {}
        for present, count in sets.items():
            shape = _likeliest(columns.available(present), kind)
            if shape is not None:
                key = (shape.form, shape.core)
                shapes.setdefault(key, shape)
                votes[key] += count
        if votes:
            return shapes[votes.most_common(1)[0][0]]
    return None


def _likeliest(here: Mapping[str, Column], kind: RecordKind) -> Shape | None:
    """Of the candidates, the one with the most columns that the user named."""
    candidates = list(kind.candidates(here))
    if not candidates:
        return None
    return max(candidates, key=lambda shape: sum(column.mapped for column in shape.core))


def versus_of(here: Mapping[str, Column], prompt: Column | None) -> Iterator[Shape]:
    """Two answers with a verdict: mapped, or named as files name them."""
    names = (name for name in c.VERDICTS if name in here and (name == "verdict" or not here[name].mapped))
    verdict = next((here[name] for name in names), None)
    if verdict is None:
        return
    asked = verdict.name == "verdict" and verdict.mapped
    pairs = [("first", "second"), *([c.PAIR] if asked else []), *c.ANSWERS_OF_TWO]
    fitting = [(here[one], here[two]) for one, two in pairs if one in here and two in here]
    if len(fitting) == 1 or (fitting and all(column.mapped for column in fitting[0])):
        one, two = fitting[0]
        yield Shape("versus", prompt, one, two, parts={"verdict": verdict})


def _verdict(shape: Shape, columns: Columns, records: Sequence[Row], source: Source) -> Verdict:
    column = shape.parts["verdict"]
    if columns.codes is not None:
        return verdict_by(column, columns.codes, source.path)
    assert shape.answer is not None
    assert shape.other is not None
    return verdict_of(column, (shape.answer, shape.other), records, source.path, column.mapped)


def _check_mapped(shape: Shape, columns: Columns, source: Source, kind: RecordKind) -> None:
    """A column that the user named must be read."""
    used = {column.name for column in shape.core} | set(shape.parts)
    for name in columns.mapped:
        if name in kind.needs and name not in used:
            raise UserError(
                f"{source.path}: columns names '{name}', which has no part in rows of "
                f"{' + '.join(column.source for column in shape.core)}; leave it out, or name the other columns too"
            )


def _refuse_passing_over(shape: Shape, columns: Columns, found: Collection[str], source: Source) -> None:
    taken = {column.source for column in shape.core} | columns.taken
    for name in c.VERDICTS:
        if name in found and name not in taken:
            assert shape.answer is not None
            assert shape.other is not None
            raise UserError(
                f"{source.path}: '{name}' beside '{shape.answer.source}' and '{shape.other.source}' may say which of "
                f"them is better: say how by columns.verdict: {{column: {name}, first: 1, second: 2}} with the file's "
                "values, or that it does not by columns.verdict: null"
            )


def _refuse(found: Collection[str], columns: Columns, source: Source, kind: RecordKind, rows: Sequence[Any]) -> None:
    shown = ", ".join(sorted(map(str, found))) or "(none)"
    here = columns.available(found)
    if next(ranked(here), None) is not None or any(map(is_tree, rows)):
        raise UserError(
            f"{source.path}: columns {shown} are ranked lists of answers, which RankingDataModule reads for a "
            f"RewardModel; here {kind.wanted} are needed"
        )
    raise UserError(
        f"{source.path}: columns {shown} have no known shape {kind.word} {kind.wanted}; "
        "name them in `columns`, e.g. {prompt: question}"
    )


def ranked(here: Mapping[str, Column]) -> Iterator[Shape]:
    """A prompt with a list of answers, and what says which are better."""
    for shape in lists(here):
        assert shape.answer is not None
        name = shape.answer.name
        if name in ("ranked", "completions") or here.keys() & {"ranks", "scores"}:
            yield shape


def lists(here: Mapping[str, Column]) -> Iterator[Shape]:
    """A prompt with a list of answers."""
    prompt, answers = slot((*c.PROMPT, *c.CHAT), here), slot(c.LISTS, here)
    if prompt is not None and answers is not None:
        yield Shape("list", prompt, answers)


def answer(here: Mapping[str, Column]) -> Iterator[Shape]:
    """A prompt with one answer."""
    prompt, one = slot((*c.PROMPT, *c.CHAT), here), slot(c.ANSWER, here)
    if prompt is not None and one is not None:
        yield Shape("answer", prompt, one)


def chat(here: Mapping[str, Column]) -> Iterator[Shape]:
    """A whole conversation."""
    column = slot(c.CHAT, here)
    if column is not None:
        yield Shape("chat", column)


def two_answers(here: Mapping[str, Column]) -> Iterator[Shape]:
    """Two answers of which one is better, with their prompt or as whole dialogues."""
    prompt = slot((*c.PROMPT, *c.CHAT), here)
    found = list(versus_of(here, prompt))
    yield from found
    if not any(column.mapped for shape in found for column in shape.core[-1:]) and here.keys() >= {*c.PAIR}:
        yield Shape("pair", prompt, here["chosen"], here["rejected"])


def raw_text(here: Mapping[str, Column]) -> Iterator[Shape]:
    """Text without a prompt."""
    if "text" in here:
        yield Shape("text", None, here["text"])
