"""Parts of the leader end one by one; each time training goes on under the same run id, on the same SuperNodes."""

from __future__ import annotations

import os
import signal
import time

import pytest

from flwr_ha.local.cluster import SERVERAPP, SUPEREXEC, SUPERLINK
from tests.integration.observed import (
    ObservedRun,
    all_events,
    at_s,
    seconds_until_gone,
    wait_next_term,
    wait_serverapp,
)

pytestmark = [
    pytest.mark.processes,
    pytest.mark.zookeeper,
    pytest.mark.timeout(300),
]


def test_dead_superlink_is_replaced_within_two_seconds(training: ObservedRun) -> None:
    """The agent gives its leadership up at once: nobody waits for the session to end, which takes 4 s."""
    cluster = training.cluster
    leader, term = cluster.wait_leader(timeout_s=30.0), cluster.get("/cluster")["term"]

    killed_at_s = time.time()
    cluster.kill_part(leader, SUPERLINK)
    leading = wait_next_term(cluster, after=term)

    assert at_s(leading) - killed_at_s < 2.0
    assert leading["term"] == term + 1
    assert leading["replica"] != leader
    assert cluster.replicas[leader].is_alive  # it comes back as a standby, see the `training` fixture


def test_dead_agent_takes_its_whole_tree_along_within_a_second(training: ObservedRun) -> None:
    """No orphan of an old term goes on: neither SuperLink, nor SuperExec, nor ServerApp."""
    cluster = training.cluster
    leader, term = cluster.wait_leader(timeout_s=30.0), cluster.get("/cluster")["term"]
    wait_serverapp(cluster, leader)
    agent = cluster.replicas[leader]
    parts = tuple(agent.find(words) for words in (SUPERLINK, SUPEREXEC, SERVERAPP))
    assert None not in parts
    tree = agent.tree()

    killed_s, killed_at_s = time.monotonic(), time.time()
    agent.kill()

    assert seconds_until_gone(tree, since_s=killed_s, timeout_s=10.0) < 1.0
    leading = wait_next_term(cluster, after=term)
    assert leading["replica"] != leader
    assert at_s(leading) - killed_at_s < cluster.plan.session_timeout_s + 2.0


def test_killed_serverapp_starts_again_in_the_same_term(training: ObservedRun) -> None:
    """The out-of-memory killer, say: the replica leads on and has Flower start the ServerApp again."""
    cluster = training.cluster
    leader, term = cluster.wait_leader(timeout_s=30.0), cluster.get("/cluster")["term"]
    server_round = training.wait_middle_of_round()
    old = wait_serverapp(cluster, leader)

    os.kill(old, signal.SIGKILL)
    wait_serverapp(cluster, leader, other_than=old)
    training.wait_round(server_round + 1)

    assert (cluster.leader(), cluster.get("/cluster")["term"]) == (leader, term)
    deaths = [event for event in all_events(cluster) if event["kind"] == "serverapp-died"]
    assert deaths[-1]["run_id"] == training.run_id
    assert "signal 9" in deaths[-1]["message"]


def test_sigterm_hands_the_leadership_over_within_two_seconds(training: ObservedRun) -> None:
    """An orderly stop: the exit status is 0, and a standby serves before a session could have ended."""
    cluster = training.cluster
    leader, term = cluster.wait_leader(timeout_s=30.0), cluster.get("/cluster")["term"]
    tree = cluster.replicas[leader].tree()

    stopped_at_s = time.time()
    status = cluster.replicas[leader].stop(timeout_s=20.0)
    leading = wait_next_term(cluster, after=term)

    assert status == 0
    assert at_s(leading) - stopped_at_s < 2.0
    assert leading["replica"] != leader
    seconds_until_gone(tree, since_s=time.monotonic(), timeout_s=5.0)


def test_run_goes_on_after_all_replicas_were_killed(training: ObservedRun) -> None:
    """A power cut: whichever replica leads then, it goes on after the last committed round."""
    cluster = training.cluster
    committed = len(training.commit_log())
    for replica in cluster.replicas.values():
        replica.freeze()  # at one moment, so that none can take over from another
    for replica in cluster.replicas.values():
        replica.kill_tree()
    newest = training.commit_log()[-1].position

    for replica_id in cluster.replicas:
        cluster.start_replica(replica_id)
    cluster.wait_leader(timeout_s=60.0)
    training.wait_round(newest.server_round + 1)

    assert newest.server_round >= committed
    following = training.commit_log()[newest.server_round].position
    assert following.term > newest.term
