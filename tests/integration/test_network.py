"""A network with a host for each part: hosts fall silent, or find some of the others no more."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flwr_ha.local.processes import Program, wait_until
from tests.chaos.evidence import events_of
from tests.chaos.network import NetworkChaos, cut
from tests.chaos.plans import Cut, FaultPlan, Step
from tests.chaos.plans import Path as NetworkPath
from tests.network import REPLICAS, Network, NetworkCluster, address

pytestmark = [
    pytest.mark.processes,
    pytest.mark.zookeeper,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root"),
    pytest.mark.skipif(shutil.which("haproxy") is None, reason="haproxy is not installed (tests/install.sh)"),
]

APP = Path(__file__).parents[1] / "apps" / "numpy_app"
SESSION_TIMEOUT_S = 4.0
FLOWER_TIMEOUT_S = 30.0  # of one request, and Flower's pauses between its tries grow up to 20 s
FLOWER_PAUSE_S = 20.0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NetworkCluster]:
    """Build the network and start ZooKeeper, three replicas and HAProxy on it."""
    with Network() as network:
        folder = tmp_path_factory.mktemp("network")
        with NetworkCluster(folder, network, session_timeout_s=SESSION_TIMEOUT_S) as cluster:
            cluster.start()
            cluster.wait_leader(timeout_s=180.0)
            cluster.wait_haproxy()
            yield cluster


@pytest.fixture
def supernodes(cluster: NetworkCluster, request: pytest.FixtureRequest) -> Iterator[list[Program]]:
    """Start a SuperNode on each client host, on the address that the test names; end them after it."""
    nodes = [cluster.start_supernode(f"client-{index}", request.param, index) for index in (0, 1)]
    yield nodes
    for node in nodes:
        node.stop(timeout_s=30.0)  # Flower forgets it at once, where one that was killed counts for a minute


def cut_leader(cluster: NetworkCluster) -> tuple[int, list[int], float]:
    """Pull the cable of the leader's host; return it, the others, and when it was."""
    leader = cluster.wait_leader(timeout_s=60.0)
    others = [replica_id for replica_id in REPLICAS if replica_id != leader]
    cluster.network.cut(REPLICAS[leader])
    return leader, others, time.monotonic()


def heal(cluster: NetworkCluster, replica_id: int) -> None:
    """Put the cable back, and wait until that replica is a standby again."""
    cluster.network.heal(REPLICAS[replica_id])
    wait_until(
        lambda: (cluster.get("/replica", [replica_id]) or {}).get("status") == "ok",
        timeout_s=120.0,
        what="the old leader is a standby",
        poll_s=0.2,
    )


@pytest.mark.parametrize("supernodes", [f"{address('haproxy')}:8000"], indirect=True, ids=["haproxy"])
def test_haproxy_leads_to_the_new_leader_in_seconds(
    cluster: NetworkCluster, supernodes: list[Program], record_property: pytest.RecordProperty
) -> None:
    """With HAProxy a silent leader costs the session timeout and less than five seconds more, and no round."""
    run_id = cluster.submit(APP, num_server_rounds=4, min_nodes=2, step_s=1.0)
    wait_until(lambda: cluster.committed_round(run_id) >= 1, timeout_s=240.0, what="round 1 is committed", poll_s=0.2)
    old, others, cut_s = cut_leader(cluster)
    before = cluster.committed_round(run_id, others)
    new = cluster.wait_leader(others, timeout_s=60.0)
    led_s = time.monotonic() - cut_s
    cluster.wait_reached(new, {"haproxy"}, timeout_s=60.0)
    reached_s = time.monotonic() - cut_s
    record_property("leader_s", round(led_s, 1))
    record_property("haproxy_s", round(reached_s, 1))
    print(json.dumps({"new leader after s": round(led_s, 1), "SuperNode through HAProxy after s": round(reached_s, 1)}))
    assert reached_s < SESSION_TIMEOUT_S + 5.0

    wait_until(
        lambda: cluster.committed_round(run_id, others) >= 4, timeout_s=240.0, what="the run goes on", poll_s=0.2
    )
    assert before >= 1
    assert all(node.is_alive for node in supernodes)
    heal(cluster, old)
    assert cluster.leader([old]) is None, "the old leader is back and does not lead"


@pytest.mark.parametrize("supernodes", ["flower:8000"], indirect=True, ids=["name"])
def test_a_name_with_three_addresses_leads_to_the_new_leader(
    cluster: NetworkCluster, supernodes: list[Program], record_property: pytest.RecordProperty
) -> None:
    """Without a load balancer SuperNodes find the new leader by themselves, after Flower's own time-outs."""
    leader = cluster.wait_leader(timeout_s=60.0)
    cluster.wait_reached(leader, {"client-0", "client-1"}, timeout_s=120.0)
    old, others, cut_s = cut_leader(cluster)
    new = cluster.wait_leader(others, timeout_s=60.0)
    cluster.wait_reached(new, {"client-0", "client-1"}, timeout_s=3 * (FLOWER_TIMEOUT_S + FLOWER_PAUSE_S))
    reached_s = time.monotonic() - cut_s
    record_property("name_s", round(reached_s, 1))
    print(json.dumps({"both SuperNodes through the name after s": round(reached_s, 1)}))
    assert all(node.is_alive for node in supernodes)
    heal(cluster, old)


@pytest.fixture(scope="module")
def training(cluster: NetworkCluster) -> NetworkChaos:
    """Let two SuperNodes train without end; the tests above must be over."""
    return NetworkChaos(cluster, seed=1)


def test_leader_that_reaches_no_standby_commits_nothing_and_the_state_of_its_run_says_why(
    cluster: NetworkCluster, training: NetworkChaos
) -> None:
    """It still leads, since ZooKeeper answers, and its SuperNodes train; healed, that very round is committed."""
    leader = cluster.wait_leader(timeout_s=60.0)
    term = cluster.get("/cluster")["term"]
    known = len(events_of(cluster, leader))

    def reason() -> str:
        runs = (cluster.get("/cluster", [leader]) or {"runs": []})["runs"]
        run = next(run for run in runs if run["run_id"] == training.run_id)
        return run["reason"] if run["state"] == "waiting" and "copies" in run["reason"] else ""

    with cut(cluster, leader, NetworkPath.TO_REPLICAS):
        why = wait_until(reason, timeout_s=120.0, what="the reason", poll_s=0.1)
        stopped_at = training.round
        hold_s = time.monotonic() + 2 * SESSION_TIMEOUT_S
        wait_until(lambda: time.monotonic() > hold_s, timeout_s=60.0, what="two session timeouts")
        assert training.round == stopped_at
        assert cluster.leader([leader]) == leader

    assert f"committing round {stopped_at + 1}: 0 of 1 needed copies on other replicas were made" in why
    assert all(f"replica {other} (" in why for other in REPLICAS if other != leader)
    logged = [event["message"] for event in events_of(cluster, leader)[known:] if event["kind"] == "not-committed"]
    assert any("0 of 1 needed copies" in message and training.run_id in message for message in logged)
    training.wait_rounds(2)
    assert (cluster.leader(), cluster.get("/cluster")["term"]) == (leader, term)


def test_no_invariant_is_broken_by_cuts_of_each_kind(training: NetworkChaos) -> None:
    """The leader from ZooKeeper, from both standbys, from its clients and from all; a standby from all."""
    steps = [Step(fault=Cut(path, 2.0), is_leader_hit=True, after_commits=1, delay_s=0.0) for path in NetworkPath]
    steps.append(Step(fault=Cut(NetworkPath.TO_ALL, 2.0), is_leader_hit=False, after_commits=1, delay_s=0.0))

    assert training.carry_out(FaultPlan(seed=0, steps=tuple(steps)))
    report = training.report()

    assert report.violations == ()
    assert report.faults.total() == 5
    assert not report.repeated
    assert report.takeovers >= 2
