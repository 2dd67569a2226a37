"""A server elsewhere that answers, and in how many ways it may not."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from chat_server import KEY, MODEL, ChatServer, Failure, serving

from rlhf_lit.errors import UserError
from rlhf_lit.rollout import server as client
from rlhf_lit.rollout.server import Reply, Server, ask


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that were waited between attempts; no test waits them."""
    found: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        found.append(seconds)
        await sleep(0)

    monkeypatch.setattr(client.asyncio, "sleep", note)
    return found


@pytest.fixture
def there() -> Iterator[ChatServer]:
    """One that repeats what it is told, the first words last."""
    with serving(lambda body: f"{body['messages'][-1]['content']}!") as server:
        yield server


def asking(server: ChatServer, **settings: Any) -> Server:
    return Server(server.base_url, MODEL, **settings)


def bodies(count: int) -> list[dict[str, Any]]:
    return [{"messages": [{"role": "user", "content": f"row {i}"}], "max_tokens": 7} for i in range(count)]


def texts(replies: list[Reply]) -> list[str | None]:
    return [reply.text for reply in replies]


# --- answers ---------------------------------------------------------------------------------------------------------


def test_replies_stand_in_the_order_of_the_requests(there: ChatServer) -> None:
    """Though the first one is answered last, and no more are under way than may be."""
    repeat, three, last = there.says, threading.Barrier(3, timeout=60), threading.Event()

    def says(body: dict[str, Any]) -> str | dict[str, Any]:
        row = int(body["messages"][-1]["content"].removeprefix("row "))
        if row < 3:
            three.wait()
        if row == 11:
            last.set()
        if row == 0:
            last.wait(60)
        return repeat(body)

    there.says = says
    assert texts(ask(asking(there, concurrency=3), bodies(12), "judge")) == [f"row {i}!" for i in range(12)]
    assert there.shown[0] != "row 0"
    assert there.shown.index("row 0") >= 9
    assert there.at_once == 3
    assert {body["model"] for body in there.asked} == {MODEL}
    assert ask(asking(there), [], "judge") == []


def test_fields_go_over_ours_and_null_leaves_one_out(there: ChatServer) -> None:
    ask(asking(there, fields={"max_tokens": None, "max_completion_tokens": 9, "temperature": 0.5}), bodies(1), "judge")
    [body] = there.asked
    assert body == {
        "model": MODEL, "messages": bodies(1)[0]["messages"], "max_completion_tokens": 9, "temperature": 0.5,
    }  # fmt: skip


def test_half_of_a_surrogate_pair_is_sent_as_it_stands(there: ChatServer) -> None:
    ask(asking(there), [{"messages": [{"role": "user", "content": "a\ud800 β"}]}], "judge")
    assert there.shown == ["a\ud800 β"]


def test_where_an_event_loop_runs_already(there: ChatServer) -> None:
    async def notebook() -> list[Reply]:
        return ask(asking(there), bodies(2), "judge")

    assert texts(asyncio.run(notebook())) == ["row 0!", "row 1!"]


def test_why_a_reply_ended(there: ChatServer) -> None:
    there.says = lambda body: {"message": {"content": None, "refusal": "no"}, "finish_reason": "content_filter"}
    assert ask(asking(there), bodies(1), "judge") == [Reply(None, "content_filter")]
    there.says = lambda body: {"message": {"content": "and so"}, "finish_reason": "length"}
    assert ask(asking(there), bodies(1), "judge") == [Reply("and so", "length")]


def test_the_key_is_the_environments(there: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    there.key = KEY
    monkeypatch.setenv("TEACHER_KEY", f"{KEY}\n")
    assert texts(ask(asking(there, api_key_env="TEACHER_KEY"), bodies(1), "judge")) == ["row 0!"]


# --- what passes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure",
    [
        Failure(429, json.dumps({"error": {"message": "slow down"}})),
        Failure(500),
        Failure(503, "<html>no one is here</html>"),
        Failure(408),
        Failure(),
        Failure(0, '{"choices": [{"mess'),
        Failure(200, "not JSON at all"),
        Failure(200, '{"choices": []}'),
        Failure(200, json.dumps({"choices": [{"message": {"content": 3}}]})),
        Failure(200, "[" * 100_000),
    ],
    ids=["429", "500", "503", "408", "closed", "torn", "no JSON", "no choice", "no text", "deep"],
)
def test_a_failure_that_passes_costs_no_other_answer(there: ChatServer, waits: list[float], failure: Failure) -> None:
    there.failures = [None, failure, failure, None]
    found = ask(asking(there, concurrency=1), bodies(4), "judge")
    assert texts(found) == [f"row {i}!" for i in range(4)]
    assert there.count == 6, "each request once, and the one that failed twice more"
    assert waits == [0.5, 1.0]


def test_it_is_said_once_that_a_request_is_sent_again(
    there: ChatServer, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    there.failures = [Failure(500, "a\x1b[31mb")] * 3
    ask(asking(there, concurrency=1), bodies(2), "judge")
    [line] = capsys.readouterr().err.splitlines()
    assert line == f"note: judge: the server {there.base_url} failed (500: a\\x1b[31mb); trying again (retries: 6)"


def test_a_server_says_when_to_come_again(there: ChatServer, waits: list[float]) -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    there.failures = [Failure(429, headers={"Retry-After": asked}) for asked in ("7", soon, "99999", "never", "nan")]
    ask(asking(there), bodies(1), "judge")
    assert waits[0] == 7
    assert 1 < waits[1] <= 100
    assert waits[2:] == [120, 4, 8]


def test_too_slow_an_answer_is_asked_for_again(there: ChatServer, waits: list[float]) -> None:
    there.failures = [Failure(late=True)]
    assert texts(ask(asking(there, timeout=0.5, retries=50), bodies(1), "judge")) == ["row 0!"]


# --- what does not ---------------------------------------------------------------------------------------------------

FOR_GOOD: list[tuple[Failure, dict[str, Any], str]] = [
    (Failure(429, json.dumps({"error": {"message": "quota spent"}})), {"retries": 2},
     "is too busy (429: quota spent), 3 times; lower concurrency, raise retries, or look at the account's limits"),
    (Failure(502, "<h1>Bad\n Gateway</h1>"), {"retries": 1},
     "failed (502: <h1>Bad Gateway</h1>), 2 times; look at its log"),
    (Failure(), {"retries": 0}, "broke off (Server disconnected without sending a response.); look at its log"),
    (Failure(200, '{"data": 1}'), {"retries": 0},
     """answered with what is no chat completion: '{"data": 1}'; base_url usually ends in /v1"""),
    (Failure(late=True), {"retries": 0, "timeout": 0.2},
     "gave no answer within 0.2 seconds; raise timeout, or lower concurrency"),
    (Failure(400, json.dumps({"error": {"message": "unknown field 'seed'"}})), {},
     "refuses the request (400: unknown field 'seed'); set fields and sampling to what it takes"),
    (Failure(422, json.dumps({"detail": [{"loc": ["body", "top_k"]}]})), {},
     "refuses the request (422: [{'loc': ['body', 'top_k']}])"),
    (Failure(400, json.dumps({"object": "error", "message": "x" * 1000})), {}, f"(400: {'x' * 240});"),
    (Failure(301, headers={"Location": "https://elsewhere/v1"}), {},
     "sends on to 'https://elsewhere/v1' (301); name that as base_url, without chat/completions"),
]  # fmt: skip


@pytest.mark.parametrize(("failure", "settings", "complaint"), FOR_GOOD, ids=[text[:30] for _, _, text in FOR_GOOD])
def test_what_cannot_be_answered_ends_in_one_line(
    there: ChatServer, waits: list[float], failure: Failure, settings: dict[str, Any], complaint: str
) -> None:
    there.always = failure
    with pytest.raises(UserError) as error:
        ask(asking(there, **settings), bodies(1), "judge")
    assert str(error.value).startswith(f"judge: the server {there.base_url} ")
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)
    assert there.count == 1 + settings.get("retries", 0)


def test_how_far_it_came(there: ChatServer, waits: list[float]) -> None:
    there.failures, there.always = [None, None], Failure(400, "no")
    with pytest.raises(UserError, match=r"refuses the request \(400: no\); 2 of 9 answers had come; "):
        ask(asking(there, concurrency=1), bodies(9), "judge")
    assert there.count == 3, "nothing more is asked for"


def test_what_is_under_way_ends_with_the_first_that_fails_for_good(
    there: ChatServer, waits: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """And says nothing of being sent again."""
    there.failures, there.always = [Failure(late=True)], Failure(400, "no")
    with pytest.raises(UserError, match=r"refuses the request \(400: no\); "):
        ask(asking(there, concurrency=2), bodies(9), "judge")
    assert capsys.readouterr().err == ""
    assert waits == []


def test_a_model_that_is_not_served(there: ChatServer) -> None:
    there.models = ["large", "small\x07"]
    with pytest.raises(UserError, match=rf"has no model '{MODEL}'; it has 'large', 'small\\x07'$"):
        ask(asking(there), bodies(1), "judge")


def test_a_place_that_is_not_there(there: ChatServer) -> None:
    with pytest.raises(UserError, match=r"has no http://.*/v2/chat/completions \(404: Not Found\); base_url usually "):
        ask(Server(there.base_url.replace("v1", "v2"), MODEL), bodies(1), "judge")


def test_nobody_is_there(waits: list[float]) -> None:
    with socket.socket() as taken:  # and does not listen
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"^judge: the server {url} cannot be reached \(.+\), 3 times; is it run"):
            ask(Server(url, MODEL, retries=2), bodies(1), "judge")


def test_keys_that_are_not_taken_and_never_shown(there: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    there.key = KEY
    with pytest.raises(UserError, match=r"wants a key \(401: .*\); set api_key_env to the name of the variable"):
        ask(asking(there), bodies(1), "judge")
    monkeypatch.setenv("TEACHER_KEY", "sk-another")
    with pytest.raises(UserError, match=r"does not take the key in TEACHER_KEY \(401: .* Bearer …\)") as error:
        ask(asking(there, api_key_env="TEACHER_KEY"), bodies(1), "judge")
    assert "sk-another" not in str(error.value)
    for value in ("", " \n", "schlüssel", "a\nb"):
        monkeypatch.setenv("TEACHER_KEY", value)
        with pytest.raises(UserError, match=r"^judge\.api_key_env: the environment variable TEACHER_KEY holds no key"):
            ask(asking(there, api_key_env="TEACHER_KEY"), bodies(1), "judge")
    assert there.asked == []


def test_a_proxy_that_cannot_be_used(there: ChatServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "gopher://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^judge: the server .* is behind a proxy that cannot be used; "):
        ask(asking(there), bodies(1), "judge")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"base_url": "127.0.0.1:8000/v1"}, "base_url must be like http://127.0.0.1:8000/v1, not '127.0.0.1:8000/v1'"),
        ({"base_url": "ftp://a/v1"}, "base_url must be like"),
        ({"base_url": "http://:80"}, "base_url must be like"),
        ({"base_url": "http://a:port/v1"}, "base_url must be like"),
        ({"base_url": "http://a b/v1"}, "base_url must be like"),
        ({"base_url": "http://a\x1b/v1"}, r"base_url must be like .*\\x1b"),
        ({"base_url": "http://me:secret@a/v1"}, "base_url has no place for a name, a password or a query"),
        ({"base_url": "http://a/v1?key=secret"}, "base_url has no place for"),
        ({"api_key_env": "sk-proj-secret"}, "api_key_env is the name of an environment variable"),
        ({"timeout": 0}, "timeout must be greater than 0, not 0"),
        ({"retries": -1}, "retries must be at least 0, not -1"),
        ({"concurrency": 0}, "concurrency must be at least 1, not 0"),
    ],
)
def test_settings_that_mean_nothing(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as error:
        Server(**{"base_url": "http://a/v1", "model": MODEL, **settings})
    assert "secret" not in str(error.value)
