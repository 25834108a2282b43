"""A durable store of others takes the place of the majority."""

import hashlib
import itertools
import os
import secrets
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import fsspec
import pytest
from moto.server import ThreadedMotoServer

from flwr_ha.errors import CheckpointCorruptError, CheckpointError, ConfigError, CoordinationError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.objects import GRACE_S
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


def test_closing_ends_a_fetch_that_takes_long(own, other, tmp_path, monkeypatch):
    """A replica that is stopped while it takes over does not wait for gigabytes."""
    url = f"file://{tmp_path / 'shared'}"
    digest = other.put(os.urandom(5_000_000))
    second = other.put(b"second")
    ObjectStorage(url, other).protect([digest, second], timeout_s=LIMIT_S)
    storage = ObjectStorage(url, own)
    is_reading, chunks = threading.Event(), storage._objects.chunks

    def endless(name):
        for chunk in itertools.cycle(chunks(name)):
            is_reading.set()
            time.sleep(0.001)
            yield chunk

    monkeypatch.setattr(storage._objects, "chunks", endless)
    with ThreadPoolExecutor(1) as pool:
        fetch = pool.submit(storage.fetch, [digest, second], timeout_s=600.0)
        assert is_reading.wait(LIMIT_S)
        storage.close()
        with pytest.raises(CheckpointError, match="the replica ends"):
            fetch.result(LIMIT_S)
    with pytest.raises(CheckpointError, match="the replica ends"):
        storage.fetch([digest], timeout_s=LIMIT_S)
    assert own.digests() == ()


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


@pytest.fixture
def ages(monkeypatch):
    """Return a function that takes a storage and returns its ages in seconds, by digest, to be set by the test."""

    def of(storage):
        known, real = {}, storage._objects._age_s
        monkeypatch.setattr(
            storage._objects, "_age_s", lambda name: known.get("sha256:" + name[-64:], 0.0) or real(name)
        )
        return known

    return of


def collect(storage, needed, may_remove=lambda: True):
    return storage.collect(lambda: needed, may_remove=may_remove, timeout_s=LIMIT_S)


def test_old_blobs_that_nobody_needs_are_collected(own, url, ages):
    """What is needed stays, and so does what is young: a commit under way has stored it."""
    needed, old, young = (own.put(name) for name in (b"needed", b"old", b"young"))
    with ObjectStorage(url, own) as storage:
        assert collect(storage, [], lambda: pytest.fail("there is nothing to remove")) == ()
        storage.protect([needed, old, young], timeout_s=LIMIT_S)
        ages(storage).update({needed: 1e6, old: GRACE_S + 1, young: GRACE_S - 60})
        assert collect(storage, [needed]) == (old,)
        assert storage._objects.digests() == tuple(sorted([needed, young]))
        assert collect(storage, [needed]) == ()


def test_what_lies_beside_the_blobs_is_never_touched(own, url, monkeypatch):
    """Clusters share a bucket, each below a prefix of its own, and people put files anywhere."""
    digest = own.put(b"blob")
    with ObjectStorage(f"{url}/one", own) as one, ObjectStorage(f"{url}/one/two", own) as two:
        for storage in (one, two):
            storage.protect([digest], timeout_s=LIMIT_S)
        system, path = raw(f"{url}/one", digest)
        system.pipe_file(path.replace("/blobs/", "/blobs/notes-"), b"about this blob")
        monkeypatch.setattr("flwr_ha.storage.objects.GRACE_S", -1.0)
        assert collect(one, []) == (digest,)
        assert system.exists(raw(f"{url}/one/two", digest)[1])
        assert system.exists(path.replace("/blobs/", "/blobs/notes-"))


def test_blob_that_is_stored_again_meanwhile_stays(own, url, ages):
    """A new leader commits the very bytes that an old one is about to remove."""
    digest = own.put(b"the same model again")
    with ObjectStorage(url, own) as storage:
        storage.protect([digest], timeout_s=LIMIT_S)
        known = ages(storage)
        known[digest] = 1e6

        def needed():
            known.clear()  # the other one's `protect`
            return []

        assert storage.collect(needed, may_remove=lambda: True, timeout_s=LIMIT_S) == ()
        assert storage._objects.digests() == (digest,)


def test_removal_ends_with_the_leadership(own, url, monkeypatch):
    """It is asked for before each blob."""
    digests = sorted(own.put(bytes([number])) for number in range(3))
    answers = iter([True, False])
    monkeypatch.setattr("flwr_ha.storage.objects.GRACE_S", -1.0)
    with ObjectStorage(url, own) as storage:
        storage.protect(digests, timeout_s=LIMIT_S)
        assert collect(storage, [], lambda: next(answers)) == (digests[0],)
        assert storage._objects.digests() == tuple(digests[1:])


def test_nothing_is_removed_unless_all_that_is_needed_is_known(own, url, monkeypatch):
    """The coordinator does not answer, or a checkpoint cannot be read."""

    def unknown():
        raise CoordinationError("no answer")

    monkeypatch.setattr("flwr_ha.storage.objects.GRACE_S", -1.0)
    with ObjectStorage(url, own) as storage:
        digest = own.put(b"blob")
        storage.protect([digest], timeout_s=LIMIT_S)
        with pytest.raises(CoordinationError):
            storage.collect(unknown, may_remove=lambda: True, timeout_s=LIMIT_S)
        assert storage._objects.digests() == (digest,)


def test_needed_blob_that_is_gone_is_stored_again(own, url):
    """Somebody has removed it, by mistake or by a rule of the bucket; the own disk still has it."""
    digest = own.put(b"blob")
    with ObjectStorage(url, own) as storage:
        assert collect(storage, [digest]) == ()
        assert storage._objects.digests() == (digest,)


def test_age_counts_from_the_last_time_that_an_object_was_protected(own):
    """Give or take an hour, which is less than what a commit takes."""
    digest = own.put(b"layer")
    with ObjectStorage("memory://bucket/age", own) as storage:
        storage.protect([digest], timeout_s=LIMIT_S)
        system, path = raw("memory://bucket/age", digest)
        for hours, is_stored_anew in ((0.9, False), (1.1, True)):
            system.store[path].modified -= timedelta(hours=hours)
            before = system.modified(path)
            storage.protect([digest], timeout_s=LIMIT_S)
            assert (system.modified(path) > before) is is_stored_anew
            system.store[path].modified = datetime.now(UTC)


def test_a_wrong_clock_of_this_machine_removes_nothing(own, monkeypatch):
    """The store's own clock counts, here five hours behind ours."""
    digest = own.put(b"layer")
    with ObjectStorage("memory://bucket/clock", own) as storage:
        system = storage._objects._system
        modified = system.modified
        monkeypatch.setattr(system, "modified", lambda path: modified(path) - timedelta(hours=5))
        storage.protect([digest], timeout_s=LIMIT_S)
        assert collect(storage, []) == ()
        assert storage._objects.digests() == (digest,)


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
