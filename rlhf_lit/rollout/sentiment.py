"""Sentiment of a text, as a reward: configs name `rlhf_lit.rollout.sentiment.vader`."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any

from rlhf_lit.errors import UserError


@cache
def _analyzer() -> Any:
    if find_spec("vaderSentiment") is None:
        raise UserError("reward.function: vader needs vaderSentiment: pip install 'rlhf_lit[sentiment]'")
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """VADER's compound sentiment of each response, from −1 to 1 (Hutto and Gilbert 2014).

    Raises:
        UserError: the extra `sentiment` is not installed.
    """
    return [float(_analyzer().polarity_scores(response)["compound"]) for response in responses]
