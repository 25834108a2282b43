"""A ServerApp that is killed: started again a few times, then its run fails and says why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flwr_ha.local.cluster import SERVERAPP, LocalCluster, Plan
from flwr_ha.local.processes import wait_until

pytestmark = [pytest.mark.processes, pytest.mark.timeout(300)]

APPS = Path(__file__).parents[1] / "apps"
RESTARTS = 2


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Run one replica: a ServerApp's death is no failover."""
    plan = Plan(replicas=1, is_embedded=True, supernodes=0, settings={"serverapp-restarts": RESTARTS})
    with LocalCluster(tmp_path_factory.mktemp("death"), plan) as cluster:
        cluster.start()
        yield cluster


def flower_run(cluster: LocalCluster, run_id: str) -> dict[str, Any]:
    """Return a run as Flower lists it."""
    runs = json.loads(cluster.flwr("ls", "ha", "--format", "json"))["runs"]
    found: dict[str, Any] = next(run for run in runs if str(run["run-id"]) == run_id)
    return found


def test_killed_serverapp_fails_after_its_restarts(cluster: LocalCluster) -> None:
    """Killed each time: it is started again `serverapp-restarts` times, then the run is failed, with the reason."""
    run_id = cluster.submit(APPS / "faulty", how="killed")
    run = cluster.wait_run(run_id, lambda run: run["state"] == "failed", timeout_s=180.0, what="the run fails")

    assert f"was ended by signal 9 without a result; it was started again {RESTARTS} times in term 1" in run["reason"]
    assert flower_run(cluster, run_id)["status"] == "finished:failed"
    mine = [event for event in cluster.get("/events") if event.get("run_id") == run_id]
    assert [event["kind"] for event in mine if event["kind"] in ("serverapp-died", "error")] == [
        *["serverapp-died"] * RESTARTS,
        "error",
    ]
    log = cluster.flwr("log", run_id, "ha", "--show")
    assert f"it starts again (restart {RESTARTS} of {RESTARTS} in term 1)" in log
    assert "the limit: the run fails" in log


def test_killed_once_it_goes_on(cluster: LocalCluster) -> None:
    """Killed from outside, once: it starts again under the same run id and ends well."""
    run_id = cluster.submit(
        APPS / "sleeper", seconds=20.0
    )  # much longer than its log takes to be seen on a busy machine
    wait_until(
        lambda: "the sleeper sleeps" in cluster.flwr("log", run_id, "ha", "--show"),
        timeout_s=60.0,
        what="the ServerApp runs",
        poll_s=0.5,
    )
    cluster.kill_part(0, SERVERAPP)
    cluster.wait_run(run_id, lambda run: run["state"] == "finished", timeout_s=180.0, what="the run finishes")
    assert cluster.flwr("log", run_id, "ha", "--show").count("the sleeper sleeps") == 2
