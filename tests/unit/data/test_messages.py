"""Messages as files write them: tool use, roles, parts, earlier turns, and turns that are not learned."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rlhf_lit.data.records import (
    Demonstration,
    Message,
    Source,
    demonstrations,
    judged,
    preferences,
    prompts,
    rankings,
)

ASK = {"role": "user", "content": "Rain?"}
SAY = {"role": "assistant", "content": "Yes."}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def read(*rows: Any, **columns: Any) -> list[Demonstration]:
    return demonstrations(rows, Source("rows.jsonl", columns=columns), on_bad_row="error")[0]


def reason(row: dict[str, Any], reader: Any = demonstrations) -> str:
    """Why a row is bad, beside a good one of the same shape."""
    good = {"messages": [ASK, SAY], "prompt": "q", "completion": "a"}
    _, report = reader([{name: good[name] for name in row if name in good}, row], Source("r"), on_bad_row="skip")
    (found,) = report.counts
    return str(found)


# --- tool use --------------------------------------------------------------------------------------------------------


def test_calls_and_their_results() -> None:
    result = {"role": "tool", "content": "rain", "tool_call_id": "1", "name": "weather"}
    called = {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Look it up."}
    (record,) = read({"messages": [ASK, called, result, {**result, "content": "wind"}, SAY], "tools": [TOOL]})
    assert record.tools == (TOOL,)
    ask, call, first, second, say = record.messages
    assert (ask, say) == (Message("user", "Rain?"), Message("assistant", "Yes."))
    assert call == Message("assistant", "", (CALL,), extra={"reasoning_content": "Look it up."})
    assert first == Message("tool", "rain", extra={"tool_call_id": "1", "name": "weather"})
    assert second.content == "wind"


@pytest.mark.parametrize("arguments", [{"city": "Ulm"}, '{"city": "Ulm"}'])
def test_arguments_are_an_object_however_they_are_written(arguments: Any) -> None:
    """Templates write them as JSON, which of a text would be JSON in JSON."""
    function = {"name": "weather", "arguments": arguments}
    for turn in (
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "assistant", "content": None, "function_call": function},
        {"from": "function_call", "value": json.dumps(function)},
    ):
        (record,) = read({"messages": [ASK, turn]})
        assert record.messages[-1] == Message("assistant", "", (CALL,))


def test_calls_of_other_text_stay_text() -> None:
    for value in ("weather(Ulm)", '{"name": "weather"}', "[]", "3", '{"name": '):
        (record,) = read(
            {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": value}]}
        )
        assert record.messages[-1] == Message("assistant", value)
    several = json.dumps([CALL["function"], CALL["function"]])
    (record,) = read({"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": several}]})
    assert record.messages[-1].tool_calls == (CALL, CALL)


@pytest.mark.parametrize("given", [[TOOL], json.dumps([TOOL]), json.dumps(TOOL)])
def test_tools_may_be_json(given: Any) -> None:
    chat = [ASK, SAY]
    assert read({"messages": chat, "tools": given})[0].tools == (TOOL,)
    assert read({"prompt": "q", "completion": "a", "tools": given})[0].tools == (TOOL,)
    assert read({"prompt": "q", "completion": "a", "functions": given}, tools="functions")[0].tools == (TOOL,)
    pair = {"prompt": "q", "chosen": "a", "rejected": "b", "tools": given}
    readers: list[Any] = [preferences, judged, rankings, prompts]
    for reader in readers:
        assert reader([pair], Source("r"), on_bad_row="error")[0][0].tools == (TOOL,)


@pytest.mark.parametrize("given", [None, "", " ", [], "[]"])
def test_no_tools(given: Any) -> None:
    assert read({"messages": [ASK, SAY], "tools": given})[0].tools == ()


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": [ASK, SAY], "tools": "weather"}, "non-list tools"),
        ({"messages": [ASK, SAY], "tools": ["weather"]}, "non-list tools"),
        ({"messages": [ASK, SAY], "tools": "[{"}, "invalid JSON in tools"),
        ({"messages": [ASK, {**SAY, "tool_calls": ["f"]}]}, "tool calls in messages that are no list of calls"),
        ({"messages": [ASK, {**SAY, "content": None}]}, "null message in messages"),
        ({"messages": [ASK, {**SAY, "content": None, "tool_calls": []}]}, "null message in messages"),
        ({"messages": [ASK, {**SAY, "content": "", "tool_calls": []}]}, "empty response"),
        ({"messages": [{"role": "tool", "content": "x"}, SAY]}, "roles do not alternate"),
        ({"messages": [ASK, {"role": "tool", "content": "x"}, SAY]}, "roles do not alternate"),
        ({"messages": [ASK, SAY, {"role": "tool", "content": "x"}]}, "no final assistant turn"),
        ({"messages": [ASK, {**SAY, "content": "a\udfff"}]}, "lone surrogate in messages"),
        ({"messages": [ASK, {**SAY, "weight": 1, "content": "a\udfff"}]}, "lone surrogate in messages"),
    ],
)
def test_bad_tool_use(row: dict[str, Any], why: str) -> None:
    assert reason(row) == why


def test_an_answer_may_be_several_turns() -> None:
    turns = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "rain"}, SAY]
    other = [{"role": "assistant", "content": "No."}]
    (pair,) = preferences([{"prompt": [ASK], "chosen": turns, "rejected": other}], Source("r"), on_bad_row="error")[0]
    assert [turn.role for turn in pair.chosen] == ["assistant", "tool", "assistant"]
    (single,) = judged([{"messages": [ASK, *turns], "label": "yes"}], Source("r"), on_bad_row="error")[0]
    assert [turn.role for turn in single.response] == ["assistant", "tool", "assistant"]
    (prompt,) = prompts([{"messages": [ASK, *turns]}], Source("r"), on_bad_row="error")[0]
    assert [turn.role for turn in prompt.prompt] == ["user", "assistant", "tool"]


# --- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "role"),
    [
        ("developer", "system"), ("Human", "user"), ("GPT", "assistant"), ("ipython", "tool"), ("observation", "tool"),
        ("function", "tool"), ("tool_response", "tool"), ("Tool", "tool"),
    ],
)  # fmt: skip
def test_roles(written: str, role: str) -> None:
    turn = {"role": written, "content": "x"}
    turns = {
        "system": [turn, ASK, SAY],
        "user": [turn, SAY],
        "assistant": [ASK, turn],
        "tool": [ASK, SAY, turn, SAY],
    }[role]
    (record,) = read({"messages": turns})
    assert Message(role, "x") in record.messages


# --- what is learned -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mark", "learned"),
    [
        ({"weight": 0}, False), ({"weight": 1}, True), ({"weight": 0.0}, False), ({"weight": None}, True),
        ({"train": False}, False), ({"train": True}, True), ({"training": False}, False), ({"loss": False}, False),
        ({"loss_weight": 0.0}, False), ({"loss_weight": 1.0}, True),
    ],
)  # fmt: skip
def test_turns_that_are_not_learned(mark: dict[str, Any], learned: bool) -> None:
    (record,) = read({"messages": [ASK, {**SAY, **mark}, ASK, SAY]})
    assert [turn.supervised for turn in record.messages] == [True, learned, True, True]


@pytest.mark.parametrize("key", ["weight", "loss_weight", "train"])
@pytest.mark.parametrize("value", [0.5, 2, -1, "0"])
def test_other_weights_are_refused_by_name(key: str, value: Any) -> None:
    assert reason({"messages": [ASK, {**SAY, key: value}]}) == f"turn with a {key} other than 0 and 1"


# --- earlier turns ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "history",
    [
        [["1+1?", "2"]],
        '[["1+1?", "2"]]',
        [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}],
    ],
)
def test_history_comes_before_the_prompt(history: Any) -> None:
    row = {"system": "S", "instruction": "And", "input": "more?", "output": "3", "history": history}
    (record,) = read(row)
    assert [(turn.role, turn.content) for turn in record.messages] == [
        ("system", "S"), ("user", "1+1?"), ("assistant", "2"), ("user", "And\n\nmore?"), ("assistant", "3"),
    ]  # fmt: skip
    (prompt,) = prompts([row], Source("r"), on_bad_row="error")[0]
    assert prompt.prompt == record.messages[:-1]


@pytest.mark.parametrize("history", [None, [], ""])
def test_no_history(history: Any) -> None:
    assert len(read({"prompt": "q", "completion": "a", "history": history})[0].messages) == 2


@pytest.mark.parametrize(
    ("history", "why"),
    [
        ("earlier", "non-list history"),
        ([["1+1?"]], "history is no list of pairs"),
        ([["1+1?", None]], "null history"),
        ([["1+1?", ""]], "empty history"),
        ("[[", "invalid JSON in history"),
    ],
)
def test_bad_history(history: Any, why: str) -> None:
    assert reason({"prompt": "q", "completion": "a", "history": history}) == why


# --- a table's cells -------------------------------------------------------------------------------------------------


def test_json_in_a_cell_where_messages_are_wanted() -> None:
    assert read({"messages": json.dumps([ASK, SAY])})[0].messages[0] == Message("user", "Rain?")
    row = {"prompt": json.dumps([ASK]), "completion": json.dumps([SAY])}
    assert [turn.content for turn in read(row)[0].messages] == ["Rain?", "Yes."]
    sides = {side: json.dumps([ASK, {**SAY, "content": side}]) for side in ("chosen", "rejected")}
    (pair,) = preferences([sides], Source("r"), on_bad_row="error")[0]
    assert (pair.prompt[0].content, pair.rejected[0].content) == ("Rain?", "rejected")
    assert read({"prompt": '{"a": 1}', "completion": "[1, 2]"})[0].messages[0].content == '{"a": 1}', "a text of JSON"


def test_what_is_no_json_is_refused_by_name() -> None:
    assert reason({"messages": str([ASK, SAY])}) == "invalid JSON in messages"
    assert reason({"prompt": str([ASK]), "completion": "a"}) == "invalid JSON in prompt"
    assert reason({"messages": "Rain?"}) == "non-message messages"
    assert reason({"messages": "[" * 100_000}) == "invalid JSON in messages"


def test_text_is_raw() -> None:
    (record,) = read({"text": " <|im_start|>user\nHi"})
    assert record.messages == (Message("text", " <|im_start|>user\nHi"),)
    (prompt,) = prompts([{"text": "Once"}], Source("r"), on_bad_row="error")[0]
    assert prompt.prompt == (Message("user", "Once"),)


def test_turns_can_be_compared_and_looked_up() -> None:
    """Prompts that come again are found by their turns."""
    (record,) = read({"messages": [ASK, {**SAY, "tool_calls": [CALL], "name": "x"}]})
    (again,) = read({"messages": [ASK, {**SAY, "tool_calls": [CALL], "name": "x"}]})
    assert len({record.messages, again.messages}) == 1
