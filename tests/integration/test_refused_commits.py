"""What a replica cannot keep or cannot read is refused as a whole, and training goes on once the cause is gone."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest

from flwr_ha.coordination.coordinator import Coordinator
from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import wait_until
from flwr_ha.model import Head, Position
from flwr_ha.replica.main import make_store
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.tensorfile import format_header, layout
from tests.integration.observed import NUMPY_APP, ROUND_TIMEOUT_S, MakeCluster, ObservedRun, all_events, start_run

pytestmark = [pytest.mark.processes, pytest.mark.timeout(400)]
FILE_LIMIT_BYTES = 3 * 1024**2
MODEL_SIZE = 1024**2  # 4 MiB of float32


def limit_files(cluster: LocalCluster, limit_bytes: int) -> None:
    """Let no process of replica 0 write a file beyond this size; stands for a full disk, which needs root."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for pid in cluster.replicas[0].tree():
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit_bytes, hard))


def files_below(folder: Path) -> list[Path]:
    """Return what a store holds, but for its lock."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "lock")


def test_full_disk_refuses_the_commit_until_there_is_room(cluster: MakeCluster) -> None:
    """The run waits and says for what; no half file is left; with room again the very round is committed."""
    made = cluster(Plan(replicas=1, supernodes=1, is_embedded=True))
    made.start()
    folder = made.settings.replica_dir(0) / "store"
    limit_files(made, FILE_LIMIT_BYTES)

    run_id = made.submit(NUMPY_APP, num_server_rounds=1, min_nodes=1, size=MODEL_SIZE, fraction_evaluate=0.0)
    waiting = made.wait_run(
        run_id,
        lambda run: "cannot be written" in run["reason"],
        timeout_s=ROUND_TIMEOUT_S,
        what="the commit to be refused",
    )

    assert str(folder) in waiting["reason"]
    assert "File too large" in waiting["reason"]
    assert (waiting["state"], waiting["server_round"], waiting["checkpoint"]) == ("waiting", 0, None)
    assert all(file.stat().st_size < FILE_LIMIT_BYTES for file in files_below(folder))
    store = BlobStore(folder)
    assert all(store.is_good(digest) for digest in store.digests())

    limit_files(made, resource.RLIM_INFINITY)
    made.wait_run(
        run_id, lambda run: run["state"] == "finished", timeout_s=2 * ROUND_TIMEOUT_S, what="the end of the run"
    )
    ObservedRun(made, run_id).check_finished(1)


def commit_of_the_future(cluster: LocalCluster, run: ObservedRun) -> Position:
    """Commit the next round as a newer flwr_ha would, with a checkpoint of a format that is not known yet."""
    header = format_header(layout([]), {"flwr_ha": json.dumps({"format": 99})})
    digest = BlobStore(cluster.settings.replica_dir(0) / "store").put(header)
    store = make_store(cluster.settings)
    store.start(lambda: None, timeout_s=15.0)
    coordinator = Coordinator(store, replica_id=0, instance="a newer version")
    try:
        coordinator.join({}, wait_timeout_s=10.0)
        leadership = wait_until(lambda: coordinator.campaign("an upgrade"), timeout_s=10.0, what="the leadership")
        newest = run.commit_log()[-1]
        position = Position(leadership.term, newest.position.server_round + 1, digest)
        head = Head(
            run_id=run.run_id,
            app=newest.app,
            num_rounds=newest.num_rounds,
            position=position,
            model_digest="",
            size_bytes=len(header),
            copies=(0,),
        )
        coordinator.commit(leadership, head)
        coordinator.resign(leadership)
    finally:
        store.close()
    return position


def test_checkpoint_of_a_newer_version_is_not_touched(cluster: MakeCluster) -> None:
    """After a downgrade the replica does not lead: it says why, and leaves the newer round as it is."""
    made = cluster(Plan(replicas=1, supernodes=1, is_embedded=True, session_timeout_s=1.0))
    made.start()
    run = start_run(made, num_server_rounds=100, min_nodes=1)
    run.wait_round(1)
    made.replicas[0].kill_tree()
    position = commit_of_the_future(made, run)

    made.start_replica(0)

    def refusal() -> str:
        stops = [event for event in all_events(made) if event["kind"] == "stand-down"]
        return str(stops[-1]["message"]) if stops else ""

    reason = wait_until(refusal, timeout_s=60.0, what="the takeover to be refused", poll_s=0.1)
    assert position.digest in reason
    assert "newer" in reason
    assert made.leader() is None
    assert run.commit_log()[-1].position == position
