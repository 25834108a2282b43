"""Blobs are whole, verified, private, and gone only when nobody needs them."""

import errno
import hashlib
import os
import resource
import stat
import subprocess
import sys
import threading
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage import blobs as blobs_module
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.digests import BlobCorruptError, BlobMissingError, validate_digest
from flwr_ha.storage.files import is_disk_full


def digest_of(data):
    return "sha256:" + hashlib.sha256(data).hexdigest()


def files_in(store):
    return sorted(str(p.relative_to(store.root)) for p in store.root.rglob("*") if p.is_file() and p.name != "lock")


def flip(path, position):
    """Change one bit of a file and leave its size alone."""
    data = bytearray(path.read_bytes())
    data[position] ^= 1
    path.write_bytes(data)


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "store")


@pytest.mark.parametrize("data", [b"", b"a", os.urandom(3_000_001)])
def test_blob_is_read_as_it_was_written(store, data):
    """Whole, in chunks, streamed, and into a buffer: always the same bytes under the same name."""
    digest = digest_of(data)
    store.put_known(digest, [data[:1], data[1:]])
    assert digest == store.put(data)
    assert store.has(digest)
    assert store.size(digest) == len(data)
    assert store.read(digest) == data
    with store.open(digest) as file:
        assert file.read() == data
    buffer = bytearray(len(data))
    store.read_into(digest, memoryview(buffer))
    assert buffer == data
    assert store.digests() == (digest,)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "sha256:",
        "sha256:" + "a" * 63,
        "sha256:" + "A" * 64,
        "sha256:" + "a" * 64 + "\n",
        "sha256:" + "a" * 65,
        "sha512:" + "a" * 64,
        "sha256:../../" + "a" * 58,
        "sha256:" + "a" * 63 + "٣",
        "a" * 64,
    ],
)
def test_text_that_is_no_digest_never_becomes_a_path(store, text):
    """Names from the network must not lead out of the folder."""
    with pytest.raises(CheckpointError, match="is not a digest"):
        validate_digest(text)
    with pytest.raises(CheckpointError, match="is not a digest"):
        store.path(text)
    with pytest.raises(CheckpointError, match="is not a digest"):
        store.receive(text, 1)


def test_folders_and_files_are_private(store):
    """A model may be a secret: nobody but the owner reads it, whatever the umask."""
    digest = store.put(b"model")
    store.receive(digest_of(b"other"), 5).append(0, b"o")
    for path in [store.root, *store.root.rglob("*")]:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
    assert store.path(digest).parent.parent == store.root


@pytest.mark.parametrize("position", [0, 1000, 1_499_999])
def test_flipped_bit_is_noticed_and_the_blob_moved_away(tmp_path, position):
    """A bad copy is never given to anybody, and a good one can take its place."""
    data = os.urandom(1_500_000)
    digest = BlobStore(tmp_path).put(data)
    flip(BlobStore(tmp_path).path(digest), position)

    for use in (
        lambda store: store.read(digest),
        lambda store: store.open(digest),
        lambda store: store.read_into(digest, memoryview(bytearray(len(data)))),
        lambda store: store.verify(digest),
    ):
        store = BlobStore(tmp_path)
        with pytest.raises(BlobCorruptError, match="have changed") as caught:
            use(store)
        assert caught.value.digest == digest
        assert not store.has(digest)
        corrupt = store.root / "corrupt" / store.path(digest).name
        corrupt.replace(store.path(digest))

    store = BlobStore(tmp_path)
    assert not store.is_good(digest)
    store.put(data)
    assert store.read(digest) == data


@pytest.mark.parametrize("size", [0, 1, 999])
def test_truncated_blob_is_noticed(store, size):
    """A file that lost its end is corrupt, not short."""
    digest = store.put(os.urandom(1000))
    os.truncate(store.path(digest), size)
    with pytest.raises(BlobCorruptError):
        store.read_into(digest, memoryview(bytearray(1000)))
    with pytest.raises(BlobMissingError):
        store.read(digest)


def test_missing_blob_says_where_it_is_missing(store):
    """The caller fetches the one that is named."""
    digest = digest_of(b"nowhere")
    for use in (store.read, store.open, store.verify, store.size):
        with pytest.raises(BlobMissingError, match=str(store.root)) as caught:
            use(digest)
        assert caught.value.digest == digest
    assert not store.is_good(digest)


def test_blob_is_hashed_once_per_process_and_file(store, monkeypatch):
    """Serving a blob again does not hash it again, unless the file is another one or hashing is forced."""
    digest = store.put(b"x" * 1000)
    other = BlobStore(store.root)
    count = []
    original = hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: count.append(1) or original(*args))
    store.verify(digest)
    assert len(count) == 0
    other.verify(digest)
    other.open(digest).close()
    assert len(count) == 1
    other.verify(digest, is_forced=True)
    assert len(count) == 2
    os.utime(store.path(digest))
    other.verify(digest)
    assert len(count) == 3


def test_known_digest_must_match(store):
    """Bytes are not stored under a name that is not theirs."""
    digest = digest_of(b"right")
    with pytest.raises(CheckpointCorruptError, match="not sha256:"):
        store.put_known(digest, [b"wro", b"ng"])
    assert files_in(store) == []
    store.put_known(digest, [b"ri", b"ght"])
    assert store.read(digest) == b"right"


def test_blob_that_is_there_is_not_written_again(store):
    """The unchanged layer costs no write, and its chunks are not even asked for."""
    digest = store.put(b"layer")
    before = store.path(digest).stat()

    def chunks():
        raise AssertionError("asked for")
        yield b""

    store.put_known(digest, chunks())
    after = store.path(digest).stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_corrupt_blob_that_is_there_is_written_again(tmp_path):
    """A name alone is no copy."""
    digest = BlobStore(tmp_path).put(b"layer")
    flip(BlobStore(tmp_path).path(digest), 0)
    store = BlobStore(tmp_path)
    store.put(b"layer")
    assert store.read(digest) == b"layer"


class PowerCut(BaseException):
    """Ends a test's writer where a machine would have stopped."""


@pytest.mark.parametrize("step", ["fsync", "replace", "write"])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), PowerCut()])
def test_crash_between_steps_leaves_no_half_blob(store, monkeypatch, step, error):
    """Whatever step fails: nothing is visible under the name, nothing is left, and the next try succeeds."""
    expected = CheckpointError if isinstance(error, OSError) else PowerCut

    def fail(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(expected):
            store.put_known(digest_of(b"half"), [b"half"])
        with pytest.raises(expected):
            store.put(b"half")
        assert files_in(store) == []
    assert store.read(store.put(b"half")) == b"half"


def test_blob_is_fsynced_before_it_gets_its_name_and_the_folder_after(store, monkeypatch):
    """The order that survives a power cut: file, rename, folder."""
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(
        os, "fsync", lambda fd: steps.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file") or fsync(fd)
    )
    monkeypatch.setattr(os, "replace", lambda *names: steps.append("rename") or replace(*names))
    store.put(b"data")
    assert steps == ["file", "rename", "folder"]
    steps.clear()
    data = b"more"
    upload = store.receive(digest_of(data), 4)
    upload.append(0, data)
    store.finish([upload])
    assert steps == ["file", "rename", "folder"]


def test_killed_writer_leaves_nothing_visible(store):
    """A real kill -9 in the middle of a write: the temporary file is invisible, and collected when old."""
    code = (
        "import os, signal, sys; from pathlib import Path; from flwr_ha.storage.blobs import BlobStore\n"
        "def chunks():\n    yield b'x' * 100000\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "BlobStore(Path(sys.argv[1])).put_known('sha256:' + '0' * 64, chunks())"
    )
    result = subprocess.run([sys.executable, "-c", code, str(store.root)], check=False, timeout=60)
    assert result.returncode == -9
    assert store.digests() == ()
    (left,) = files_in(store)
    assert left.startswith("temporary/")
    store.collect((), min_age_s=3600)
    assert files_in(store) == [left]
    store.collect((), min_age_s=-1)
    assert files_in(store) == []


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from flwr_ha.errors import CheckpointError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.files import is_disk_full
store = BlobStore(Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
upload = store.receive("sha256:" + "0" * 64, 10**6)
for use in (lambda: store.put_known("sha256:" + "1" * 64, [b"x" * 60_000] * 3), lambda: store.put(b"y" * 200_000),
            lambda: upload.append(0, b"x" * 200_000)):
    try:
        use()
    except CheckpointError as error:
        assert is_disk_full(error) and sys.argv[1] in str(error), error
    else:
        raise SystemExit("the limit was not noticed")
"""


def test_full_disk_names_the_folder_and_leaves_nothing(store):
    """A real limit of the kernel stops the write: the message helps, the space is given back."""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    subprocess.run([sys.executable, "-c", FULL_DISK, str(store.root)], check=True, timeout=60)
    assert files_in(store) == []
    assert not is_disk_full(CheckpointError("other"))


def test_folder_that_cannot_be_made_is_named(tmp_path):
    """The user reads which setting is wrong."""
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match=str(tmp_path / "file")):
        BlobStore(tmp_path / "file" / "store")


def test_many_writers_of_one_blob_do_not_disturb_each_other(store):
    """Threads with stores of their own write the same bytes; a reader never sees less than the whole."""
    data = os.urandom(300_000)
    digest = digest_of(data)
    start, problems = threading.Barrier(8), []

    def work():
        own = BlobStore(store.root)
        start.wait(10)
        try:
            for _ in range(10):
                own.put_known(digest, [data[:1000], data[1000:]])
                own.put(data)
                assert own.read(digest) == data
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert files_in(store) == [f"blobs/{digest.removeprefix('sha256:')}"]


def test_collect_spares_what_is_named_or_young(store, monkeypatch, eventually):
    """Old and unnamed goes, of blobs, uploads and corrupt files; a refreshed blob is young again."""
    kept, old, young = store.put(b"kept"), store.put(b"old"), store.put(b"young")
    store.receive(digest_of(b"partial"), 7).append(0, b"par")
    (store.root / "corrupt" / "bad").touch()
    assert store.collect([kept], min_age_s=3600) == ()
    assert len(files_in(store)) == 5

    def changed_s(path):
        return path.stat().st_ctime

    newest_s = max(changed_s(path) for path in store.root.rglob("*"))
    eventually(lambda: store.refresh(young) and changed_s(store.path(young)) > newest_s)
    monkeypatch.setattr(blobs_module.time, "time", lambda: newest_s)
    assert store.collect([kept], min_age_s=0) == (old,)
    assert store.digests() == tuple(sorted((kept, young)))
    assert len(files_in(store)) == 2


def test_refresh_starts_the_age_again_without_a_new_hash(store, monkeypatch):
    """A blob that is about to be named again is spared by `collect`, at no cost for its readers."""
    digest = store.put(b"layer")
    before = store.path(digest).stat()
    assert store.refresh(digest)
    after = store.path(digest).stat()
    assert after.st_ctime_ns >= before.st_ctime_ns
    assert after.st_mtime_ns == before.st_mtime_ns
    monkeypatch.setattr(hashlib, "file_digest", lambda *args: pytest.fail("hashed again"))
    assert store.refresh(digest)
    assert not store.refresh(digest_of(b"nowhere"))


def test_deleted_blob_is_gone(store):
    """Deleting twice is no error."""
    digest = store.put(b"data")
    store.delete(digest)
    store.delete(digest)
    assert not store.has(digest)


@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=3000), cuts=st.lists(st.integers(0, 3000), max_size=6))
def test_chunking_does_not_change_the_bytes(tmp_path_factory, data, cuts):
    """The digest is one of the whole, not of how it was cut."""
    store = BlobStore(tmp_path_factory.mktemp("store"))
    bounds = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [memoryview(data)[a:b] for a, b in pairwise(bounds)]
    store.put_known(digest_of(data), pieces)
    assert store.read(digest_of(data)) == data
