"""A stand-in for the Hugging Face hub, on loopback: what the real client asks for when it uploads a folder."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from loopback import running

TOKEN = "hf_standin"


class Hub(ThreadingHTTPServer):
    """Keeps what was uploaded, and can be told to refuse.

    Attributes:
        files: contents of the repository by path.
        asked: method and path of each request.
        created: the body of each request for a repository.
        refuse: the end of a path → the status it is answered with, and the message.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answers)
        self.files: dict[str, bytes] = {}
        self.large: dict[str, bytes] = {}
        self.asked: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.refuse: dict[str, tuple[int, str]] = {}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answers(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing on standard error."""

    def _body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, found: Any, status: int = 200, message: str | None = None) -> None:
        text = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        if message is not None:
            self.send_header("X-Error-Message", message)
        self.end_headers()
        self.wfile.write(text)

    def _handle(self) -> None:
        body, path = self._body(), self.path.split("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        for end, (status, message) in self.server.refuse.items():
            if path.endswith(end):
                self._send({"error": message, "errors": [{"message": message}]}, status, message)
                return
        if not path.startswith(("/large/", "/verify")) and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send({"error": "Invalid username or password."}, 401, "Invalid username or password.")
        elif path == "/api/whoami-v2":
            self._send({"type": "user", "name": "me", "fullname": "Me", "orgs": [], "auth": {}})
        elif path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self._send({"url": f"{self.server.address}/me/{self.server.created[-1]['name']}"})
        elif path == "/api/validate-yaml":
            self._send({"errors": [], "warnings": []})
        elif path.startswith("/api/models/me/") and path.endswith("/preupload/main"):
            # As the hub: weights, and whatever is large, by the other way.
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            self._send({"files": files})
        elif path.startswith("/me/") and path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {
                    **one,
                    "actions": {
                        "upload": {"href": f"{self.server.address}/large/{one['oid']}"},
                        "verify": {"href": f"{self.server.address}/verify"},
                    },
                }
                for one in json.loads(body)["objects"]
            ]
            self._send({"transfer": "basic", "objects": objects})
        elif path.startswith("/large/"):
            oid = path.rsplit("/", 1)[1]
            assert hashlib.sha256(body).hexdigest() == oid
            self.server.large[oid] = body
            self._send({})
        elif path == "/verify":
            self._send({})
        elif path.startswith("/api/models/me/") and path.endswith("/commit/main"):
            for line in body.splitlines():
                entry = json.loads(line)
                value = entry["value"]
                if entry["key"] == "file":
                    self.server.files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    self.server.files[value["path"]] = self.server.large[value["oid"]]
            name = path.split("/")[4]
            address = f"{self.server.address}/me/{name}/commit/{'0' * 40}"
            self._send({"success": True, "commitUrl": address, "commitOid": "0" * 40})
        else:
            self._send({"error": f"unknown: {path}"}, 404, f"unknown: {path}")

    do_GET = do_POST = do_PUT = do_HEAD = _handle


@contextmanager
def reached(patch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A hub that the client in this process speaks to, over git's large files rather than over Xet."""
    from huggingface_hub import close_session, constants

    with hub() as running:
        patch.setattr(constants, "ENDPOINT", running.address)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr("time.sleep", lambda seconds: None)  # the client waits longer at each of its attempts
        patch.setenv("HF_TOKEN", TOKEN)
        close_session()
        yield running
    close_session()


@contextmanager
def hub() -> Iterator[Hub]:
    """A running stand-in."""
    server = Hub()
    with running(server):
        yield server
