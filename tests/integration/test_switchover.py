"""Planned handovers on real processes: nothing is lost, nothing is trained twice."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import WaitTimeoutError, wait_until
from flwr_ha.operator import Operator
from tests.integration.observed import all_events, at_s, heal, start_run, wait_next_term

LONGEST_GAP_S = 2.0


def gap_s(cluster: LocalCluster, term: int) -> float:
    """Return the seconds in which nobody served before this term."""
    events = all_events(cluster)
    ended = next(event for event in events if event["kind"] == "stand-down" and event["term"] == term - 1)
    began = next(event for event in events if event["kind"] == "leading" and event["term"] == term)
    return at_s(began) - at_s(ended)


def repeated_trainings(calls: Path) -> dict[tuple[str, str], int]:
    """Return the trainings that a client has done more than once, from the lines that the app has written."""
    count: Counter[tuple[str, str]] = Counter()
    for file in calls.glob("partition-*"):
        count.update((file.name, line) for line in file.read_text().splitlines() if line.startswith("train"))
    assert count, "no training was noted"
    return {key: number for key, number in count.items() if number > 1}


def test_planned_handovers_cost_nothing_but_a_pause(tmp_path: Path) -> None:
    """Switchover, SIGTERM, pause and a rolling restart in one run: each round once, each training once."""
    calls = tmp_path / "calls"
    plan = Plan(supernodes=2, session_timeout_s=4.0, environment={"FLWR_HA_TEST_CALLS": str(calls)})
    with LocalCluster(tmp_path / "cluster", plan) as cluster:
        cluster.start()
        run = start_run(cluster, num_server_rounds=10_000, min_nodes=2, step_s=1.0)
        operator = Operator(cluster.settings)

        # switchover: the round that runs is committed under the old term
        committed = run.wait_middle_of_round(1)
        leader, term = heal(cluster), operator.get("/cluster")["term"]
        candidate = (leader + 1) % 3
        operator.post("/switchover", {"candidate": candidate})
        assert wait_next_term(cluster, after=term, timeout_s=120.0)["replica"] == candidate
        assert run.commit_log()[committed].position.term == term
        assert gap_s(cluster, term + 1) < LONGEST_GAP_S
        run.wait_round(committed + 2)

        # SIGTERM: at once, in the middle of a round, and the clients answer from their cache
        committed = run.wait_middle_of_round()
        heal(cluster)
        term = operator.get("/cluster")["term"]
        assert cluster.replicas[candidate].stop(timeout_s=10.0) == 0
        wait_next_term(cluster, after=term)
        assert gap_s(cluster, term + 1) < LONGEST_GAP_S
        run.wait_round(committed + 1)

        # pause: nobody takes over until it is resumed, and everybody says so
        leader = heal(cluster)
        operator.post("/pause", {})
        wait_until(
            lambda: all((cluster.get("/cluster", replica_id=i) or {}).get("paused") for i in cluster.replicas),
            timeout_s=10.0,
            what="a paused cluster on every replica",
        )
        term = operator.get("/cluster")["term"]
        cluster.replicas[leader].kill_tree()
        wait_until(
            lambda: (operator.get("/cluster")["leader"] is None) or None,
            timeout_s=20.0,
            what="a cluster without leader",
        )
        with pytest.raises(WaitTimeoutError):
            wait_until(lambda: operator.get("/cluster")["term"] > term, timeout_s=5.0, what="a failover in the pause")
        operator.post("/resume", {})
        wait_next_term(cluster, after=term)

        # rolling restart of all three
        for replica_id in range(3):
            heal(cluster)
            committed = run.wait_middle_of_round()
            assert cluster.replicas[replica_id].stop(timeout_s=10.0) == 0
            heal(cluster)
            run.wait_round(committed + 1)
        run.check_commits()
        run.check_supernodes()
        assert repeated_trainings(calls) == {}
