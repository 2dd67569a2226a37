"""Rows of JSON: lines, the elements of an array, and lists inside of objects.

A row that JSON allows and nobody can use (nested without end, half a character, a number of thousands of digits) is
``Unreadable`` in its place. Text that is no JSON ends the reading with its line.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from rlhf_lit.data.rows import Unreadable
from rlhf_lit.errors import UserError

DEPTH = 100  # of lists and objects inside of each other; what writes rows out again recurses, too
TOO_DEEP = Unreadable("nested too deep")
LONE_SURROGATE = Unreadable("lone surrogate")
TOO_LONG = Unreadable("number of too many digits")

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BRACKETS = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}]', re.DOTALL)
_SCALAR = re.compile(r"[^\s,\]]*")
_SPACE = re.compile(r"[ \t\r\n]*")
_decode = json.JSONDecoder().raw_decode


class Line(NamedTuple):
    """A line of a JSON Lines file that is yet to be parsed, by whichever process needs the row.

    Attributes:
        file: as messages name it.
        number: of the line, from 1.
        content: its bytes.
    """

    file: str
    number: int
    content: bytes

    def parse(self, as_a_row: bool = True) -> Any:
        """The row.

        Args:
            as_a_row: look at its text as well; not where rows inside of it are looked at one by one.

        Raises:
            UserError: no UTF-8, or no JSON.
        """
        try:
            text = self.content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.file}, line {self.number}: not UTF-8 text (its byte {error.start} cannot be decoded)"
            ) from error
        try:
            value = json.loads(text)
            return _usable(value, text, 0, len(text)) if as_a_row else value
        except json.JSONDecodeError as error:
            raise UserError(
                f"{self.file}, line {self.number}: not valid JSON ({error.msg}); the file must be a list of objects, "
                "or one object per line"
            ) from error
        except RecursionError:
            return TOO_DEEP
        except ValueError:  # Python refuses integers of more than some thousand digits
            return TOO_LONG

    def is_whole(self) -> bool:
        """Whether it is JSON by itself."""
        try:
            self.parse()
        except UserError:
            return False
        return True


def array(text: str, file: str) -> Iterator[Any]:
    """The elements of a JSON array, one after the other.

    Raises:
        UserError: it is not valid JSON.
    """

    def fault(place: int, what: str) -> UserError:
        return UserError(f"{file}, line {text.count(chr(10), 0, place) + 1}: not valid JSON ({what})")

    opening = _after_space(text, 0)
    if not text.startswith("[", opening):
        raise fault(opening, "Expecting value")
    place = _after_space(text, opening + 1)
    closed = text.startswith("]", place)
    while not closed:
        try:
            value, end = _decode(text, place)
            value = _usable(value, text, place, end)
        except json.JSONDecodeError as error:
            raise fault(error.pos, error.msg) from error
        except (RecursionError, ValueError) as error:
            value = TOO_DEEP if isinstance(error, RecursionError) else TOO_LONG
            end, _ = _extent(text, place)
        yield value
        place = _after_space(text, end)
        closed = text.startswith("]", place)
        if not closed:
            if not text.startswith(",", place):
                raise fault(place, "Expecting ',' delimiter" if place < len(text) else "the list is never closed")
            place = _after_space(text, place + 1)
    rest = _after_space(text, place + 1)
    if rest < len(text):
        raise fault(rest, "Extra data")


def whole(text: str, file: str) -> Any:
    """The one value of a whole file.

    Raises:
        UserError: it is not valid JSON, or cannot be used as a whole.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}, line {error.lineno}: not valid JSON ({error.msg})") from error
    except RecursionError as error:
        raise UserError(f"{file}: {TOO_DEEP.reason}") from error
    except ValueError as error:
        raise UserError(f"{file}: {TOO_LONG.reason}") from error


def nested(rows: Iterable[Any], path: str, file: str) -> Iterator[Any]:
    """The rows that stand in lists inside of others, such as ``{"examples": [{…}, {…}]}``. Texts and numbers beside
    such a list belong to each of its rows, as ``../name``.

    Args:
        rows: what the file has; one that has no such list is unreadable.
        path: keys on the way to a list, with dots between; a list on the way stands for each of its elements.
        file: as messages name it.

    Raises:
        UserError: the first row has no such list.
    """
    for number, row in enumerate(rows):
        if isinstance(row, Unreadable):
            yield row
            continue
        try:
            found = list(_inside(row, tuple(path.split(".")), {}))
        except LookupError as error:
            if number == 0:
                raise UserError(f"{file}: columns.rows: there is no list of rows at '{path}': {error}") from error
            yield Unreadable(f"no list at {path}")
            continue
        yield from map(_usable_inside, found)


def _inside(value: Any, path: tuple[str, ...], around: dict[str, Any]) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            if path:
                yield from _inside(item, path, around)
            else:
                yield {**around, **item} if around and isinstance(item, Mapping) else item
    elif path and isinstance(value, Mapping):
        if path[0] not in value:
            raise LookupError(f"the keys are {', '.join(map(str, value)) or 'none'}")
        beside = {f"../{key}": item for key, item in value.items() if isinstance(item, str | int | float)}
        yield from _inside(value[path[0]], path[1:], {**{f"../{key}": item for key, item in around.items()}, **beside})
    else:
        raise LookupError(f"found {type(value).__name__} on the way")


def _usable_inside(value: Any) -> Any:
    """A value, or why it cannot be used, of what has been parsed together with others."""
    try:
        text = json.dumps(value, default=str)
    except RecursionError:
        return TOO_DEEP
    return _usable(value, text, 0, len(text))


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None
    return match.end()


def _usable(value: Any, text: str, start: int, end: int) -> Any:
    """The value of ``text[start:end]``, or why it cannot be used."""
    brackets = text.count("[", start, end) + text.count("{", start, end)
    if brackets > DEPTH and _extent(text, _after_space(text, start))[1] > DEPTH:
        return TOO_DEEP
    if _SURROGATE.search(text, start, end) and _has_lone_surrogate(value):
        return LONE_SURROGATE
    return value


def _has_lone_surrogate(value: Any) -> bool:
    """Whether some text of it, or a key, has half of a character that takes two, which no file can hold."""
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode("utf-8")
    except UnicodeEncodeError:
        return True
    return False


def _extent(text: str, start: int) -> tuple[int, int]:
    """Where the value that begins at ``start`` ends, and how deep it is nested, without recursion."""
    if text[start] not in "[{":
        match = _SCALAR.match(text, start)
        assert match is not None
        return match.end(), 0
    depth = deepest = 0
    for match in _BRACKETS.finditer(text, start):
        if match[0] in ("[", "{"):
            depth += 1
            deepest = max(deepest, depth)
        elif match[0] in ("]", "}"):
            depth -= 1
            if depth == 0:
                return match.end(), deepest
    return len(text), deepest
