"""With a shared store no replica holds copies of another: a successor with an empty disk goes on all the same."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
from moto.server import ThreadedMotoServer

from flwr_ha.local.cluster import LocalCluster, Plan
from flwr_ha.local.processes import wait_until
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.checkpoint import load
from tests.chaos.committer import Committer
from tests.chaos.evidence import reader
from tests.chaos.miniature import model_after
from tests.chaos.stage import Stage, stage_in

pytestmark = [
    pytest.mark.processes,
    pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning"),  # Flower's own migrations
]
ROUNDS = 4


@pytest.fixture(params=["file", "s3"])
def stage(request: pytest.FixtureRequest, tmp_path: Path, flower_database: Path) -> Iterator[Stage]:
    """Give each of three replicas a disk, and all of them a shared folder or a bucket."""
    with stage_in(tmp_path, flower_database) as made:
        if request.param == "file":
            yield replace(made, peers={}, storage=f"file://{tmp_path / 'shared'}")
            return
        server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        server.start()
        try:
            host, port = server.get_host_and_port()
            secrets = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}
            environment = {"AWS_ENDPOINT_URL": f"http://{host}:{port}", **secrets}
            system = fsspec.filesystem("s3", endpoint_url=environment["AWS_ENDPOINT_URL"], key="test", secret="test")
            system.mkdir("models")
            yield replace(made, peers={}, storage="s3://models/prefix", environment=environment)
        finally:
            server.stop()


def test_successor_goes_on_from_the_shared_store_alone(stage: Stage) -> None:
    """The leader dies in the middle of a commit; nobody but the store has its rounds."""
    died = stage.start(0, rounds=ROUNDS, failpoint="commit.before-transaction:kill:3")
    assert died.returncode == -signal.SIGKILL, died.stderr
    head, log, _, _ = stage.facts()
    assert head is not None
    assert log == [1]
    assert head.copies == (0,)
    assert not BlobStore(stage.folder / "replica-1" / "store").has(head.position.digest)

    went_on = stage.start(1, rounds=ROUNDS)

    assert went_on.returncode == 0, went_on.stderr
    head, log, _, terms = stage.facts()
    assert head is not None
    assert log == [1, 2, 3, 4]
    assert terms == 2
    loaded = load(head.position.digest, BlobStore(stage.folder / "replica-1" / "store"))
    assert np.array_equal(loaded.arrays["model"], model_after(ROUNDS))


def test_replicas_keep_their_rounds_below_the_name_and_the_identity_of_their_cluster(tmp_path: Path) -> None:
    """Another cluster of the same name may use the same bucket."""
    shared = tmp_path / "shared"
    plan = Plan(replicas=2, supernodes=0, is_embedded=True, settings={"storage": f"file://{shared}"})
    with LocalCluster(tmp_path / "cluster", plan) as cluster:
        cluster.start()
        with Committer(cluster, "1000000000000000001", num_rounds=3) as committer:
            wait_until(lambda: committer.is_finished, timeout_s=60.0, what="three rounds")
        with reader(cluster) as facts:
            digests = {head.position.digest for head in facts.commit_log(committer.run_id)}
        (folder,) = (shared / "local").iterdir()
        assert len(folder.name) == 32
        assert digests <= set(BlobStore(folder).digests())
