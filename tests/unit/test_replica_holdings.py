"""What a replica keeps on its own disk."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest

from flwr_ha.coordination.coordinator import Coordinator
from flwr_ha.coordination.memory import MemoryTree
from flwr_ha.errors import CheckpointError
from flwr_ha.model import Head, Position
from flwr_ha.replica.holdings import Holdings
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.checkpoint import Checkpoint, save
from flwr_ha.storage.committed import committed_runs, read_committed
from flwr_ha.storage.digests import BlobCorruptError, BlobMissingError
from flwr_ha.storage.replication import Replicator


def _coordinator() -> Coordinator:
    store = MemoryTree().store(session_timeout_s=60.0)
    store.start(lambda: None, timeout_s=1.0)
    return Coordinator(store, replica_id=0, instance="only")


def follow(holdings: Holdings, coordinator: Coordinator, *, is_leader: bool = True) -> None:
    """Do what the pulse and the thread beside it do."""
    view = coordinator.view()
    holdings.logs.follow(view.heads)
    holdings.follow(view, is_leader=is_leader)


def _commit(
    coordinator: Coordinator, blobs: BlobStore, run_id: str, rounds: int, *, num_rounds: int = 9
) -> list[set[str]]:
    """Commit rounds of a run, each of two blobs; return the digests of each."""
    leader = coordinator.leader()
    if leader is not None:
        coordinator.disown(leader.term)
    leadership = coordinator.campaign("a test")
    assert leadership is not None
    found = []
    head = coordinator.head(run_id)
    for server_round in range(1 if head is None else head.position.server_round + 1, rounds + 1):
        arrays = {"model": np.random.default_rng([server_round, int(run_id)]).normal(size=50_000)}
        saved = save(Checkpoint(run_id=run_id, server_round=server_round, num_rounds=num_rounds, arrays=arrays), blobs)
        position = Position(leadership.term, server_round, saved.digest)
        head = Head(run_id=run_id, app="a/b", num_rounds=num_rounds, position=position, model_digest="m", size_bytes=1)
        coordinator.commit(leadership, head)
        found.append({saved.digest, *saved.parts})
    return found


def test_blobs_of_runs_that_the_coordinator_has_lost_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They, and the list that says which of them are rounds, are all that is left of those runs."""
    monkeypatch.setattr("flwr_ha.replica.holdings.MIN_AGE_S", -1.0)
    blobs = BlobStore(tmp_path)
    before, after = _coordinator(), _coordinator()
    lost = _commit(before, blobs, "17", rounds=3)
    with Replicator(blobs, [], secret="s") as storage:
        first = Holdings(blobs, storage, before, keep_checkpoints=2)
        follow(first, before)
        first.collect(before.view())
        assert set(blobs.digests()) == lost[1] | lost[2]
        new = _commit(after, blobs, "18", rounds=3)

        second = Holdings(blobs, storage, after, keep_checkpoints=2)
        follow(second, after)
        second.collect(after.view())

    assert set(blobs.digests()) == lost[1] | lost[2] | new[1] | new[2]
    assert {run_id: len(read_committed(tmp_path, run_id)) for run_id in committed_runs(tmp_path)} == {"17": 3, "18": 3}


def test_commit_log_of_the_run_that_went_on_is_written_alone(tmp_path: Path) -> None:
    """What a commit writes to the disk does not grow with the runs of the past, and a start writes nothing."""
    blobs, coordinator = BlobStore(tmp_path), _coordinator()
    for run_id in ("17", "18"):
        _commit(coordinator, blobs, run_id, rounds=2)
    with Replicator(blobs, [], secret="s") as storage:
        first = Holdings(blobs, storage, coordinator, keep_checkpoints=2)
        follow(first, coordinator)
        written = {path: path.stat().st_ino for path in (tmp_path / "committed").iterdir()}
        assert {path.name for path in written} == {"17.json", "18.json"}
        _commit(coordinator, blobs, "18", rounds=3)
        follow(first, coordinator)
        again = Holdings(blobs, storage, coordinator, keep_checkpoints=2)
        follow(again, coordinator)

    changed = {path.name for path, inode in written.items() if path.stat().st_ino != inode}
    assert changed == {"18.json"}
    assert [entry["server_round"] for entry in read_committed(tmp_path, "18")] == [1, 2, 3]


def test_unchanged_checkpoint_is_not_read_again_and_a_changed_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replica looks at all of them twice a second."""
    blobs, coordinator = BlobStore(tmp_path), _coordinator()
    (digests,) = _commit(coordinator, blobs, "17", rounds=1)
    opened: list[str] = []
    monkeypatch.setattr(blobs, "open", lambda digest: opened.append(digest) or BlobStore.open(blobs, digest))
    with Replicator(blobs, [], secret="s") as storage:
        holdings = Holdings(blobs, storage, coordinator, keep_checkpoints=2)
        for _ in range(3):
            follow(holdings, coordinator)
        assert len(opened) == 1
        assert holdings.holds == {"17": opened[0]}
        assert opened[0] in digests

        main = blobs.path(opened[0])
        main.write_bytes(b"other bytes")
        with pytest.raises(BlobCorruptError):
            follow(holdings, coordinator)
        assert not main.exists()


def test_blobs_on_their_way_to_a_commit_stay_however_long_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A big model over a slow link takes longer than what nothing names is left alone; two commits may share blobs."""
    monkeypatch.setattr("flwr_ha.replica.holdings.MIN_AGE_S", -1.0)
    blobs, coordinator = BlobStore(tmp_path), _coordinator()
    shared, other = blobs.put(b"shared by two runs"), blobs.put(b"of one run")
    with Replicator(blobs, [], secret="s") as storage:
        holdings = Holdings(blobs, storage, coordinator, keep_checkpoints=2)
        with holdings.pinned([shared]):
            with holdings.pinned([shared, other]):
                holdings.collect(coordinator.view())
                assert set(blobs.digests()) == {shared, other}
            holdings.collect(coordinator.view())
            assert blobs.digests() == (shared,)
        holdings.collect(coordinator.view())
        assert blobs.digests() == ()
        with pytest.raises(BlobMissingError, match=shared), holdings.pinned([shared]):
            raise AssertionError("it is not there")


def test_standby_hashes_what_it_would_go_on_with_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a start it has verified nothing; an election must not wait for it, nor for checkpoints of ended runs."""
    written, coordinator = BlobStore(tmp_path), _coordinator()
    unfinished = _commit(coordinator, written, "17", rounds=2)[-1]
    ended = _commit(coordinator, written, "18", rounds=2, num_rounds=2)[-1]
    (bad,) = [digest for digest in unfinished if written.size(digest) > 300_000]
    hashed: list[str] = []
    blobs = BlobStore(tmp_path)
    accept = blobs._accept
    monkeypatch.setattr(blobs, "_accept", lambda digest, *rest: hashed.append(digest) or accept(digest, *rest))
    with Replicator(blobs, [], secret="s") as storage:
        leader = Holdings(blobs, storage, coordinator, keep_checkpoints=2)
        follow(leader, coordinator, is_leader=True)
        assert bad not in hashed
        standby = Holdings(blobs, storage, coordinator, keep_checkpoints=2)
        for _ in range(2):
            follow(standby, coordinator, is_leader=False)
        assert sorted(hashed) == sorted(unfinished | {min(ended, key=written.size)})
        assert set(standby.holds) == {"17", "18"}

        data = bytearray(blobs.path(bad).read_bytes())
        data[1000] ^= 1
        blobs.path(bad).write_bytes(data)
        follow(standby, coordinator, is_leader=False)
        assert not blobs.path(bad).exists()
        assert standby.holds.keys() == {"18"}
        assert standby.lag_rounds == 2


def test_copy_that_nobody_gives_is_asked_for_more_and_more_seldom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A replica looks twice a second; its log tells of it once, and what was superseded is forgotten."""
    now_s, asked = [1000.0], []
    monkeypatch.setattr("flwr_ha.replica.holdings.time.monotonic", lambda: now_s[0])
    coordinator, blobs = _coordinator(), BlobStore(tmp_path / "own")
    _commit(coordinator, BlobStore(tmp_path / "other"), "17", rounds=1)

    class Nobody:
        def fetch(self, digests: list[str], *, timeout_s: float) -> None:
            asked.append(now_s[0] - 1000.0)
            raise CheckpointError("nobody answers")

    holdings = Holdings(blobs, Nobody(), coordinator, keep_checkpoints=2)
    for _ in range(80):
        follow(holdings, coordinator, is_leader=False)
        now_s[0] += 0.5
    assert asked == [1.0, 2.0, 4.0, 8.0, 16.0, 26.0, 36.0]
    assert len([entry for entry in caplog.records if "cannot be had yet" in entry.message]) == 1
    assert holdings.lag_rounds == 1

    _commit(coordinator, blobs, "17", rounds=2)
    follow(holdings, coordinator, is_leader=False)
    assert holdings.lag_rounds == 0
    assert holdings._wanted == {}


def test_what_is_published_does_not_grow_with_the_runs_of_the_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ZooKeeper takes a megabyte for each entry: the copies of the runs that went on last are shown."""
    monkeypatch.setattr("flwr_ha.replica.holdings.SHOWN_RUNS", 2)
    blobs, coordinator = BlobStore(tmp_path), _coordinator()
    with Replicator(blobs, [], secret="s") as storage:
        holdings = Holdings(blobs, storage, coordinator, keep_checkpoints=2)
        for run_id in ("17", "18", "19"):
            _commit(coordinator, blobs, run_id, rounds=1)
            time.sleep(0.002)  # commits are told apart by their time, in milliseconds
        follow(holdings, coordinator)
        assert set(holdings.checked) == set(holdings.holds) == {"18", "19"}
