"""The leader's whole process tree is killed; the run ends as if nothing had happened."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest

from flwr_ha.local.cluster import Plan
from tests.integration.observed import MakeCluster, ObservedRun, at_s, heal, start_run, wait_next_term

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]


def check_trained_once(folder: Path, rounds: int) -> None:
    """Check that each client has trained each round exactly once: what it had finished was not asked for again."""
    for partition in range(2):
        lines = (folder / f"partition-{partition}").read_text(encoding="utf-8").splitlines()
        assert Counter(lines) == {f"train {server_round}": 1 for server_round in range(1, rounds + 1)}


def check_log_of_flower(run: ObservedRun, rounds: int) -> None:
    """Check that the Result that the ServerApp got at the end holds all rounds, and that `flwr log` shows it."""
    log = run.cluster.flwr("log", run.run_id, "ha", "--show")
    assert f"result rounds {list(range(1, rounds + 1))}" in log


@pytest.mark.zookeeper
def test_run_survives_two_leaders(cluster: MakeCluster, tmp_path: Path) -> None:
    """One after the other dies, each comes back as a standby; no round is lost, no client works twice."""
    environment = {"FLWR_HA_TEST_CALLS": str(tmp_path / "calls")}
    made = cluster(Plan(supernodes=2, environment=environment))
    made.start()
    run = start_run(made, num_server_rounds=5, min_nodes=2, step_s=1.0)
    leaders: list[int] = []

    for server_round in (1, 3):
        run.wait_middle_of_round(server_round)
        leader, term = made.wait_leader(timeout_s=30.0), made.get("/cluster")["term"]
        made.replicas[leader].kill_tree()
        leading = wait_next_term(made, after=term)
        assert leading["replica"] != leader
        assert heal(made) == leading["replica"]  # the killed one is back, and is a standby
        leaders.append(leader)
    finished = run.wait_finished()

    assert finished["server_round"] == 5
    run.check_finished(5)
    check_trained_once(tmp_path / "calls", 5)
    check_log_of_flower(run, 5)
    history = made.get("/history")
    assert [change["leader"] for change in history[:2]] == leaders
    assert [change["term"] for change in history] == [1, 2, 3]


def test_run_survives_its_leader_without_zookeeper(cluster: MakeCluster, tmp_path: Path) -> None:
    """The embedded coordinator on one machine: killed processes hold nothing, so a standby leads at once."""
    environment = {"FLWR_HA_TEST_CALLS": str(tmp_path / "calls")}
    made = cluster(Plan(supernodes=2, is_embedded=True, environment=environment))
    made.start()
    run = start_run(made, num_server_rounds=3, min_nodes=2, step_s=1.0)
    run.wait_middle_of_round(1)
    leader, term = made.wait_leader(timeout_s=30.0), made.get("/cluster")["term"]

    killed_at_s = time.time()
    made.replicas[leader].kill_tree()
    leading = wait_next_term(made, after=term)

    assert leading["replica"] != leader
    assert at_s(leading) - killed_at_s < made.plan.session_timeout_s + 2.0
    run.wait_finished()
    run.check_finished(3)
    check_trained_once(tmp_path / "calls", 3)
    check_log_of_flower(run, 3)
