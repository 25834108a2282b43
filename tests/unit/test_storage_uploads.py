"""A blob that arrives in pieces is resumed, shared and verified."""

import errno
import hashlib
import os
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.uploads import OffsetError

DATA = os.urandom(100_000)
DIGEST = "sha256:" + hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def store(tmp_path):
    return BlobStore(tmp_path)


def test_upload_goes_on_after_a_restart(store):
    """The bytes of an earlier life of the process are kept, and hashed from the disk."""
    store.receive(DIGEST, len(DATA)).append(0, DATA[:40_000])
    restarted = BlobStore(store.root)
    assert not restarted.has(DIGEST)
    upload = restarted.receive(DIGEST, len(DATA))
    assert upload.offset == restarted.partial_bytes(DIGEST) == 40_000
    upload.append(40_000, DATA[40_000:])
    restarted.finish([upload])
    assert upload.offset == len(DATA)
    assert restarted.read(DIGEST) == DATA
    assert restarted.partial_bytes(DIGEST) == 0


def test_complete_but_unfinished_upload_is_finished_after_a_restart(store):
    """A crash between the last byte and the rename costs nothing."""
    store.receive(DIGEST, len(DATA)).append(0, DATA)
    restarted = BlobStore(store.root)
    restarted.finish([restarted.receive(DIGEST, len(DATA))])
    assert restarted.read(DIGEST) == DATA


def test_uploads_that_are_no_good_do_not_stop_the_others(store):
    """Each problem is told by name: the sender learns which bytes were wrong, and which are missing."""
    parts = [DATA[:100], DATA[100:300], DATA[300:600], DATA[600:1000]]
    uploads = [store.receive("sha256:" + hashlib.sha256(part).hexdigest(), len(part)) for part in parts]
    for upload, data in zip(uploads, [parts[0], bytes(200), parts[2][:50], parts[3]], strict=True):
        upload.append(0, data)
    problems = store.finish_good(uploads)
    kinds = {digest: type(problem) for digest, problem in problems.items()}
    assert kinds == {uploads[1].digest: CheckpointCorruptError, uploads[2].digest: OffsetError}
    assert store.digests() == tuple(sorted([uploads[0].digest, uploads[3].digest]))
    assert [upload.offset for upload in uploads] == [100, 0, 50, 400]


@pytest.mark.parametrize("offset", [0, 9_999, 10_001, 90_000])
def test_piece_that_does_not_fit_says_where_to_go_on(store, offset):
    """Holes and repetitions are refused; nothing is written."""
    upload = store.receive(DIGEST, len(DATA))
    upload.append(0, DATA[:10_000])
    with pytest.raises(OffsetError) as caught:
        upload.append(offset, DATA[offset : offset + 100])
    assert caught.value.offset == upload.offset == 10_000


def test_unfinished_upload_is_no_blob(store):
    """`finish` before the end says what is missing."""
    upload = store.receive(DIGEST, len(DATA))
    with pytest.raises(OffsetError) as caught:
        store.finish([upload])
    assert caught.value.offset == 0
    upload.append(0, DATA[:10])
    with pytest.raises(OffsetError) as caught:
        store.finish([upload])
    assert caught.value.offset == 10
    assert not store.has(DIGEST)


@pytest.mark.parametrize("position", [0, 50_000, 99_999])
def test_wrong_bytes_are_dropped_and_can_be_sent_again(store, position):
    """A bit that flipped on the way is noticed before anybody counts the copy."""
    wrong = bytearray(DATA)
    wrong[position] ^= 1
    upload = store.receive(DIGEST, len(DATA))
    upload.append(0, bytes(wrong[:60_000]))
    upload.append(60_000, bytes(wrong[60_000:]))
    with pytest.raises(CheckpointCorruptError, match=DIGEST):
        store.finish([upload])
    assert not store.has(DIGEST)
    assert upload.offset == 0
    upload.append(0, DATA)
    store.finish([upload])
    assert store.read(DIGEST) == DATA


def test_more_than_announced_is_refused(store):
    """A sender cannot fill the disk with one upload."""
    upload = store.receive(DIGEST, 100)
    with pytest.raises(CheckpointError, match="more than the announced 100 bytes"):
        upload.append(0, DATA[:101])
    assert upload.offset == 0


def test_leftover_that_is_too_long_is_dropped(store):
    """An upload that somebody announced with a wrong length does not block the right one."""
    store.receive(DIGEST, len(DATA) + 5).append(0, DATA + b"extra")
    upload = store.receive(DIGEST, len(DATA))
    assert upload.offset == 0
    upload.append(0, DATA)
    store.finish([upload])


def test_empty_blob_is_received(store):
    """Nothing is something."""
    digest = "sha256:" + hashlib.sha256(b"").hexdigest()
    store.finish([store.receive(digest, 0)])
    assert store.read(digest) == b""


def test_two_uploads_of_one_blob_share_their_bytes(store):
    """Senders that come in turns, through stores of different processes, complete one blob."""
    other = BlobStore(store.root)
    first, second = store.receive(DIGEST, len(DATA)), other.receive(DIGEST, len(DATA))
    first.append(0, DATA[:30_000])
    second.append(30_000, DATA[30_000:70_000])
    with pytest.raises(OffsetError):
        first.append(30_000, DATA[30_000:40_000])
    first.append(70_000, DATA[70_000:])
    other.finish([second])
    store.finish([first])
    assert store.read(DIGEST) == other.read(DIGEST) == DATA


def test_upload_that_was_removed_and_begun_anew_is_hashed_anew(store):
    """What one sender remembers of a file that is gone does not spoil the next one."""
    other = BlobStore(store.root)
    upload = store.receive(DIGEST, len(DATA))
    upload.append(0, bytes(len(DATA)))
    other.collect((), min_age_s=-1)
    other.receive(DIGEST, len(DATA)).append(0, DATA)
    store.finish([upload])
    assert store.read(DIGEST) == DATA


def test_racing_uploads_of_one_blob_do_not_mix_their_bytes(store):
    """Eight senders at once, each with pieces of its own size: the blob is whole, nobody fails."""
    problems, start = [], threading.Barrier(8)

    def send(size, own):
        upload, offset = own.receive(DIGEST, len(DATA)), 0
        start.wait(10)
        try:
            while offset < len(DATA) and not own.has(DIGEST):
                try:
                    upload.append(offset, DATA[offset : offset + size])
                    offset += size
                except OffsetError as error:
                    offset = error.offset
            if not own.has(DIGEST):
                own.finish([upload])
        except BaseException as error:
            problems.append(error)

    threads = [
        threading.Thread(target=send, args=(997 * (i + 1), store if i % 2 else BlobStore(store.root))) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert problems == []
    assert store.read(DIGEST) == DATA


def test_failed_fsync_drops_the_upload(store, monkeypatch):
    """After a failed fsync a second one may claim success: the bytes have to come again."""

    def fail(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    upload = store.receive(DIGEST, len(DATA))
    upload.append(0, DATA)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointError, match="Input/output error"):
            store.finish([upload])
    assert upload.offset == 0
    assert not store.has(DIGEST)


@settings(max_examples=30, deadline=None)
@given(sizes=st.lists(st.integers(7_000, 60_000), min_size=1, max_size=12), restart=st.sets(st.integers(0, 11)))
def test_any_cutting_with_any_restarts_gives_the_blob(tmp_path_factory, sizes, restart):
    """Resuming works at every offset."""
    root = tmp_path_factory.mktemp("store")
    store, offset, turn = BlobStore(root), 0, 0
    while offset < len(DATA):
        if turn in restart:
            store = BlobStore(root)
        upload = store.receive(DIGEST, len(DATA))
        assert upload.offset == offset
        piece = DATA[offset : offset + sizes[turn % len(sizes)]]
        upload.append(offset, piece)
        offset += len(piece)
        turn += 1
    store.finish([store.receive(DIGEST, len(DATA))])
    assert store.read(DIGEST) == DATA
