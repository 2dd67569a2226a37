"""Sentiment of a text, as a reward: configs name `experiments.controlled_sentiment.sentiment.vader`."""

from __future__ import annotations

from functools import cache
from typing import Any


@cache
def _analyzer() -> Any:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

    return SentimentIntensityAnalyzer()


def vader(prompts: list[str], responses: list[str], rows: list[dict[str, Any]]) -> list[float]:
    """VADER's compound sentiment of each response, from −1 to 1 (Hutto and Gilbert 2014)."""
    return [float(_analyzer().polarity_scores(response)["compound"]) for response in responses]
