"""What is pushed when, and how often the other side is asked, with a connection and a clock that the test moves."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flwr_ha.errors import CheckpointError
from flwr_ha.storage import pushing
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.frames import Answer
from flwr_ha.storage.lanes import Job, Lane
from flwr_ha.storage.peer import Peer
from flwr_ha.storage.pushing import Pusher

SIZE = 10


class SlowOutlet:
    """A connection on which each piece takes a while; it remembers what was sent and asked."""

    def __init__(self, *, seconds: float, loses: Sequence[str] = ()) -> None:
        self.now_s = 0.0
        self.log: list[tuple[str, ...]] = []
        self.is_gone = False
        self._has: dict[str, int] = {}
        self._seconds = seconds
        self._loses = list(loses)

    def ask(self, sizes: Mapping[str, int]) -> Answer:
        self.log.append(("asked", *sizes))
        return Answer({each: self._has.get(each, 0) for each, size in sizes.items() if self._has.get(each) != size})

    def send(self, file: Any, digest: str, *, offset: int, count: int, total: int, is_wanted: Any) -> None:
        assert offset == self._has.get(digest, 0)
        assert offset + count <= total
        self.now_s += self._seconds
        self.log.append(("sent", digest))
        self._has[digest] = offset + count
        if digest in self._loses:
            self._loses.remove(digest)
            self._has[digest] = 0

    def close(self) -> None: ...


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    """Return the own copies."""
    return BlobStore(tmp_path)


def push(store: BlobStore, outlet: SlowOutlet, digests: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Push blobs in pieces of one byte."""
    monkeypatch.setattr(pushing, "time", SimpleNamespace(monotonic=lambda: outlet.now_s))
    monkeypatch.setattr(pushing, "Outlet", lambda *_, **__: outlet)
    with Pusher(Peer(1, "127.0.0.1:1"), secret="", chunk_bytes=1) as pusher:
        pusher.push(store, digests)


def test_what_was_pushed_is_asked_for_while_more_is_on_its_way(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The peer would else collect it after two minutes, and a model that takes longer would never arrive whole."""
    first, second = (store.put(bytes([i]) * SIZE) for i in range(2))
    outlet = SlowOutlet(seconds=20.0)
    push(store, outlet, [first, second], monkeypatch)
    assert outlet.log[0] == outlet.log[-1] == ("asked", first, second)
    assert outlet.log.count(("asked", first)) == SIZE // 2  # once in 40 s, at pieces of 20 s


def test_a_quick_push_asks_twice(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before, and whether all has arrived."""
    digests = [store.put(bytes([i]) * SIZE) for i in range(20)]
    outlet = SlowOutlet(seconds=0.001)
    push(store, outlet, digests, monkeypatch)
    assert [kind for kind, *_ in outlet.log] == ["asked", *["sent"] * 20 * SIZE, "asked"]


def test_what_got_lost_is_sent_again(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """As long as the peer gets further."""
    first, second = (store.put(bytes([i])) for i in range(2))
    outlet = SlowOutlet(seconds=0.1, loses=[second])
    push(store, outlet, [first, second], monkeypatch)
    assert [digest for kind, digest, *_ in outlet.log if kind == "sent"] == [first, second, second]


def test_a_peer_that_keeps_nothing_is_given_up(store: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it lacks what it was sent: nobody goes on sending for ever."""
    only = store.put(b"x")
    outlet = SlowOutlet(seconds=0.1, loses=[only] * 100)
    with pytest.raises(CheckpointError, match=r"replica 1 .*does not get further"):
        push(store, outlet, [only], monkeypatch)
    assert len(outlet.log) < 15


class NotingPusher:
    """Notes what it is to push; waits before the first push until it is allowed."""

    def __init__(self) -> None:
        self.pushes: list[tuple[tuple[str, ...], bool]] = []
        self.go_on = threading.Event()
        self.is_aborted, self.sent_bytes = False, 0

    def push(self, store: BlobStore, digests: tuple[str, ...], *, is_wanted: Any, is_settled: bool) -> None:
        self.pushes.append((digests, is_settled))
        assert self.go_on.wait(10.0)

    def abort(self) -> None: ...

    def close(self) -> None: ...


def test_offers_are_merged_up_to_a_limit(store: BlobStore) -> None:
    """So that what nobody waits for yet does not keep a commit waiting for long."""
    blobs = [store.put(bytes([i]) * size) for i, size in enumerate([1000, 1000, 16 << 20, 16 << 20, 1000])]
    pusher, changed = NotingPusher(), threading.Condition()
    pusher.go_on.set()
    with changed:
        lane = Lane(
            Peer(1, "127.0.0.1:1"),
            "a lane",
            store=store,
            connect=lambda _: cast(Any, pusher),
            changed=changed,
            on_push=lambda *_: None,
        )
        for digest in blobs:
            lane.offer(Job((digest,), is_offer=True))
        assert changed.wait_for(lambda: sum(len(digests) for digests, _ in pusher.pushes) == 5, timeout=5.0)
        lane.close()
    lane.join(5.0)
    assert pusher.pushes == [(tuple(blobs[:3]), False), (tuple(blobs[3:4]), False), (tuple(blobs[4:]), False)]
