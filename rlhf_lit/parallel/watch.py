"""Each rank learns within moments that another one is gone, whatever it is doing itself.

A rank that is killed shows to the others in their next collective at the earliest, which may be a whole rollout away,
and with NCCL it may not show at all before a timeout of minutes. Here rank zero holds a connection to each of the
others and a thread that waits on them. The system closes a process's connections when it dies, so nothing depends on
how busy a rank is; keep-alive probes find a machine that is gone without closing anything.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

PATIENCE = 20.0  # seconds that a rank may take to connect
GRACE = 5.0  # seconds between one rank's error and the end of the others, which may be about to raise it too
PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4}  # a silent machine is given up after 30 seconds
DONE, FAILED, LOST = b"d", b"f", b"l"


@dataclass(frozen=True)
class Loss:
    """A rank that is gone.

    Attributes:
        rank: which; None where rank zero has seen it, and says which.
        how: it was killed (or its machine is gone), or it ended with an error that it has reported itself.
    """

    rank: int | None
    how: Literal["killed", "failed"]


class Watch:
    """A thread per rank; made on all ranks at once.

    Args:
        rank, world: of this process.
        exchange: gives every rank what rank zero puts in, as ``Strategy.broadcast`` does.
        on_loss: called once, in the thread, when another rank is gone. It is to end this process.

    Attributes:
        unwatched: ranks that could not be connected (on rank zero), or this one (elsewhere).
    """

    def __init__(self, rank: int, world: int, exchange: Callable[[Any], Any], on_loss: Callable[[Loss], None]) -> None:
        self.on_loss = on_loss
        self.unwatched: list[int] = []
        self._left = threading.Event()
        self._peers: dict[int, socket.socket] = {}
        if rank:
            port, token = exchange(None)
            self._connect(rank, port, token)
        else:
            with socket.create_server(("", 0), backlog=world) as server:
                token = secrets.token_bytes(16)
                exchange((server.getsockname()[1], token))
                self._accept(server, world, token)
        for peer in self._peers.values():
            _probe(peer)
        os.register_at_fork(after_in_child=self._close)  # a child that outlives a killed rank must not hold it alive
        self._thread = threading.Thread(target=self._wait, name="rank-watch", daemon=True)
        self._thread.start()

    def _connect(self, rank: int, port: int, token: bytes) -> None:
        try:
            peer = socket.create_connection((os.environ["MASTER_ADDR"], port), PATIENCE)
            peer.sendall(token + rank.to_bytes(4))
        except OSError:
            self.unwatched = [rank]
        else:
            self._peers = {0: peer}

    def _accept(self, server: socket.socket, world: int, token: bytes) -> None:
        server.settimeout(PATIENCE)
        while len(self._peers) < world - 1:
            try:
                peer, _ = server.accept()
                peer.settimeout(PATIENCE)
                hello = peer.recv(len(token) + 4, socket.MSG_WAITALL)
            except OSError:
                break
            if hello[:-4] == token:
                self._peers[int.from_bytes(hello[-4:])] = peer
        self.unwatched = [rank for rank in range(1, world) if rank not in self._peers]

    def _close(self) -> None:
        for peer in self._peers.values():
            peer.close()

    def _wait(self) -> None:
        """Until all others have ended in order, or one has not."""
        with selectors.DefaultSelector() as selector:
            for rank, peer in self._peers.items():
                selector.register(peer, selectors.EVENT_READ, rank)
            while selector.get_map():
                for key, _ in selector.select():
                    word = _read(self._peers[key.data])
                    if word == DONE:
                        selector.unregister(key.fileobj)
                    elif self._is_loss(word):
                        self._send(LOST)
                        self.on_loss(Loss(None if word == LOST else key.data, "failed" if word == FAILED else "killed"))
                        return
                    else:
                        return

    def _is_loss(self, word: bytes) -> bool:
        """Whether this rank is to end for it: not where it is ending already, by the same error or another."""
        return not self._left.wait(GRACE if word == FAILED else 0)

    def _send(self, word: bytes) -> None:
        for peer in self._peers.values():
            with contextlib.suppress(OSError):  # it may be gone too
                peer.send(word)

    def leave(self, failed: bool) -> None:
        """Say that this rank ends, and why; the others are then no concern of it. A second call says nothing."""
        if not self._left.is_set():
            self._left.set()
            self._send(FAILED if failed else DONE)

    def wait_for_verdict(self, seconds: float) -> None:
        """Time for the thread to find out who is gone, where a collective has already failed. It then ends this
        process; otherwise this returns."""
        self._thread.join(seconds)


def _probe(peer: socket.socket) -> None:
    peer.settimeout(None)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in PROBES.items():
        if hasattr(socket, name):  # not everywhere of these names
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _read(peer: socket.socket) -> bytes:
    """A word of one byte; nothing where the connection is gone."""
    try:
        return peer.recv(1)
    except OSError:
        return b""
