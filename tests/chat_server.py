"""A stand-in for a server with OpenAI's interface, on loopback, that can be told to fail."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from loopback import running

Body = dict[str, Any]
MODEL = "teacher"
KEY = "sk-a-secret"


@dataclass
class Failure:
    """What a request meets instead of an answer.

    Attributes:
        status: sent with the text; 0 closes the connection without a word, or in the middle of the text.
        text: the whole body.
        headers: beside those of every answer.
        late: not before nobody waits for it any more.
    """

    status: int = 0
    text: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    late: bool = False


class ChatServer(ThreadingHTTPServer):
    """Answers chat completions.

    Attributes:
        says: a request's body → the text of the answer, or the whole choice.
        failures: what the next requests for a completion meet instead, in order; None is an answer.
        always: what each of them meets once ``failures`` are spent; None is an answer.
        asked: bodies of the requests that were answered, in the order of their answers.
        count: requests for a completion, the failed ones too.
        at_once: the most that were under way at a time.
        key: wanted in each request; None wants none.
        models: names that it serves; None has no list of them.
        most_tokens: that a request may ask for.
    """

    daemon_threads = True

    def __init__(self, says: Callable[[Body], str | Body]) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.says = says
        self.failures: list[Failure | None] = []
        self.always: Failure | None = None
        self.asked: list[Body] = []
        self.count = self.at_once = self.under_way = 0
        self.key: str | None = None
        self.models: list[str] | None = [MODEL]
        self.most_tokens = 10_000
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing of a client that has hung up."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    @property
    def shown(self) -> list[str]:
        """The last turn of each answered request."""
        return [body["messages"][-1]["content"] for body in self.asked]


class _Answers(BaseHTTPRequestHandler):
    server: ChatServer

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error."""

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(text.encode())), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def _refuse(self, status: int, message: str) -> None:
        self._send(status, json.dumps({"error": {"message": message, "type": "invalid_request_error"}}))

    def do_GET(self) -> None:
        if self.path == "/v1/models" and self.server.models is not None:
            self._send(200, json.dumps({"data": [{"id": name} for name in self.server.models]}))
        else:
            self._refuse(404, "Not Found")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.count += 1
            server.under_way += 1
            server.at_once = max(server.at_once, server.under_way)
            failure = server.failures.pop(0) if server.failures else server.always
        try:
            self._answer(body, failure)
        finally:
            with server.lock:
                server.under_way -= 1

    def _answer(self, body: Body, failure: Failure | None) -> None:
        if failure is not None:
            if failure.late:
                self.rfile.read(1)
            elif failure.status:
                self._send(failure.status, failure.text, failure.headers)
            elif failure.text:
                self._send(200, failure.text, {"Content-Length": "100000"})
            self.close_connection = True
        elif self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self._refuse(401, f"Incorrect API key provided: {self.headers.get('Authorization')}")
        elif self.path != "/v1/chat/completions":
            self._refuse(404, "Not Found")
        elif self.server.models is not None and body["model"] not in self.server.models:
            self._refuse(404, f"The model `{body['model']}` does not exist.")
        elif body.get("max_tokens", 0) > self.server.most_tokens:
            self._refuse(400, f"max_tokens={body['max_tokens']} cannot be greater than {self.server.most_tokens}")
        else:
            said = self.server.says(body)
            choice = said if isinstance(said, dict) else {"message": {"content": said}, "finish_reason": "stop"}
            with self.server.lock:
                self.server.asked.append(body)
            self._send(200, json.dumps({"choices": [choice]}))


@contextmanager
def serving(says: Callable[[Body], str | Body]) -> Iterator[ChatServer]:
    """One that runs until the block ends."""
    server = ChatServer(says)
    with running(server):
        yield server
