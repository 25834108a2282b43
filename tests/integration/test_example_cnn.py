"""The main job: the example trains eight rounds of its CNN while the leader is killed in the middle of round 3."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from flwr_ha.local.cluster import REPLICA_TIMEOUT_S, Plan
from flwr_ha.local.processes import wait_until
from flwr_ha.storage import checkpoint
from flwr_ha.storage.blobs import BlobStore
from tests.integration.observed import ROUND_TIMEOUT_S, MakeCluster, ObservedRun, at_s, wait_next_term

pytestmark = [pytest.mark.processes, pytest.mark.zookeeper, pytest.mark.timeout(1800)]
ROOT = Path(__file__).parents[2]
ROUNDS = 8


def history(run: ObservedRun) -> dict[str, dict[str, object]]:
    """Return the metrics that the last checkpoint holds: the Result that the ServerApp returned."""
    head = run.commit_log()[-1]
    store = BlobStore(run.cluster.settings.replica_dir(head.copies[0]) / "store")
    return dict(checkpoint.load(head.position.digest, store).history)


def copied_example(folder: Path) -> Path:
    """Copy the app: an edit in the project during the test would make it another app, with a run of its own."""
    folder.mkdir()
    for name in ("server_app.py", "client_app.py", "task.py", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_cnn_trains_on_through_the_death_of_its_leader(cluster: MakeCluster, tmp_path: Path) -> None:
    """Same run, same nodes, eight rounds committed once each, a full Result, and a model that has learned."""
    app, environment = copied_example(tmp_path / "app"), {"PYTHONPATH": str(ROOT)}
    made = cluster(Plan(app=app, supernodes=5, session_timeout_s=4.0, environment=environment))
    made.start()

    def submitted() -> list[str]:
        return [run["run_id"] for run in (made.get("/cluster") or {"runs": []})["runs"] if run["nodes_online"] == 5]

    (run_id,) = wait_until(submitted, timeout_s=2 * REPLICA_TIMEOUT_S, what="the example's run on five SuperNodes")
    run = ObservedRun(made, run_id)
    assert run.wait_middle_of_round(2, timeout_s=4 * ROUND_TIMEOUT_S) == 2
    leader, term = made.wait_leader(timeout_s=30.0), made.get("/cluster")["term"]

    killed_at_s, killed_s = time.time(), time.monotonic()
    made.replicas[leader].kill_tree()
    successor = made.wait_leader(timeout_s=30.0, other_than=leader)
    answered_s = time.monotonic() - killed_s

    assert successor != leader
    assert at_s(wait_next_term(made, after=term)) - killed_at_s < made.plan.session_timeout_s + 2.0
    assert answered_s < made.plan.session_timeout_s + 2.0
    finished = run.wait_finished(timeout_s=8 * ROUND_TIMEOUT_S)
    run.check_finished(ROUNDS)
    assert finished["server_round"] == ROUNDS
    assert finished["metrics"][str(ROUNDS)]["accuracy"] >= 0.93
    rounds = {str(server_round) for server_round in range(1, ROUNDS + 1)}
    told = history(run)
    assert {part: set(told[part]) - {"0"} for part in ("train", "server")} == {"train": rounds, "server": rounds}
    assert {head.position.term for head in run.commit_log()} == {1, 2}
