"""Committed models can be taken out of a cluster, up or down, and nothing else can."""

import json
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from flwr_ha.config import load_secret, parse_settings
from flwr_ha.errors import CheckpointError, ConfigError, CoordinationError
from flwr_ha.exporting import committed_rounds, export_round, write_state_dict
from flwr_ha.local.zookeeper import free_ports
from flwr_ha.model import Head, Position
from flwr_ha.replica.api import create_api
from flwr_ha.replica.apiserver import ApiServer
from flwr_ha.replica.blobapi import blob_api
from flwr_ha.settings import Settings
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.checkpoint import Checkpoint, save
from flwr_ha.storage.committed import read_committed, write_committed
from flwr_ha.storage.objectstore import ObjectStorage

RUN = "12"
ROUNDS = 4
KEPT = 2


def model(server_round: int) -> dict[str, np.ndarray]:
    """Return a small array and one that is a part blob of its own."""
    return {"bias": np.full(3, server_round, np.float32), "weight": np.full(100_000, server_round, np.float32)}


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Return a cluster of three replicas that is down."""
    ports = free_ports(4)
    replicas = [{"id": n, "address": f"127.0.0.1:{ports[0]}", "api": f"127.0.0.1:{ports[1 + n]}"} for n in range(3)]
    table = {"cluster": "c", "coordinator": "embedded:x", "keep-checkpoints": KEPT, "replicas": replicas}
    return parse_settings(table, folder=tmp_path)


@pytest.fixture
def heads(settings: Settings) -> list[Head]:
    """Commit four rounds on replicas 0 and 1; only the newest two are kept there."""
    stores = [BlobStore(settings.replica_dir(n) / "store") for n in range(2)]
    heads = []
    for server_round in range(1, ROUNDS + 1):
        checkpoint = Checkpoint(run_id=RUN, server_round=server_round, num_rounds=ROUNDS, arrays=model(server_round))
        for store in stores:
            saved = save(checkpoint, store)
        heads.append(
            Head(
                run_id=RUN,
                app="a/b",
                num_rounds=ROUNDS,
                position=Position(1, server_round, saved.digest),
                model_digest=saved.model_digest,
                size_bytes=saved.size_bytes,
                copies=(0, 1),
                committed_at="2026-11-24T03:00:00Z",
            )
        )
        if server_round <= ROUNDS - KEPT:
            for store in stores:
                store.delete(saved.digest)
    for store in stores:
        write_committed(store.root, {RUN: heads})
    return heads


def corrupt(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_newest_round_is_exported_with_the_cluster_down(settings, heads, tmp_path):
    """A replica's folder is enough."""
    out = tmp_path / "model.safetensors"
    entry = export_round(settings, RUN, None, out)

    assert entry["server_round"] == ROUNDS
    arrays = load_file(out)
    np.testing.assert_array_equal(arrays["weight"], model(ROUNDS)["weight"])
    np.testing.assert_array_equal(arrays["bias"], model(ROUNDS)["bias"])


def test_chosen_round_is_exported(settings, heads, tmp_path):
    """Any round that is kept will do."""
    export_round(settings, RUN, ROUNDS - 1, tmp_path / "m")
    assert load_file(tmp_path / "m")["bias"][0] == ROUNDS - 1


def test_list_says_which_rounds_are_kept(settings, heads):
    """All committed rounds are listed, the newest ones as kept."""
    entries = committed_rounds(settings, RUN)
    assert [entry["server_round"] for entry in entries] == [1, 2, 3, 4]
    assert [entry["kept"] for entry in entries] == [False, False, True, True]


def test_round_that_is_not_kept_names_those_that_are(settings, heads, tmp_path):
    """The user learns what can be had."""
    with pytest.raises(CheckpointError, match=r"round 1 of run 12 has no good copy .* kept are the rounds 3, 4"):
        export_round(settings, RUN, 1, tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == [".flwr-ha"]


def test_round_that_is_not_committed_is_refused(settings, heads, tmp_path):
    """A checkpoint that lies there but was never committed cannot be asked for."""
    with pytest.raises(CheckpointError, match="round 9 of run 12 is not committed: rounds 1 to 4 are"):
        export_round(settings, RUN, 9, tmp_path / "m")


def test_unknown_run_names_the_known_ones(settings, heads):
    """A typing error is easy to see."""
    with pytest.raises(CheckpointError, match="run 13 has no committed round in cluster 'c'; runs: 12"):
        committed_rounds(settings, "13")


def test_corrupt_copy_is_passed_over_for_a_good_one(settings, heads, tmp_path):
    """The first replica's copy has a flipped bit: the second one's is written."""
    first = BlobStore(settings.replica_dir(0) / "store")
    corrupt(first.path(heads[-1].position.digest))
    export_round(settings, RUN, None, tmp_path / "m")
    np.testing.assert_array_equal(load_file(tmp_path / "m")["weight"], model(ROUNDS)["weight"])


def test_blobs_of_two_damaged_replicas_make_one_good_model(settings, heads, tmp_path):
    """One replica lost the main blob, the other one a part."""
    first, second = (BlobStore(settings.replica_dir(n) / "store") for n in range(2))
    first.delete(heads[-1].position.digest)
    for digest in second.digests():
        if second.size(digest) > 300_000:
            second.delete(digest)
    export_round(settings, RUN, None, tmp_path / "m")
    np.testing.assert_array_equal(load_file(tmp_path / "m")["weight"], model(ROUNDS)["weight"])


def test_unreadable_commit_log_is_passed_over_for_a_good_one(settings, heads, tmp_path):
    """One damaged file does not hide what the other replica knows."""
    (settings.replica_dir(0) / "store" / "committed" / f"{RUN}.json").write_text("{")
    assert len(committed_rounds(settings, RUN)) == ROUNDS
    (settings.replica_dir(1) / "store" / "committed" / f"{RUN}.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"12\.json is not JSON"):
        committed_rounds(settings, RUN)


def test_blobs_come_from_the_shared_folder_where_the_cluster_uses_one(settings, heads, tmp_path):
    """The replicas' own copies are gone, the object store still has them where the replicas have written them."""
    shared = replace(settings, storage=f"file://{tmp_path / 'shared'}/")
    move_blobs(shared, shared.shared_url("this"))
    export_round(shared, RUN, None, tmp_path / "m")
    np.testing.assert_array_equal(load_file(tmp_path / "m")["weight"], model(ROUNDS)["weight"])


def test_blobs_come_from_the_bucket_where_the_cluster_uses_one(settings, heads, tmp_path):
    """The same behind fsspec."""
    shared = replace(settings, storage=f"memory://{uuid.uuid4().hex}/prefix")
    move_blobs(shared, shared.shared_url("this"))
    export_round(shared, RUN, None, tmp_path / "m")
    np.testing.assert_array_equal(load_file(tmp_path / "m")["weight"], model(ROUNDS)["weight"])


def test_other_folders_in_the_shared_store_do_not_hide_the_good_copy(settings, heads, tmp_path):
    """An earlier cluster of this name has other blobs, another one a bad copy, and a third folder holds none at all."""
    shared = replace(settings, storage=f"file://{tmp_path / 'shared'}")
    prefix = tmp_path / "shared" / settings.cluster
    bad = BlobStore(prefix / "b-bad").path(heads[-1].position.digest)
    bad.write_bytes(b"other bytes")
    BlobStore(prefix / "a-empty")
    (prefix / "c-nothing").mkdir()
    move_blobs(shared, shared.shared_url("this"))
    export_round(shared, RUN, None, tmp_path / "m")
    np.testing.assert_array_equal(load_file(tmp_path / "m")["weight"], model(ROUNDS)["weight"])
    assert list((prefix / "c-nothing").iterdir()) == []


@pytest.mark.parametrize("url", ["file://{}/none", "memory://{}"])
def test_shared_store_without_the_blobs_is_named(url, settings, heads, tmp_path):
    """The user sees where it was looked for, and which rounds there are."""
    shared = replace(settings, storage=url.format(tmp_path))
    for replica_id in range(2):
        shutil.rmtree(settings.replica_dir(replica_id) / "store" / "blobs")
    with pytest.raises(CheckpointError, match=rf"{shared.shared_prefix} holds no blobs.*kept are the rounds 3, 4"):
        export_round(shared, RUN, None, tmp_path / "m")


def move_blobs(settings: Settings, url: str) -> None:
    """Put the blobs of replica 0 into an object store as a replica does, and remove the replicas' own copies."""
    first = BlobStore(settings.replica_dir(0) / "store")
    with ObjectStorage(url, first) as storage:
        storage.protect(first.digests(), timeout_s=30.0)
    for replica_id in range(2):
        store = BlobStore(settings.replica_dir(replica_id) / "store")
        for digest in store.digests():
            store.delete(digest)


def test_all_copies_corrupt_is_an_error_and_writes_nothing(settings, heads, tmp_path):
    """Garbage is never exported."""
    for replica_id in range(2):
        corrupt(BlobStore(settings.replica_dir(replica_id) / "store").path(heads[-1].position.digest))
    with pytest.raises(CheckpointError, match="no good copy"):
        export_round(settings, RUN, None, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_export_without_cluster_and_folder_says_that_nobody_answers(settings):
    """Neither REST nor a folder: the cluster is to be started first."""
    with pytest.raises(CoordinationError, match="no replica has its folder"):
        committed_rounds(settings, RUN)


def test_folders_into_which_nobody_may_look_are_passed_over(settings):
    """The replicas' folders may be another user's; too long a name is refused to root as well."""
    foreign = replace(settings, data_dir=settings.data_dir / ("a" * 300))
    with pytest.raises(CoordinationError, match=r"no replica has its folder in .*, or none to be read"):
        committed_rounds(foreign, RUN)


class UpReplica:
    """What the REST API needs to answer for the commits."""

    def commits(self, run_id: str) -> list[dict] | None:
        return [head.to_json() for head in self.log] if run_id == RUN else None

    def cluster(self) -> dict:
        return {"cluster": "c", "term": 1, "leader": 2, "paused": False, "replicas": [], "runs": [{"run_id": RUN}]}

    def __init__(self, log: list[Head]) -> None:
        self.log = log


def test_export_fetches_from_a_replica_on_another_machine(settings, heads, tmp_path):
    """With the cluster up and no folder here, commits and blobs come over the replicas' API."""
    elsewhere = tmp_path / "elsewhere"
    shutil.move(settings.replica_dir(0), elsewhere)
    shutil.rmtree(settings.replica_dir(1))
    secret = load_secret(settings)
    routes, _ = blob_api(BlobStore(elsewhere / "store"), secret=secret, max_bytes=10**9)
    with ApiServer(settings.replicas[2].api, tls=settings.tls) as server:
        server.start(create_api(UpReplica(heads), secret=secret, routes=routes))
        export_round(settings, RUN, None, tmp_path / "m")
        with pytest.raises(CheckpointError, match="run 13 has no committed round in cluster 'c'; runs: 12"):
            committed_rounds(settings, "13")
    np.testing.assert_array_equal(load_file(tmp_path / "m")["weight"], model(ROUNDS)["weight"])


def test_missing_folder_for_the_output_is_named(settings, heads, tmp_path):
    """It is a wrong argument, not a broken checkpoint."""
    with pytest.raises(ConfigError, match="there is no folder"):
        export_round(settings, RUN, None, tmp_path / "none" / "m")


def test_state_dict_is_what_torch_loads(settings, heads, tmp_path):
    """The file works with ``load_state_dict``."""
    torch = pytest.importorskip("torch")
    export_round(settings, RUN, None, tmp_path / "m")
    write_state_dict(tmp_path / "m", tmp_path / "m.pt")
    state = torch.load(tmp_path / "m.pt", weights_only=True)
    assert list(state) == ["bias", "weight"]
    assert state["weight"].shape == (100_000,)


def test_commit_log_of_a_newer_version_is_refused(settings, heads):
    """An unknown format is not guessed at."""
    root = settings.replica_dir(0) / "store"
    assert read_committed(root, RUN)[-1]["server_round"] == ROUNDS
    (root / "committed" / f"{RUN}.json").write_text(json.dumps({"format": 2, "commits": []}))
    with pytest.raises(CheckpointError, match="newer flwr_ha"):
        read_committed(root, RUN)
