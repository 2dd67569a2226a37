"""Answers of a server elsewhere, by the chat completions of OpenAI's interface, which vLLM, llama.cpp, Ollama and most
hosted models have too (platform.openai.com/docs/api-reference/chat).

Requests go out side by side. One that fails in passing (a lost connection, 408, 429, 5xx, no answer in time, a garbled
one) is sent again after a while, and those that were answered before are not; one that cannot succeed ends with a line
that names the server.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from collections.abc import Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from rlhf_lit.errors import UserError, and_more, first_line, is_live, say
from rlhf_lit.rollout.rewards import shown

if TYPE_CHECKING:
    import httpx

FIRST_WAIT = 0.5  # seconds before a request is sent again the first time; doubled each time
LONGEST_WAIT = 120.0  # whatever the server asks for (Retry-After)
PASSING = {408, 409, 425, 429}  # statuses beside 5xx after which the same request may succeed
SEEDS = 2**31  # some servers keep a seed in 32 bits
LONGEST_COMPLAINT = 240  # characters of a server's own words in a message

Body = dict[str, Any]


@dataclass(frozen=True)
class Server:
    """A server with OpenAI's interface, and a model that it serves.

    Args:
        base_url: what stands before `/chat/completions`, such as `http://127.0.0.1:8000/v1`.
        model: the server's name of the model.
        api_key_env: name of the environment variable that holds the key; null sends none. The key itself belongs in no
            config.
        timeout: seconds that one answer may take.
        retries: how often a request that failed in passing is sent again, after 0.5, 1, 2, … seconds or as long as the
            server says.
        concurrency: requests under way at once. How this machine carries it out.
        fields: further fields of each request, which go over ours; null leaves one of ours out:
            `{max_tokens: null, max_completion_tokens: 512}`.

    Raises:
        ValueError: a URL, a name or a number that means nothing.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    timeout: float = 120.0
    retries: int = 6
    concurrency: int = 8
    fields: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.base_url)
            named = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
        except ValueError:  # a port that is none
            named = False
        if not named or not self.base_url.isprintable() or " " in self.base_url:
            raise ValueError(f"base_url must be like http://127.0.0.1:8000/v1, not {shown(self.base_url)}")
        if parts.username or parts.password or parts.query or parts.fragment:
            raise ValueError("base_url has no place for a name, a password or a query; a key goes by api_key_env")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError(
                "api_key_env is the name of an environment variable (OPENAI_API_KEY), never the key itself"
            )
        if not self.timeout > 0:
            raise ValueError(f"timeout must be greater than 0, not {self.timeout}")
        if self.retries < 0:
            raise ValueError(f"retries must be at least 0, not {self.retries}")
        if self.concurrency < 1:
            raise ValueError(f"concurrency must be at least 1, not {self.concurrency}")

    @property
    def address(self) -> str:
        """The model and where it is, for the record."""
        return f"{self.model} at {self.base_url}"

    def url(self, place: str) -> str:
        """Of one of the server's places."""
        return f"{self.base_url.rstrip('/')}/{place}"


@dataclass(frozen=True)
class Reply:
    """A model's turn.

    Attributes:
        text: what it says; None where it said nothing that is text (a refusal, a tool call, thoughts alone).
        finish: why it ended: `stop`, `length` where it was cut, or another reason of the server's.
    """

    text: str | None
    finish: str | None


@dataclass(frozen=True)
class _Failure:
    """What went wrong with one request.

    Attributes:
        found: what the server did, as a sentence begins that has the server for its subject.
        advice: what to do.
        passing: whether the same request may succeed later.
        wait: seconds that the server asks to wait.
    """

    found: str
    advice: str
    passing: bool = False
    wait: float = 0.0


def ask(server: Server, bodies: Sequence[Body], role: str) -> list[Reply]:
    """Let a server answer some requests.

    Args:
        server: who is asked.
        bodies: fields of each request, `messages` among them.
        role: the option that names the server; messages begin with it.

    Returns:
        Replies in the order of the requests.

    Raises:
        UserError: one that cannot be answered, or not after all retries.
    """
    return _run(_Asking(server, role, _key_of(server, role)).all(bodies)) if bodies else []


def require_answers(server: Server, settings: Body, role: str) -> None:
    """Say hello, before hours of work that would end at a server that does not answer.

    Args:
        server, role: as of ``ask``.
        settings: fields of the requests to come, but for the messages: a server may refuse one, such as a length.

    Raises:
        UserError: it does not.
    """
    ask(server, [{"messages": [{"role": "user", "content": "Hello"}], **settings}], role)


def _key_of(server: Server, role: str) -> str | None:
    if server.api_key_env is None:
        return None
    key = os.environ.get(server.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise UserError(
            f"{role}.api_key_env: the environment variable {server.api_key_env} holds no key; export it, or set "
            "api_key_env to null"
        )
    return key


def _run(work: Coroutine[Any, Any, list[Reply]]) -> list[Reply]:
    """To its end; where an event loop runs already (a notebook), beside it."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as aside:
        return aside.submit(asyncio.run, work).result()


class _Asking:
    """Some requests under way.

    Args:
        server, role: as of ``ask``.
        key: sent along with each; None sends none.
    """

    def __init__(self, server: Server, role: str, key: str | None) -> None:
        self.server = server
        self.role = role
        self.key = key
        self.done = 0
        self.said = False

    async def all(self, bodies: Sequence[Body]) -> list[Reply]:
        """Replies in order; what is under way ends with the first request that fails for good."""
        import httpx
        from rich.console import Console
        from rich.progress import Progress

        headers = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        turn = asyncio.Semaphore(self.server.concurrency)
        bar = Progress(console=Console(stderr=True), disable=not is_live(sys.stderr), transient=True)
        line = bar.add_task(f"{self.role}: {self.server.model}", total=len(bodies))
        limits = httpx.Limits(max_connections=self.server.concurrency)
        try:  # seconds are counted for a whole answer, below
            client = httpx.AsyncClient(headers=headers, limits=limits, timeout=None)
        except (ImportError, ValueError) as error:
            raise self._error(_Failure("is behind a proxy that cannot be used", first_line(error)), 1, 0) from error

        async def one(body: Body) -> Reply:
            async with turn:
                reply = await self._one(client, body, len(bodies))
            self.done += 1
            bar.advance(line)
            return reply

        with bar:
            async with client:
                replies = [asyncio.ensure_future(one(body)) for body in bodies]
                try:
                    return await asyncio.gather(*replies)
                finally:  # one has failed for good, or the person at the terminal has had enough
                    for reply in replies:
                        reply.cancel()

    async def _one(self, client: httpx.AsyncClient, body: Body, count: int) -> Reply:
        fields = {"model": self.server.model, **body, **self.server.fields}
        # Escaped: half of a surrogate pair, which a row may hold, has no bytes.
        sent = json.dumps({name: value for name, value in fields.items() if value is not None}).encode()
        for attempt in range(1 + self.server.retries):
            found = await self._attempt(client, sent)
            if isinstance(found, Reply):
                return found
            if not found.passing or attempt == self.server.retries:
                raise self._error(found, attempt + 1, count)
            if not self.said:
                self.said = True
                say(f"note: {self.role}: {self._named(found)}; trying again (retries: {self.server.retries})")
            await asyncio.sleep(min(LONGEST_WAIT, max(FIRST_WAIT * 2**attempt, found.wait)))
        raise AssertionError

    async def _attempt(self, client: httpx.AsyncClient, sent: bytes) -> Reply | _Failure:
        import httpx

        seconds, headers = self.server.timeout, {"Content-Type": "application/json"}
        try:
            async with asyncio.timeout(seconds):
                answer = await client.post(self.server.url("chat/completions"), content=sent, headers=headers)
        except TimeoutError:
            advice = "raise timeout, or lower concurrency"
            return _Failure(f"gave no answer within {seconds:g} seconds", advice, passing=True)
        except httpx.ConnectError as error:
            return _Failure(f"cannot be reached ({first_line(error)})", "is it running, and base_url its own?", True)
        except httpx.TransportError as error:
            return _Failure(f"broke off ({first_line(error) or type(error).__name__})", "look at its log", True)
        except httpx.InvalidURL as error:
            return _Failure(f"cannot be addressed ({first_line(error)})", "correct base_url")
        except httpx.DecodingError as error:
            return _Failure(f"answered what cannot be decoded ({first_line(error)})", "look at its log", True)
        if answer.status_code != 200:
            return await self._refused(client, answer)
        return _reply(answer.text) or _Failure(
            f"answered with what is no chat completion: {shown(answer.text)}", "base_url usually ends in /v1", True
        )

    async def _refused(self, client: httpx.AsyncClient, answer: httpx.Response) -> _Failure:
        """What a status and the words beside it mean."""
        status, words = answer.status_code, self._without_key(_complaint(answer.text))
        said = f"{status}: {words}" if words else str(status)
        if status in PASSING or status >= 500:
            busy = "lower concurrency, raise retries, or look at the account's limits"
            found = f"is too busy ({said})" if status == 429 else f"failed ({said})"
            return _Failure(found, busy if status == 429 else "look at its log", True, _seconds(answer))
        if status in (401, 403):
            variable = self.server.api_key_env
            if variable is None:
                return _Failure(f"wants a key ({said})", "set api_key_env to the name of the variable that holds one")
            return _Failure(f"does not take the key in {variable} ({said})", "export another")
        if status == 404:
            known = await self._models(client)
            if known and self.server.model not in known:
                return _Failure(f"has no model {shown(self.server.model)}", f"it has {and_more(map(shown, known), 4)}")
            return _Failure(f"has no {self.server.url('chat/completions')} ({said})", "base_url usually ends in /v1")
        if status < 400:
            place = shown(answer.headers.get("Location", "nowhere"))
            return _Failure(f"sends on to {place} ({status})", "name that as base_url, without chat/completions")
        return _Failure(f"refuses the request ({said})", "set fields and sampling to what it takes")

    async def _models(self, client: httpx.AsyncClient) -> list[str]:
        """What a server says that it serves; nothing where it does not say."""
        import httpx

        with suppress(httpx.HTTPError, TimeoutError, ValueError, TypeError, KeyError):
            async with asyncio.timeout(self.server.timeout):
                answer = await client.get(self.server.url("models"))
            return [str(one["id"]) for one in answer.json()["data"]]
        return []

    def _without_key(self, words: str) -> str:
        return words if self.key is None else words.replace(self.key, "…")

    def _named(self, failure: _Failure) -> str:
        return f"the server {self.server.base_url} {failure.found}"

    def _error(self, failure: _Failure, attempts: int, count: int) -> UserError:
        times = f", {attempts} times" if attempts > 1 else ""
        before = f"; {self.done} of {count} answers had come" if self.done else ""
        return UserError(f"{self.role}: {self._named(failure)}{times}{before}; {failure.advice}")


def _reply(text: str) -> Reply | None:
    """Of a chat completion; None where a text is none."""
    try:
        choice = json.loads(text)["choices"][0]
        said, finish = choice["message"].get("content"), choice.get("finish_reason")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        return None
    if not isinstance(said, str | None) or not isinstance(finish, str | None):
        return None
    return Reply(said, finish)


def _complaint(text: str) -> str:
    """What a server says of an error, in one short line; the shapes are OpenAI's, older vLLM's and FastAPI's."""
    found: Any = text
    with suppress(ValueError, RecursionError):
        found = json.loads(text)
    while isinstance(found, dict):
        found = found.get("error") or found.get("message") or found.get("detail") or ""
    line = " ".join(str(found).split())[:LONGEST_COMPLAINT]
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in line)


def _seconds(answer: httpx.Response) -> float:
    """How long a server asks to wait: Retry-After, as a number or a date."""
    from datetime import UTC, datetime
    from email.utils import parsedate_to_datetime

    asked = answer.headers.get("Retry-After", "")
    with suppress(ValueError):
        return max(0.0, float(asked))
    with suppress(ValueError, TypeError):
        return max(0.0, (parsedate_to_datetime(asked) - datetime.now(UTC)).total_seconds())
    return 0.0
