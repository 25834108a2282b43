"""The quickstart by hand: one replica is started, and the others when somebody gets to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from flwr_ha.local.cluster import REPLICA_TIMEOUT_S, Plan
from flwr_ha.local.processes import wait_until
from tests.integration.observed import MakeCluster
from tests.integration.test_example_cnn import ROOT, copied_example

pytestmark = [pytest.mark.processes, pytest.mark.zookeeper, pytest.mark.timeout(300)]


def test_app_of_a_replica_that_is_alone_is_submitted_once_there_is_a_majority(
    cluster: MakeCluster, tmp_path: Path
) -> None:
    """Alone it could not make the run safe; its withdrawn submission would count as a run that has ended."""
    app = copied_example(tmp_path / "app")
    made = cluster(Plan(app=app, supernodes=0, session_timeout_s=4.0, environment={"PYTHONPATH": str(ROOT)}))
    made.start_coordinator()
    first = made.start_replica(0)
    made.wait_leader(timeout_s=REPLICA_TIMEOUT_S)
    wait_until(
        lambda: "1 of 2 needed replicas run" in first.log_text(),
        timeout_s=30.0,
        what="the first replica waits for another one",
    )

    made.start_replica(1)

    def runs() -> list[tuple[str, str]]:
        return [(run["state"], run["reason"]) for run in (made.get("/cluster") or {"runs": []})["runs"]]

    wait_until(runs, timeout_s=REPLICA_TIMEOUT_S, what="the run of the example")
    waiting = [("waiting", "0 of 5 nodes online")]
    wait_until(lambda: runs() == waiting, timeout_s=REPLICA_TIMEOUT_S, what="the ServerApp waits for SuperNodes")
