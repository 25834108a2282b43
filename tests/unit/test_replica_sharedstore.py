"""The leader, and only the leader, removes from the shared store what no checkpoint needs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest

from flwr_ha.coordination.coordinator import Coordinator, Leadership
from flwr_ha.coordination.memory import MemoryTree
from flwr_ha.model import Head, Position
from flwr_ha.replica.eventlog import EventLog
from flwr_ha.replica.holdings import Holdings
from flwr_ha.replica.sharedstore import SharedStoreCollector
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.checkpoint import Checkpoint, save
from flwr_ha.storage.objectstore import ObjectStorage

LIMIT_S = 30.0
RUN = "17"


@dataclass
class Site:
    """A replica with an own disk; several of them share a coordinator and a store."""

    coordinator: Coordinator
    blobs: BlobStore
    storage: ObjectStorage
    collector: SharedStoreCollector
    is_leader: list[bool]
    digests: list[set[str]] = field(default_factory=list)

    def commit(self, leadership: Leadership, server_round: int, *, run_id: str = RUN) -> set[str]:
        """Commit a round with a large array, which is a blob of its own; return all its digests."""
        arrays = {"model": np.random.default_rng([server_round, int(run_id)]).normal(size=50_000)}
        saved = save(Checkpoint(run_id=run_id, server_round=server_round, num_rounds=9, arrays=arrays), self.blobs)
        digests = {saved.digest, *saved.parts}
        assert len(digests) == 2
        self.storage.protect(sorted(digests), timeout_s=LIMIT_S)
        position = Position(leadership.term, server_round, saved.digest)
        head = Head(run_id=run_id, app="a/b", num_rounds=9, position=position, model_digest="m", size_bytes=1)
        self.coordinator.commit(leadership, head)
        return digests

    @property
    def stored(self) -> set[str]:
        """What lies in the shared store."""
        return set(self.storage._objects.digests())


class World:
    """Replicas of one cluster, as many as a test asks for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tree = MemoryTree()
        self.url = f"file://{folder / 'shared'}"

    def site(self, replica_id: int, *, is_leader: bool = True) -> Site:
        """Return a replica with an empty disk."""
        store = self.tree.store(session_timeout_s=60.0)
        store.start(lambda: None, timeout_s=1.0)
        coordinator = Coordinator(store, replica_id=replica_id, instance=str(replica_id))
        identity = coordinator.identity()
        folder = self.folder / f"replica-{replica_id}"
        blobs = BlobStore(folder / "store")
        storage = ObjectStorage(f"{self.url}/{identity}", blobs)
        leads = [is_leader]
        collector = SharedStoreCollector(
            storage,
            Holdings(blobs, storage, coordinator, keep_checkpoints=2),
            identity=identity,
            read_identity=coordinator.identity,
            is_leader=lambda: leads[0],
            events=EventLog(folder / "events.jsonl", replica_id=replica_id),
        )
        return Site(coordinator, blobs, storage, collector, leads)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Let each blob be old as soon as it is stored."""
    monkeypatch.setattr("flwr_ha.storage.objects.GRACE_S", -1.0)
    return World(tmp_path)


def test_kept_checkpoints_of_all_runs_stay_and_older_ones_go(world: World) -> None:
    """The newest two of each run, with their parts, as on the replicas' own disks."""
    site = world.site(0)
    leadership = site.coordinator.campaign("a test")
    assert leadership is not None
    rounds = [site.commit(leadership, server_round) for server_round in (1, 2, 3, 4)]
    other = site.commit(leadership, 1, run_id="18")
    never_committed = site.blobs.put(b"the leader died before the commit")
    site.storage.protect([never_committed], timeout_s=LIMIT_S)

    gone = set(site.collector.collect())

    assert gone == rounds[0] | rounds[1] | {never_committed}
    assert site.stored == rounds[2] | rounds[3] | other


def test_successor_with_an_empty_disk_removes_no_part_of_a_checkpoint_that_it_has_never_seen(world: World) -> None:
    """It reads in the store what each kept checkpoint refers to."""
    old = world.site(0)
    leadership = old.coordinator.campaign("a test")
    assert leadership is not None
    rounds = [old.commit(leadership, server_round) for server_round in (1, 2, 3)]

    gone = set(world.site(1).collector.collect())

    assert gone == rounds[0]
    assert old.stored == rounds[1] | rounds[2]


def test_standby_removes_nothing(world: World) -> None:
    """Nor does a leader whose lease has run out."""
    site = world.site(0, is_leader=False)
    digest = site.blobs.put(b"of no use")
    site.storage.protect([digest], timeout_s=LIMIT_S)

    assert site.collector.collect() == ()
    assert site.stored == {digest}
    site.is_leader[0] = True
    assert site.collector.collect() == (digest,)


def test_nothing_is_removed_while_a_kept_checkpoint_cannot_be_read(world: World) -> None:
    """Nobody knows which parts it needs."""
    old = world.site(0)
    leadership = old.coordinator.campaign("a test")
    assert leadership is not None
    digests = old.commit(leadership, 1)
    head = old.coordinator.head(RUN)
    assert head is not None
    old.storage._objects._folder.delete(head.position.digest)

    assert world.site(1).collector.collect() == ()
    assert old.stored == digests - {head.position.digest}


def test_nothing_is_removed_once_the_coordinator_has_lost_its_data(world: World) -> None:
    """The blobs are all that is left of the runs; a fresh coordinator does not know that anybody needs them."""
    site = world.site(0)
    leadership = site.coordinator.campaign("a test")
    assert leadership is not None
    digests = site.commit(leadership, 1)
    world.tree = MemoryTree()
    empty = world.site(1)
    site.collector._holdings._coordinator = empty.coordinator
    site.collector._read_identity = empty.coordinator.identity

    assert site.collector.collect() == ()
    assert site.stored == digests
    assert empty.collector.collect() == ()
    assert site.stored == digests


def test_leadership_that_ends_meanwhile_ends_the_collection(world: World) -> None:
    """It is asked for again before each blob."""
    site = world.site(0)
    site.storage.protect([site.blobs.put(b"of no use")], timeout_s=LIMIT_S)
    site.collector._is_leader = iter([True, False]).__next__

    assert site.collector.collect() == ()
    assert len(site.stored) == 1
