"""Copies that go bad in silence are found and replaced."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from flwr_ha.errors import CheckpointError
from flwr_ha.local.processes import wait_until
from flwr_ha.replica.eventlog import EventLog
from flwr_ha.replica.scrub import Scrubber
from flwr_ha.storage.blobs import BlobStore

GOOD = {number: bytes([number]) * 70_000 for number in range(4)}


class Peers:
    """Give blobs back that some other replica has."""

    def __init__(self, store: BlobStore, held: dict[str, bytes]) -> None:
        self.store = store
        self.held = held
        self.asked: list[str] = []

    def protect(self, digests, *, needed, timeout_s):
        raise AssertionError

    def offer(self, digests):
        raise AssertionError

    def fetch(self, digests, *, timeout_s):
        for digest in digests:
            self.asked.append(digest)
            if digest not in self.held:
                raise CheckpointError(f"nobody has {digest}")
            self.store.put_known(digest, [self.held[digest]])


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "store")


@pytest.fixture
def events(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path / "events.jsonl", replica_id=0)


def flip_a_bit(store: BlobStore, digest: str) -> None:
    """Change one bit and nothing that `stat` shows."""
    path = store.path(digest)
    status = path.stat()
    data = bytearray(path.read_bytes())
    data[40_000] ^= 4
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def kinds(events: EventLog) -> list[str]:
    return [event["kind"] for event in events.after(0)]


def test_a_flipped_bit_is_found_and_the_copy_replaced(store, events):
    """Size and time are as before, and this process has verified the file before: only reading it shows it."""
    digests = [store.put(data) for data in GOOD.values()]
    flip_a_bit(store, digests[2])
    assert store.is_good(digests[2]), "what was verified once is not read again by others"
    peers = Peers(store, dict(zip(digests, GOOD.values(), strict=True)))

    Scrubber(store, peers, events).scrub()

    assert peers.asked == [digests[2]]
    assert store.read(digests[2]) == GOOD[2]
    assert kinds(events) == ["copy-corrupt", "repaired"]


def test_a_copy_that_nobody_else_has_is_told_and_the_others_are_read(store, events):
    """One loss does not end the pass."""
    digests = sorted(store.put(data) for data in GOOD.values())
    for digest in (digests[0], digests[3]):
        flip_a_bit(store, digest)
    peers = Peers(store, {})

    Scrubber(store, peers, events).scrub()

    assert peers.asked == [digests[0], digests[3]]
    assert kinds(events) == ["copy-corrupt", "copy-corrupt"]


def test_good_copies_are_left_alone(store, events):
    digests = [store.put(data) for data in GOOD.values()]
    files = [store.path(digest).stat().st_ino for digest in digests]

    Scrubber(store, Peers(store, {}), events).scrub()

    assert [store.path(digest).stat().st_ino for digest in digests] == files
    assert kinds(events) == []


def test_it_runs_by_itself_again_and_again(store, events):
    """What goes bad between two passes is found by the next one."""
    digest = store.put(GOOD[1])
    with Scrubber(store, Peers(store, {digest: GOOD[1]}), events, first_s=0.01, every_s=0.01):
        for times in (1, 2):
            flip_a_bit(store, digest)
            wait_until(lambda: kinds(events).count("repaired") == times, timeout_s=30.0, what="the repair")  # noqa: B023
