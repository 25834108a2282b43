"""No round trains or counts with fewer than min_nodes replies; below it training waits, says why, and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from flwr_ha.local.cluster import Plan
from tests.integration.observed import NUMPY_APP, ROUND_TIMEOUT_S, MakeCluster, ObservedRun

pytestmark = [pytest.mark.processes, pytest.mark.timeout(600)]


def trained(folder: Path, server_round: int) -> set[int]:
    """Return the partitions whose client has trained in this round."""
    return {
        int(file.name.removeprefix("partition-"))
        for file in folder.glob("partition-*")
        if f"train {server_round}" in file.read_text(encoding="utf-8").splitlines()
    }


def test_round_waits_for_the_fifth_node(cluster: MakeCluster, tmp_path: Path) -> None:
    """Four are not enough to start a round, nor to end one when the fifth leaves in the middle of it."""
    calls = tmp_path / "calls"
    made = cluster(Plan(replicas=1, supernodes=4, is_embedded=True, environment={"FLWR_HA_TEST_CALLS": str(calls)}))
    made.start()
    run_id = made.submit(NUMPY_APP, num_server_rounds=3, min_nodes=5, step_s=3.0, fraction_evaluate=0.0)

    def wait_short() -> dict[str, object]:
        return made.wait_run(
            run_id,
            lambda run: run["state"] == "waiting" and run["reason"] == "4 of 5 nodes online",
            timeout_s=ROUND_TIMEOUT_S,
            what="the fifth node to be missed",
        )

    waiting = wait_short()
    assert (waiting["server_round"], waiting["nodes_online"], waiting["min_nodes"]) == (0, 4, 5)
    assert not calls.exists()

    made.start_supernode(4)
    made.wait_run(run_id, lambda run: run["nodes_online"] == 5, timeout_s=ROUND_TIMEOUT_S, what="the fifth node")
    run = ObservedRun(made, run_id)
    run.wait_round(1)
    assert trained(calls, 1) == {0, 1, 2, 3, 4}

    server_round = run.wait_middle_of_round(1) + 1
    made.supernodes.pop(4).stop(timeout_s=30.0)
    waiting = wait_short()
    assert waiting["server_round"] == server_round - 1

    made.start_supernode(5)
    run.wait_finished()
    run.check_commits()
    assert len(run.commit_log()) == 3
    for each in range(server_round, 4):
        assert trained(calls, each) >= {0, 1, 2, 3, 5}
