"""A leader that is frozen, or whose ZooKeeper has no majority, does no harm: nothing is lost or committed twice."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator

import numpy as np
import pytest

from flwr_ha.errors import FencedError
from flwr_ha.local.cluster import SUPERLINK, LocalCluster, Plan
from flwr_ha.local.processes import wait_until
from flwr_ha.serverapp.replica_session import ReplicaSession
from flwr_ha.storage.checkpoint import Checkpoint
from tests.chaos.committer import APP, Committer, session_of
from tests.chaos.evidence import events_of, reader
from tests.chaos.faults import ask_switchover

pytestmark = [pytest.mark.processes, pytest.mark.zookeeper, pytest.mark.timeout(300)]

SESSION_S = 2.0
LONG_S = 60.0  # a machine that does much else is slow
RUN = "1000000000000000001"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Run three replicas on ZooKeeper without SuperNodes; each test leaves all of them running."""
    plan = Plan(supernodes=0, session_timeout_s=SESSION_S)
    with LocalCluster(tmp_path_factory.mktemp("leader"), plan) as made:
        made.start()
        yield made


@pytest.fixture
def committer(cluster: LocalCluster) -> Iterator[Committer]:
    """Commit round after round of one run, and check at the end that no round was lost or committed twice."""
    _wait_whole(cluster)
    with Committer(cluster, RUN, num_rounds=100_000) as committing:
        _wait_progress(committing, 3)
        yield committing
        _wait_progress(committing, 3)
    assert committing.errors == []
    with reader(cluster) as facts:
        log = facts.commit_log(RUN)
    assert [head.position.server_round for head in log] == list(range(1, len(log) + 1))
    terms = [head.position.term for head in log]
    assert terms == sorted(terms)


def test_leader_frozen_for_three_session_timeouts_commits_nothing_and_becomes_a_standby(
    cluster: LocalCluster, committer: Committer
) -> None:
    """The case that fencing exists for: it wakes up in the belief that it still leads."""
    old = cluster.wait_leader(timeout_s=LONG_S)
    settings = session_of(cluster, old)
    assert settings is not None
    stale = ReplicaSession(settings, run_id=RUN, app=APP)
    assert stale.head() is not None
    frozen = cluster.replicas[old]
    superlink = frozen.find(SUPERLINK)

    frozen.freeze()
    frozen_s = time.monotonic()
    new = cluster.wait_leader(timeout_s=LONG_S, other_than=old)
    before = committer.round
    _wait_progress(committer, 3)  # on a machine that all share it serves at the very address of the frozen one
    wait_until(lambda: time.monotonic() > frozen_s + 3 * SESSION_S, timeout_s=LONG_S, what="three session timeouts")
    frozen.thaw()

    with pytest.raises(FencedError):
        stale.commit(_checkpoint(committer.round + 1), {})
    stale.close()
    wait_until(lambda: frozen.find(SUPERLINK) not in (None, superlink), timeout_s=LONG_S, what="a fresh SuperLink")
    _wait_whole(cluster)
    assert cluster.leader() == new
    assert committer.round > before
    ended = [event for event in events_of(cluster, new) if event["kind"] == "fenced"]
    assert str(superlink) in ended[-1]["message"]


def test_superlink_of_a_frozen_agent_closes_its_public_socket_before_the_session_ends(
    cluster: LocalCluster, committer: Committer
) -> None:
    """The lease lies in shared memory: the SuperLink watches it by itself."""
    leader = cluster.wait_leader(timeout_s=LONG_S)
    agent = cluster.replicas[leader]
    assert _is_open(cluster.address)

    frozen_s = time.monotonic()
    os.kill(agent.pid, signal.SIGSTOP)
    try:
        wait_until(lambda: not _is_open(cluster.address), timeout_s=LONG_S, what="a closed socket", poll_s=0.005)
        closed_s = time.monotonic() - frozen_s
        new = cluster.wait_leader(timeout_s=LONG_S, other_than=leader)
    finally:
        os.kill(agent.pid, signal.SIGCONT)

    assert closed_s < SESSION_S
    _wait_whole(cluster)
    assert cluster.leader() == new


def test_nobody_leads_without_a_majority_of_zookeeper_and_training_goes_on_once_it_is_back(
    cluster: LocalCluster, committer: Committer
) -> None:
    """Two of three nodes do not answer: the leader steps down by its own clock, and nothing is lost."""
    assert cluster.ensemble is not None
    before = committer.round

    for index in (0, 1):
        cluster.ensemble.freeze(index)
    try:
        wait_until(lambda: cluster.leader() is None, timeout_s=LONG_S, what="no leader")
        wait_until(lambda: not _is_open(cluster.address), timeout_s=SESSION_S, what="a closed socket")
        alone_s = time.monotonic()
        while time.monotonic() < alone_s + 3 * SESSION_S:
            assert cluster.leader() is None
            assert not _is_open(cluster.address)
        stopped_at = committer.round
    finally:
        for index in (0, 1):
            cluster.ensemble.thaw(index)
    back_s = time.monotonic()
    wait_until(lambda: committer.round > stopped_at, timeout_s=LONG_S, what="the next round")

    assert stopped_at >= before
    assert time.monotonic() - back_s < 10.0


@pytest.mark.parametrize("name", ["stand-down.begin", "stand-down.after-kill"])
def test_leader_killed_while_it_hands_over_is_replaced(cluster: LocalCluster, committer: Committer, name: str) -> None:
    """It has not resigned yet: the others find out when its session ends."""
    victim = (cluster.wait_leader(timeout_s=LONG_S) + 1) % 3
    cluster.replicas[victim].kill_tree()
    cluster.start_replica(victim, environment={"FLWR_HA_FAILPOINT": f"{name}:kill"})
    _wait_ready(cluster, victim)
    ask_switchover(cluster, victim)
    wait_until(lambda: cluster.leader() == victim, timeout_s=LONG_S, what="the switchover")
    _wait_progress(committer, 1)

    ask_switchover(cluster, (victim + 1) % 3)

    assert cluster.replicas[victim].wait(LONG_S) == -signal.SIGKILL
    cluster.wait_leader(timeout_s=LONG_S, other_than=victim)
    cluster.start_replica(victim)
    _wait_ready(cluster, victim)


def _checkpoint(server_round: int) -> Checkpoint:
    return Checkpoint(run_id=RUN, server_round=server_round, num_rounds=100_000, arrays={"model": np.full(1000, 7.0)})


def _wait_progress(committer: Committer, rounds: int) -> None:
    goal = committer.round + rounds
    wait_until(lambda: committer.round >= goal, timeout_s=LONG_S, what=f"round {goal}")


def _wait_ready(cluster: LocalCluster, replica_id: int) -> None:
    """Wait for a replica that was just started: its last life's record may still be shown as running."""

    def is_ready() -> bool:
        return (cluster.get("/readiness", replica_id=replica_id) or {}).get("status") == "ok"

    wait_until(is_ready, timeout_s=LONG_S, what=f"replica {replica_id} to be ready", poll_s=0.1)
    _wait_whole(cluster)


def _wait_whole(cluster: LocalCluster) -> None:
    def is_whole() -> bool:
        state = cluster.get("/cluster")
        return (
            state is not None and state["leader"] is not None and {r["state"] for r in state["replicas"]} == {"running"}
        )

    wait_until(is_whole, timeout_s=LONG_S, what="a leader and running standbys", poll_s=0.1)
    cluster.wait_leader(timeout_s=LONG_S)


def _is_open(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=0.5).close()
    except OSError:
        return False
    return True
