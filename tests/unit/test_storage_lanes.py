"""One peer's share of the pushes, with a peer and a clock that the test moves."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from flwr_ha.storage import lanes
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.lanes import Job, Lane
from flwr_ha.storage.peer import Peer


class SlowPeer:
    """A peer to which each chunk takes a while; it remembers what was sent and asked."""

    def __init__(self, *, chunks: int, seconds: float) -> None:
        self.now_s, self.log = 0.0, list[str]()
        self.is_aborted, self.sent_bytes = False, 0
        self._chunks, self._seconds = chunks, seconds

    def push(
        self, store: BlobStore, digest: str, *, is_wanted: Callable[[], bool], between_chunks: Callable[[], None]
    ) -> None:
        if f"sent {digest}" in self.log:
            return
        for _ in range(self._chunks):
            between_chunks()
            self.now_s += self._seconds
        self.log.append(f"sent {digest}")

    def has(self, digest: str) -> bool:
        self.log.append(f"asked {digest}")
        return True

    def abort(self) -> None:
        self.is_aborted = True

    def close(self) -> None: ...


def pushed(store: BlobStore, peer: SlowPeer, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Push two blobs through a lane, and return what the peer has seen."""
    monkeypatch.setattr(lanes, "time", SimpleNamespace(monotonic=lambda: peer.now_s))
    changed = threading.Condition()
    lane = Lane(
        Peer(1, "127.0.0.1:1"),
        "a lane",
        store=store,
        connect=lambda _: cast(Any, peer),
        changed=changed,
        on_push=lambda *_: None,
    )
    job = Job(("a", "b"))
    with changed:
        lane.add(job)
        assert changed.wait_for(lambda: job.held or job.failed, timeout=5.0)
        lane.close()
    lane.join(5.0)
    assert job.held == {1}
    return peer.log


def test_what_was_pushed_is_asked_for_while_more_is_on_its_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The peer would else collect it after two minutes, and a model that takes longer would never arrive whole."""
    log = pushed(BlobStore(tmp_path), SlowPeer(chunks=10, seconds=20.0), monkeypatch)
    assert log[0] == "sent a"
    assert log[-1] == "sent b"
    assert log.count("asked a") == 5  # once in 40 s, at chunks of 20 s


def test_a_quick_push_asks_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It costs no round trips."""
    assert pushed(BlobStore(tmp_path), SlowPeer(chunks=10, seconds=0.1), monkeypatch) == ["sent a", "sent b"]
