"""Ranks that watch each other, here in threads of one process."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from queue import Queue

import pytest

from rlhf_lit.parallel import watch
from rlhf_lit.parallel.watch import Loss, Watch

WORLD = 3
SECONDS = 300.0


class Group:
    """A watch on each of three ranks, and what each was told."""

    def __init__(self) -> None:
        self.told: list[Queue[Loss]] = [Queue() for _ in range(WORLD)]
        address: Queue[object] = Queue()

        def exchange(rank: int) -> Callable[[object], object]:
            def give(value: object) -> object:
                for _ in range(WORLD - 1):
                    address.put(value)
                return value

            return give if rank == 0 else lambda value: address.get(timeout=SECONDS)

        with ThreadPoolExecutor(WORLD) as pool:
            self.ranks = list(pool.map(lambda r: Watch(r, WORLD, exchange(r), self.told[r].put), range(WORLD)))

    def die(self, rank: int) -> None:
        """As the system does it to the connections of a process that is gone, which says nothing more."""
        self.ranks[rank]._left.set()
        for peer in self.ranks[rank]._peers.values():
            peer.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def group(monkeypatch: pytest.MonkeyPatch) -> Iterator[Group]:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(watch, "GRACE", 0.2)
    made = Group()
    assert [rank.unwatched for rank in made.ranks] == [[], [], []]
    yield made
    for rank in made.ranks:
        rank.leave(failed=False)
        rank._close()


def test_all_learn_of_a_rank_that_dies(group):
    """Rank zero says which; the others need not."""
    group.die(2)
    assert group.told[0].get(timeout=SECONDS) == Loss(2, "killed")
    assert group.told[1].get(timeout=SECONDS) == Loss(None, "killed")


def test_all_learn_that_rank_zero_died(group):
    group.die(0)
    for rank in (1, 2):
        assert group.told[rank].get(timeout=SECONDS) == Loss(0, "killed")


def test_an_error_is_told_apart(group):
    group.ranks[1].leave(failed=True)
    assert group.told[0].get(timeout=SECONDS) == Loss(1, "failed")
    assert group.told[2].get(timeout=SECONDS) == Loss(None, "killed")


def test_ranks_that_fail_together_do_not_blame_each_other(group):
    for rank in group.ranks:
        rank.leave(failed=True)
    group.die(1)
    for rank in group.ranks:
        rank.wait_for_verdict(SECONDS)
        assert not rank._thread.is_alive()
    assert all(told.empty() for told in group.told)


def test_nothing_happens_where_all_are_done(group):
    group.ranks[1].leave(failed=False)
    group.die(1)
    group.ranks[0].leave(failed=False)
    group.ranks[2].leave(failed=False)
    for rank in (0, 2):
        group.ranks[rank].wait_for_verdict(SECONDS)
        assert not group.ranks[rank]._thread.is_alive()
    assert all(told.empty() for told in group.told)


def test_a_rank_that_cannot_be_reached_is_named(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(watch, "PATIENCE", 0.2)
    alone = Watch(0, 2, lambda value: value, lambda loss: None)
    assert alone.unwatched == [1]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    assert Watch(1, 2, lambda value: (port, b"x" * 16), lambda loss: None).unwatched == [1]
