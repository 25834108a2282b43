"""Blobs that are written together reach the disk together, or not at all."""

import errno
import os
import stat
import subprocess
import sys
import threading

import pytest

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage import batches, uploads
from flwr_ha.storage.arrays import digest_of
from flwr_ha.storage.batches import Batch
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.files import is_disk_full

BLOBS = {digest_of(data): data for data in (bytes([i]) * (1000 + i) for i in range(100))}


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path / "store")


def fill(batch):
    for digest, data in BLOBS.items():
        batch.put(digest, [data[:10], data[10:]])


def test_blobs_are_there_after_the_end_and_not_before(store):
    """Until then they can be sent, but nobody counts them."""
    batch = Batch(store)
    fill(batch)
    assert store.digests() == ()
    for digest, data in BLOBS.items():
        assert store.size_to_send(digest) == len(data)
        with store.open_to_send(digest) as file:
            assert file.read() == data
    batch.finish()
    assert store.digests() == tuple(sorted(BLOBS))
    for digest, data in BLOBS.items():
        assert store.read(digest) == data
        assert store.size_to_send(digest) == len(data)
    assert list(store.root.glob("partial/*")) == []


def test_each_blob_is_fsynced_before_it_gets_its_name_and_the_folder_after(store, monkeypatch):
    """The order that survives a power cut, with one wait for the folder for up to 64 blobs."""
    steps = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor):
        status = os.fstat(descriptor)
        steps.append("folder" if stat.S_ISDIR(status.st_mode) else status.st_ino)
        fsync(descriptor)

    def note_rename(old, new):
        steps.append(-old.stat().st_ino)
        replace(old, new)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_rename)
    batch = Batch(store)
    fill(batch)
    assert steps == []
    batch.finish()
    assert steps.count("folder") == 2
    renamed = [-step for step in steps if step != "folder" and step < 0]
    assert len(renamed) == len(BLOBS)
    for inode in renamed:
        assert steps.index(inode) < steps.index(-inode) < steps.index("folder", steps.index(-inode))


def test_large_batches_are_finished_in_between(store, monkeypatch):
    """What waits for too long might be collected, and all at once would fill the system's memory."""
    monkeypatch.setattr(batches, "FINISH_BYTES", 30_000)
    batch = Batch(store)
    fill(batch)
    assert 60 < len(store.digests()) < 100
    batch.finish()
    assert store.digests() == tuple(sorted(BLOBS))


def test_equal_bytes_of_two_arrays_are_one_blob(store):
    """Threads that put the same at once do not disturb each other."""
    data = os.urandom(300_000)
    digest, batch, start = digest_of(data), Batch(store), threading.Barrier(4)

    def put():
        start.wait(10)
        batch.put(digest, [data])

    threads = [threading.Thread(target=put) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    batch.finish()
    assert store.read(digest) == data


def test_what_is_there_is_not_written_again(store):
    """An array that has not changed costs a look."""
    kept, data = store.put(b"x" * 1000), b"x" * 1000
    inode = store.path(kept).stat().st_ino
    batch = Batch(store)
    batch.put(kept, [data])
    assert list(store.root.glob("partial/*")) == []
    batch.finish()
    assert store.path(kept).stat().st_ino == inode


def test_bytes_that_an_earlier_life_has_left_are_written_again(store):
    """They may be cut off, or not on the disk."""
    data = os.urandom(5000)
    digest = digest_of(data)
    earlier = Batch(BlobStore(store.root))
    earlier.put(digest, [data[:3000], os.urandom(2000)])
    batch = Batch(store)
    batch.put(digest, [data])
    batch.finish()
    assert store.read(digest) == data


def test_collected_bytes_are_noticed_and_can_be_put_again(store):
    """A process that was frozen for minutes finds its bytes gone: it writes the checkpoint again."""
    batch = Batch(store)
    fill(batch)
    store.collect((), min_age_s=-1)
    with pytest.raises(CheckpointCorruptError, match="gone before it was a blob"):
        batch.finish()
    fill(batch)
    batch.finish()
    assert store.digests() == tuple(sorted(BLOBS))


def test_bytes_that_change_before_the_end_are_noticed(store):
    """No blob has other bytes than its name says, even where the digest was computed before."""
    batch = Batch(store)
    fill(batch)
    digest = max(BLOBS)
    with (store.root / "partial" / store.path(digest).name).open("r+b") as file:
        file.write(b"other")
    with pytest.raises(CheckpointCorruptError):
        batch.finish()
    assert not store.has(digest)


def test_failed_fsync_drops_all_that_is_no_blob_yet(store, monkeypatch):
    """After a failed fsync a second one may claim success: the bytes have to be written again."""

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    batch = Batch(store)
    fill(batch)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            batch.finish()
    assert store.digests() == ()
    fill(batch)
    batch.finish()
    assert store.digests() == tuple(sorted(BLOBS))


@pytest.mark.parametrize("place", ["blob.before-rename", "blob.after-rename"])
def test_killed_between_the_steps_every_name_has_its_bytes(store, place):
    """A real kill -9 after the fsyncs, or after the renames: all that has a name is whole."""
    code = (
        "import sys; from pathlib import Path; from flwr_ha import failpoints\n"
        "from flwr_ha.storage.arrays import digest_of; from flwr_ha.storage.batches import Batch\n"
        "from flwr_ha.storage.blobs import BlobStore\n"
        "failpoints.arm(failpoints.Failpoint.parse(sys.argv[2] + ':kill'))\n"
        "batch = Batch(BlobStore(Path(sys.argv[1])))\n"
        "for data in (bytes([i]) * (1000 + i) for i in range(100)):\n    batch.put(digest_of(data), [data])\n"
        "batch.finish()"
    )
    result = subprocess.run([sys.executable, "-c", code, str(store.root), place], check=False, timeout=60)
    assert result.returncode == -9
    assert len(store.digests()) == (0 if place == "blob.before-rename" else 64)
    assert all(store.is_good(digest) for digest in store.digests())
    batch = Batch(store)
    fill(batch)
    batch.finish()
    assert store.digests() == tuple(sorted(BLOBS))


def test_folder_that_refuses_new_files_is_an_error_of_the_disk(store, monkeypatch):
    """Not only the bytes may not fit: a session that waits for a full disk must know it by its error."""

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(uploads, "open_locked", full)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        fill(Batch(store))
    assert is_disk_full(caught.value)
