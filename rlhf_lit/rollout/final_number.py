"""The number that a text ends in, and whether a gold answer is such a number and nothing else."""

from __future__ import annotations

import re
from decimal import Context, Decimal

_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_NUMBER = re.compile(
    rf"""
    (?:(?<![A-Za-z0-9_)\]}}%.])(?P<minus>-))?    # the minus of 16-3 is no sign
    [$€£¥]?
    (?<![A-Za-z0-9_^/])                          # no part of a word (m2), an exponent or a date
    (?P<number>(?:{_DIGITS}(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][-+]?[0-9]{{1,3}}(?![A-Za-z0-9]))?)
    (?:/(?P<denominator>[0-9]+(?:\.[0-9]+)?)(?![0-9/]))?
    """,
    re.VERBOSE,
)
_LATEX = (
    (re.compile(r"(?<=[0-9])\s*\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r" \1/\2"),  # a mixed number is two
    (re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}"), r"\1/\2"),
    (re.compile(r"\{,\}"), ","),  # 1{,}080
    (re.compile(r"\\[,!]"), ""),  # 1,\!080 and 1\,080
    (re.compile(r"\\\$"), "$"),
)
# Enough digits that fractions of different value do not meet; no trap matters, as exponents have three digits.
_DIVISION = Context(prec=50)


def final_number(text: str) -> Decimal | None:
    r"""The number a text ends in, exactly.

    It is the one number on the line of the last ``####`` (GSM8K's mark) or between the braces of the last
    ``\boxed{…}``, whichever comes later; several different numbers there are no answer, so that hedging earns nothing.
    A text without either mark answers with its last number.

    ``1,080``, ``$18``, ``-5``, ``−5``, ``.5``, ``1e3`` and ``72.`` are numbers; a currency sign, a percent sign and a
    unit are left aside (``50%`` is 50). ``1/2`` and ``\frac{1}{2}`` are their quotient, to 50 digits; a mixed number
    (``1 1/2``) is two. The decimal mark is the point, the comma groups thousands.

    Returns:
        The number, or None where the text has no answer.
    """
    text = _without_latex(text)
    marked = marked_answer(text)
    numbers = [_value(match) for match in _NUMBER.finditer(text if marked is None else marked)]
    if marked is not None and len(set(numbers)) > 1:
        return None
    return numbers[-1] if numbers else None


def _without_latex(text: str) -> str:
    text = text.replace("−", "-")
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text


def marked_answer(text: str) -> str | None:
    """What stands in the place that a mark gives to the answer; None without a mark."""
    hashes, box = text.rfind("####"), text.rfind(r"\boxed{")
    if hashes < 0 and box < 0:
        return None
    if hashes > box:
        return text[hashes + len("####") :].strip().partition("\n")[0]
    inside = text[box + len(r"\boxed{") :]
    depth = 1
    for i, letter in enumerate(inside):
        depth += (letter == "{") - (letter == "}")
        if depth == 0:
            return inside[:i]
    return inside


def _value(match: re.Match[str]) -> Decimal | None:
    number = Decimal((match["minus"] or "") + match["number"].replace(",", ""))
    if match["denominator"] is None:
        return number
    denominator = Decimal(match["denominator"])
    return _DIVISION.divide(number, denominator) if denominator else None


_WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
_MARKUP = (
    (re.compile(r"<<[^<>]*>>"), ""),  # GSM8K's calculator
    (re.compile(r"\\[()\[\]]|\\ |\\[;:]|~|`|\*\*"), " "),
    (re.compile(r"\\%"), "%"),
    (re.compile(r"\^\{?\\circ\}?"), "°"),
    # The square or cube of a unit is no exponent of the number: 5 cm^2.
    (
        re.compile(r"(?<![A-Za-z\\])(mm|cm|dm|m|km|in|ft|yd|mi|inches|feet|units?)\s*(?:\^\s*)?\{?[23]\}?(?![0-9])"),
        r"\1",
    ),
)
_ALTERNATIVES = re.compile(r"\b(?:or|and)\b|[,;](?![0-9]{3})|±|\\pm|\n")
_STATES = re.compile(r"=|(?<![0-9]):|\b(?:is|are|was|were|equals?|makes)\b")
_SYMBOLS = re.compile(r"[\\^_()\[\]{}+*<>|=√π∞±×÷≤≥≠≈∈∪∩∠!]|(?<![A-Za-z])-|-(?![A-Za-z])|/(?![A-Za-z])")
_FUNCTIONS = re.compile(
    r"\b(?:pi|sqrt|root|log|ln|sin|cos|tan|or|to|infinity|factorial|"
    r"dozen|hundred|thousand|million|billion|trillion|half|halves|thirds?|quarters?)\b",
    re.IGNORECASE,
)
_CALL = re.compile(r"(?:_\{?\w+\}?)|\(\s*-?[\w.,\s]*\)")  # behind a name: a_3, f(2)
_NAME = re.compile(r"[A-Za-z]\w*\s*=")
_LONE_LETTER = re.compile(r"(?<![A-Za-z])[A-Za-z](?![A-Za-z])")
_UNIT_LETTERS = frozenset("mghsLlCFKNJWVA")


def gold_number(text: str) -> Decimal | None:
    """The number that a gold answer is, where it is plainly one.

    The answer is what a mark names (see ``final_number``), else the last line's last sentence, of which what follows
    its last `=`, `is` or colon counts. Words and a unit may stand beside the number; a second number, an operator, a
    root, a power, an interval, an unknown or a word that multiplies it may not: of ``3√13``, ``(3,4]``,
    ``x=5 or x=6``, ``2x`` and ``3 million`` the last number is not the answer.

    Returns:
        The number, or None where the answer is not plainly one.
    """
    marked = marked_answer(_without_latex(text))
    answer = text if marked is None else marked
    for pattern, plain in _MARKUP[:2]:
        answer = pattern.sub(plain, answer)
    answer = _WRAPPED.sub(r" \1 ", _without_latex(answer))
    for pattern, plain in _MARKUP[2:]:
        answer = pattern.sub(plain, answer)
    if marked is None:
        lines = [line.strip() for line in answer.splitlines() if line.strip()] or [""]
        if len(lines) > 1 and (name := _NAME.match(lines[-1])) and lines[-2].startswith(name[0]):
            return None  # x=5, and x=6 on another line
        answer = re.split(r"(?<=[.!?])\s+", lines[-1])[-1]
    answer = answer.strip().removesuffix("!" if re.search(r"[A-Za-z]", answer) else "")
    stated = _stated(answer)
    if stated is None:
        return None
    found = list(_NUMBER.finditer(stated))
    if len(found) != 1:
        return None
    (match,) = found
    before, after = stated[: match.start()], stated[match.end() :]
    if before.endswith("(") and after.startswith(")"):  # (-5)
        before, after = before[:-1], after[1:]
    rest = f"{before} {after}"
    if re.search(r"[0-9]", rest) or _SYMBOLS.search(rest) or _FUNCTIONS.search(rest):
        return None
    if any(letter not in _UNIT_LETTERS for letter in _LONE_LETTER.findall(after)) or re.match("k(?![A-Za-z])", after):
        return None
    return _value(match)


def _stated(answer: str) -> str | None:
    """What the answer says the number is: behind its last `=`, `is` or colon. None where it says several things, or
    something of an expression rather than of one name."""
    parts = _STATES.split(answer)
    if len(parts) == 1:
        return answer
    if len(parts) > 2 and _ALTERNATIVES.search(answer):
        return None  # x=5 or x=6
    first = parts[0]
    if _LONE_LETTER.search(first) and (_SYMBOLS.search(_CALL.sub("", first)) or re.search(r"[0-9][A-Za-z]|-", first)):
        return None  # 2x = 5, x - y = 5
    return parts[-1]
