"""What a replica keeps on its own disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flwr_ha.coordination.coordinator import Coordinator
from flwr_ha.coordination.memory import MemoryTree
from flwr_ha.model import Head, Position
from flwr_ha.replica.holdings import Holdings
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.checkpoint import Checkpoint, save
from flwr_ha.storage.committed import read_committed
from flwr_ha.storage.digests import BlobMissingError
from flwr_ha.storage.replication import Replicator


def _coordinator() -> Coordinator:
    store = MemoryTree().store(session_timeout_s=60.0)
    store.start(lambda: None, timeout_s=1.0)
    return Coordinator(store, replica_id=0, instance="only")


def _commit(coordinator: Coordinator, blobs: BlobStore, run_id: str, rounds: int) -> list[set[str]]:
    """Commit rounds of a run, each of two blobs; return the digests of each."""
    leadership = coordinator.campaign("a test")
    assert leadership is not None
    found = []
    for server_round in range(1, rounds + 1):
        arrays = {"model": np.random.default_rng([server_round, int(run_id)]).normal(size=50_000)}
        saved = save(Checkpoint(run_id=run_id, server_round=server_round, num_rounds=9, arrays=arrays), blobs)
        position = Position(leadership.term, server_round, saved.digest)
        head = Head(run_id=run_id, app="a/b", num_rounds=9, position=position, model_digest="m", size_bytes=1)
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
        first.follow(before.view(), is_leader=True)
        first.collect(before.view())
        assert set(blobs.digests()) == lost[1] | lost[2]
        new = _commit(after, blobs, "18", rounds=3)

        second = Holdings(blobs, storage, after, keep_checkpoints=2)
        second.follow(after.view(), is_leader=True)
        second.collect(after.view())

    assert set(blobs.digests()) == lost[1] | lost[2] | new[1] | new[2]
    assert {run_id: len(log) for run_id, log in read_committed(tmp_path).items()} == {"17": 3, "18": 3}


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
