"""One of three ZooKeeper nodes is lost; the cluster keeps its leader and its term."""

from __future__ import annotations

import pytest

from tests.integration.observed import ObservedRun

pytestmark = [
    pytest.mark.processes,
    pytest.mark.zookeeper,
    pytest.mark.timeout(300),
]
NODES = range(3)


@pytest.mark.parametrize("is_leader", [False, True], ids=["follower", "leader"])
def test_leader_stays_when_one_zookeeper_node_is_lost(training: ObservedRun, is_leader: bool) -> None:
    """Two nodes are a majority: sessions move over, rounds are committed, and nobody else is elected."""
    cluster, ensemble = training.cluster, training.cluster.ensemble
    assert ensemble is not None
    before = cluster.get("/cluster")
    server_round = training.wait_middle_of_round()
    lost = next(node for node in NODES if (node == ensemble.leader_index()) is is_leader)

    ensemble.kill(lost)
    try:
        training.wait_round(server_round + 2)  # the one that was running, and a whole one without the node

        after = cluster.get("/cluster")
        assert (after["leader"], after["term"]) == (before["leader"], before["term"])
        assert [replica["state"] for replica in after["replicas"]] == ["running"] * 3
    finally:
        ensemble.start_node(lost)
        ensemble.wait_ready(30.0)
