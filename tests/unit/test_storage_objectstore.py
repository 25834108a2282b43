"""A durable store of others takes the place of the majority."""

import hashlib
import os
import secrets
import threading
from datetime import UTC, datetime, timedelta

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from flwr_ha.errors import CheckpointCorruptError, CheckpointError, ConfigError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.objectstore import ObjectStorage

LIMIT_S = 30.0
NOWHERE = "sha256:" + "0" * 64


@pytest.fixture
def own(tmp_path):
    return BlobStore(tmp_path / "own")


@pytest.fixture
def other(tmp_path):
    """Return the store of another replica."""
    return BlobStore(tmp_path / "other")


@pytest.fixture(scope="module")
def s3():
    """Run moto's S3 in this process and return its address."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["memory", "file", "s3"])
def url(request, tmp_path, monkeypatch):
    if request.param == "s3":
        monkeypatch.setenv("AWS_ENDPOINT_URL", request.getfixturevalue("s3"))
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        bucket = secrets.token_hex(8)
        fsspec.filesystem("s3", skip_instance_cache=True).mkdir(bucket)
        return f"s3://{bucket}/prefix"
    if request.param == "file":
        return f"file://{tmp_path / 'shared' / 'prefix'}"
    system = fsspec.filesystem("memory")
    if system.exists("/bucket"):
        system.rm("/bucket", recursive=True)
    return "memory://bucket/prefix"


def raw(url, digest):
    """Return fsspec's file system and the path of an object."""
    system, prefix = fsspec.core.url_to_fs(url)
    return system, f"{prefix}/blobs/{digest.removeprefix('sha256:')}"


def test_blob_goes_out_and_comes_back_elsewhere(own, other, url):
    """The object lies under its hash, and another replica gets the same bytes."""
    data = [os.urandom(size) for size in (0, 10, 3_000_000)]
    digests = [own.put(each) for each in data]
    with ObjectStorage(url, own) as storage:
        assert storage.protect(digests, needed=2, timeout_s=LIMIT_S) == ()
    system, path = raw(url, digests[2])
    assert system.cat_file(path) == data[2]
    with ObjectStorage(url, other) as storage:
        storage.fetch(digests, timeout_s=LIMIT_S)
        storage.fetch(digests, timeout_s=LIMIT_S)
    assert [other.read(digest) for digest in digests] == data


def test_object_that_is_there_is_not_stored_again(own, url):
    """An unchanged layer is not sent twice; an object of the wrong size is replaced."""
    digest = own.put(b"layer" * 1000)
    with ObjectStorage(url, own) as storage:
        storage.protect([digest], timeout_s=LIMIT_S)
        system, path = raw(url, digest)
        before = system.modified(path)
        storage.protect([digest], timeout_s=LIMIT_S)
        assert system.modified(path) == before
        system.pipe_file(path, b"half")
        storage.protect([digest], timeout_s=LIMIT_S)
        assert system.cat_file(path) == b"layer" * 1000


def test_corrupt_object_is_noticed(own, other, url):
    """What the store returns is verified like everything else."""
    digest = own.put(b"layer" * 1000)
    with ObjectStorage(url, own) as storage:
        storage.protect([digest], timeout_s=LIMIT_S)
    system, path = raw(url, digest)
    system.pipe_file(path, b"Layer" * 1000)
    with ObjectStorage(url, other) as storage, pytest.raises(CheckpointCorruptError, match=digest) as caught:
        storage.fetch([digest], timeout_s=LIMIT_S)
    assert url in str(caught.value)
    assert not other.has(digest)


def test_missing_object_is_named(own, url):
    """The operator reads which blob is not where."""
    with ObjectStorage(url, own) as storage:
        with pytest.raises(CheckpointError, match=f"{NOWHERE}.*it is not there"):
            storage.fetch([NOWHERE], timeout_s=LIMIT_S)
        with pytest.raises(CheckpointCorruptError, match=NOWHERE):
            storage.protect([NOWHERE], timeout_s=LIMIT_S)


def test_bad_own_copy_is_not_stored(own, url):
    """A damaged file is found before it becomes the only copy."""
    digest = own.put(b"data")
    own.path(digest).write_bytes(b"date")
    with ObjectStorage(url, own) as storage, pytest.raises(CheckpointCorruptError):
        storage.protect([digest], timeout_s=LIMIT_S)
    system, path = raw(url, digest)
    assert not system.exists(path)


class Failing:
    """Stands for a store that is down, or that hangs until the test ends."""

    def __init__(self, error=None):
        self.error, self.released = error, threading.Event()

    def put(self, store, digest):
        if self.error:
            raise self.error
        self.released.wait(LIMIT_S)


def test_store_that_fails_is_a_checkpoint_error(own, url):
    """Any library's error becomes ours, with the URL."""
    with ObjectStorage(url, own) as storage:
        storage._objects = Failing(RuntimeError("403 Forbidden"))
        with pytest.raises(CheckpointError, match="403 Forbidden") as caught:
            storage.protect([own.put(b"data")], timeout_s=LIMIT_S)
        assert url in str(caught.value)


def test_store_that_hangs_is_given_up(own, url):
    """The commit fails in time and can be tried again."""
    hanging = Failing()
    with ObjectStorage(url, own) as storage:
        storage._objects = hanging
        with pytest.raises(CheckpointError, match=r"within 0\.1 s"):
            storage.protect([own.put(b"data")], timeout_s=0.1)
        hanging.released.set()


def test_old_objects_are_collected_and_named_or_young_ones_kept(own, monkeypatch):
    """Age counts from the last time that an object was protected, give or take an hour."""
    url, clock = "memory://bucket/collect", [datetime.now(UTC)]
    kept, old = own.put(b"kept"), own.put(b"old")
    with ObjectStorage(url, own) as storage:
        system = storage._objects._system
        monkeypatch.setattr(storage._objects, "_age_s", lambda key: (clock[0] - system.modified(key)).total_seconds())
        storage.protect([kept, old], timeout_s=LIMIT_S)
        assert storage.collect([kept], min_age_s=0) == ()
        clock[0] += timedelta(hours=3)
        assert storage.collect([kept], min_age_s=4 * 3600) == ()
        assert storage.collect([kept], min_age_s=0) == (old,)
        assert system.ls(f"{storage._objects._folder}", detail=False) == [raw(url, kept)[1]]
        system.store[raw(url, kept)[1]].modified -= timedelta(hours=2)
        before = system.modified(raw(url, kept)[1])
        storage.protect([kept], timeout_s=LIMIT_S)
        assert system.modified(raw(url, kept)[1]) > before


@pytest.mark.parametrize(("url", "match"), [("nonsense://x", "nonsense"), ("oss://host/x", r"flwr-ha\[s3\]")])
def test_storage_that_cannot_be_had_is_a_config_error(own, url, match):
    """The user reads which setting is wrong and what to install."""
    with pytest.raises(ConfigError, match=match) as caught:
        ObjectStorage(url, own)
    assert url in str(caught.value)


def test_keys_are_the_hashes(own, url):
    """Buckets written by one version can be read by every other."""
    digest = own.put(b"abc")
    with ObjectStorage(url, own) as storage:
        storage.protect([digest], timeout_s=LIMIT_S)
    system, prefix = fsspec.core.url_to_fs(url)
    assert system.cat_file(f"{prefix}/blobs/{hashlib.sha256(b'abc').hexdigest()}") == b"abc"
