"""Corrupt copies and full disks: another copy is taken, another replica leads, and nothing is trained on garbage."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import wait_until
from flwr_ha.model import Head
from flwr_ha.storage.checkpoint import references
from tests.chaos.committer import Committer
from tests.chaos.evidence import reader
from tests.chaos.faults import ask_switchover, empty_disk, fill_disk, flip_bit, small_disk, store_of

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

LONG_S = 60.0
SIZE = 20_000
PAUSE_S = 0.3
DISK_BYTES = 400 * 1024**2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Run three replicas without SuperNodes, each on a small disk of its own."""
    plan = Plan(supernodes=0, is_embedded=True, session_timeout_s=2.0)
    folder = tmp_path_factory.mktemp("storage")
    with ExitStack() as disks:
        for replica_id in range(plan.replicas):
            disks.enter_context(small_disk(folder / "data" / f"replica-{replica_id}", DISK_BYTES))
        with LocalCluster(folder, plan) as made:
            made.start()
            yield made


def test_each_corrupt_copy_in_turn_is_replaced_by_a_good_one(cluster: LocalCluster) -> None:
    """Whoever leads finds its copy bad, fetches another one, and training goes on from the same model."""
    run_id = "2000000000000000001"
    first = cluster.wait_leader(timeout_s=LONG_S)
    for turn, victim in enumerate((first, (first + 1) % 3, (first + 2) % 3), start=1):
        head = _commit_until(cluster, run_id, 3 * turn)
        _wait_everywhere(cluster, head)
        _lead(cluster, victim)
        _corrupt(cluster, victim, head)

        _commit_until(cluster, run_id, 3 * turn + 1)

        store = store_of(cluster, victim)
        assert all(store.is_good(digest) for digest in _digests(cluster, victim, head))
        assert list((store.root / "corrupt").iterdir())
        told = [event["message"] for event in cluster.get("/events", replica_id=victim) if event["kind"] == "repaired"]
        assert len(told) == 1


def test_without_a_good_copy_nothing_is_trained_and_the_checkpoint_before_is_named(cluster: LocalCluster) -> None:
    """All three copies of the newest checkpoint are bad."""
    run_id = "2000000000000000002"
    head = _commit_until(cluster, run_id, 3)
    with reader(cluster) as facts:
        previous = facts.commit_log(run_id)[-2].position
    _wait_everywhere(cluster, head)
    for replica_id in cluster.replicas:
        _corrupt(cluster, replica_id, head)

    with Committer(cluster, run_id, num_rounds=5, size=SIZE) as committer:
        wait_until(lambda: committer.errors, timeout_s=LONG_S, what="an error")

    assert "round 3 has no good copy" in committer.errors[0]
    assert f"the previous kept checkpoint is round 2, {previous.digest}" in committer.errors[0]
    assert committer.resumed == []
    assert _head(cluster, run_id) == head


def test_full_disk_of_a_standby_is_reported_and_commits_go_on(cluster: LocalCluster) -> None:
    """A majority is left; the replica catches up once its disk has room."""
    run_id = "2000000000000000003"
    with Committer(cluster, run_id, num_rounds=10_000, size=SIZE, pause_s=PAUSE_S) as committer:
        _wait_progress(committer, 2)
        leader = cluster.wait_leader(timeout_s=LONG_S)
        victim = (leader + 1) % 3
        folder = cluster.settings.replica_dir(victim)
        fill_disk(folder)
        try:
            _wait_event(cluster, victim, "disk", "is full")
            _wait_progress(committer, 3)
            head = _head(cluster, run_id)
            assert victim not in head.copies
            assert cluster.leader() == leader
        finally:
            empty_disk(folder)
        _wait_event(cluster, victim, "disk", "has room again")
    assert committer.errors == []
    _wait_everywhere(cluster, _head(cluster, run_id))


def test_leader_whose_disk_is_full_passes_the_leadership_on(cluster: LocalCluster) -> None:
    """It could not commit another round; a standby can, without a loss."""
    run_id = "2000000000000000004"
    with Committer(cluster, run_id, num_rounds=10_000, size=SIZE, pause_s=PAUSE_S) as committer:
        _wait_progress(committer, 2)
        leader = cluster.wait_leader(timeout_s=LONG_S)
        folder = cluster.settings.replica_dir(leader)
        fill_disk(folder)
        try:
            cluster.wait_leader(timeout_s=LONG_S, other_than=leader)
            _wait_progress(committer, 3)
            _wait_event(cluster, leader, "stand-down", "is full")
            assert "is full" in cluster.get("/readiness", replica_id=leader)["reason"]
        finally:
            empty_disk(folder)
        _wait_event(cluster, leader, "disk", "has room again")
        wait_until(lambda: cluster.get("/readiness", replica_id=leader)["reason"] == "", timeout_s=LONG_S, what="ready")
    assert committer.errors == []
    with reader(cluster) as facts:
        rounds = [head.position.server_round for head in facts.commit_log(run_id)]
    assert rounds == list(range(1, len(rounds) + 1))


def _commit_until(cluster: LocalCluster, run_id: str, num_rounds: int) -> Head:
    with Committer(cluster, run_id, num_rounds=num_rounds, size=SIZE) as committer:
        wait_until(lambda: committer.is_finished, timeout_s=LONG_S, what=f"{num_rounds} rounds ({committer.errors})")
    assert committer.errors == []
    return _head(cluster, run_id)


def _head(cluster: LocalCluster, run_id: str) -> Head:
    with reader(cluster) as facts:
        head = facts.head(run_id)
    assert head is not None
    return head


def _digests(cluster: LocalCluster, replica_id: int, head: Head) -> tuple[str, ...]:
    digest = head.position.digest
    return (digest, *references(digest, store_of(cluster, replica_id)))


def _wait_everywhere(cluster: LocalCluster, head: Head) -> None:
    stores = [store_of(cluster, replica_id) for replica_id in cluster.replicas]
    digest = head.position.digest

    def is_there() -> bool:
        return all(store.has(digest) and all(store.has(part) for part in references(digest, store)) for store in stores)

    wait_until(is_there, timeout_s=LONG_S, what=f"round {head.position.server_round} on all replicas")


def _corrupt(cluster: LocalCluster, replica_id: int, head: Head) -> None:
    digest = _digests(cluster, replica_id, head)[-1]
    flip_bit(store_of(cluster, replica_id).path(digest), 12_345)


def _lead(cluster: LocalCluster, replica_id: int) -> None:
    """Have a replica lead."""
    wait_until(
        lambda: all(replica["state"] == "running" for replica in cluster.get("/cluster")["replicas"]),
        timeout_s=LONG_S,
        what="running replicas",
    )
    if cluster.wait_leader(timeout_s=LONG_S) != replica_id:
        ask_switchover(cluster, replica_id)
        wait_until(lambda: cluster.leader() == replica_id, timeout_s=LONG_S, what="the switchover")


def _wait_progress(committer: Committer, rounds: int) -> None:
    goal = committer.round + rounds
    wait_until(lambda: committer.round >= goal, timeout_s=LONG_S, what=f"round {goal}")


def _wait_event(cluster: LocalCluster, replica_id: int, kind: str, words: str) -> None:
    def told() -> bool:
        events = cluster.get("/events", replica_id=replica_id) or []
        return any(event["kind"] == kind and words in event["message"] for event in events)

    wait_until(told, timeout_s=LONG_S, what=f"the event {kind!r} of replica {replica_id}")
