"""Message trees of OpenAssistant, as the ranked lists of answers that are in them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf_lit.data.rows import Row


def is_tree(row: Any) -> bool:
    """Whether a row is a message tree of OpenAssistant: its prompt is a message with replies."""
    return isinstance(row, Mapping) and isinstance(row.get("prompt"), Mapping) and "replies" in row["prompt"]


def lists_of_tree(row: Row) -> list[dict[str, Any]]:
    """A row ``{prompt, answers, ranks}`` for each message of a tree to which two or more ranked answers were given.

    The prompt is the path of messages that leads to them. A reply without a rank is left out. Where there is no such
    message, one row without answers is returned, so that the tree is counted.
    """
    found: list[dict[str, Any]] = []

    def visit(message: Any, path: list[dict[str, Any]]) -> None:
        if not isinstance(message, Mapping):
            return
        here = [*path, {"role": message.get("role"), "content": message.get("text")}]
        replies = message.get("replies") or []
        replies = [reply for reply in replies if isinstance(reply, Mapping)] if isinstance(replies, list) else []
        ranked = [reply for reply in replies if reply.get("role") == "assistant" and reply.get("rank") is not None]
        if len(ranked) >= 2:
            texts, ranks = [reply.get("text") for reply in ranked], [reply["rank"] for reply in ranked]
            found.append({"prompt": here, "answers": texts, "ranks": ranks})
        for reply in replies:
            visit(reply, here)

    visit(row["prompt"], [])
    return found or [{"prompt": None, "answers": [], "ranks": []}]
