"""What MathReward's worker processes run: math-verify's parser and its comparison, without their own time limits.

Imported by the workers alone, and without torch, so that they start in a second.
"""

from __future__ import annotations

import logging
import re
from functools import lru_cache
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

from rlhf_lit.rollout.final_number import marked_answer

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time limits are off

_MATHEMATICS = re.compile(r"\$|\\\(|\\\[|\\boxed")
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[\s'-]+[^\W\d_]+)*[.!]?")


def equal(response: str, gold: str) -> bool:
    """Whether the response's answer is the gold one."""
    return bool(verify(_gold(gold), _answer(response), timeout_seconds=None))


def readable(gold: str) -> bool:
    """Whether there is mathematics in a gold answer."""
    return bool(_gold(gold))


@lru_cache(maxsize=4096)
def _gold(gold: str) -> list[Any]:
    """What a gold answer says: behind its `####`, in its box or its dollar signs, else the whole of it as LaTeX."""
    if "####" in gold:
        gold = marked_answer(gold) or ""
    gold = gold.strip()
    if not _MATHEMATICS.search(gold):
        if _WORDS.fullmatch(gold):  # would be the product of its letters
            return []
        gold = f"${gold}$"
    return _parsed(gold)


def _answer(response: str) -> list[Any]:
    if response.rfind("####") > response.rfind(r"\boxed"):
        answer = marked_answer(response) or ""
        return _parsed(answer if _MATHEMATICS.search(answer) else f"${answer}$")
    return _parsed(response)


def _parsed(text: str) -> list[Any]:
    kinds = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())
    # Without a fallback, which compares what cannot be parsed as text.
    return list(parse(text, kinds, fallback_mode="no_fallback", parsing_timeout=None))
