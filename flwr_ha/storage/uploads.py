"""A blob that arrives in pieces, from several senders, over several lives of this process."""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage.files import (
    WRITEBACK_BYTES,
    Buffer,
    disk_errors,
    is_disk_full,
    open_locked,
    start_writeback,
    write_all,
)

_Stamp = tuple[int, int, int, int]  # inode, size, mtime and ctime in ns
_NOTHING = (-1, 0, 0, 0)


class OffsetError(CheckpointError):
    """The piece does not start where the upload is: go on from `offset`.

    Attributes
    ----------
    offset : int
        Bytes that the upload has.
    """

    def __init__(self, offset: int) -> None:
        super().__init__(f"the upload goes on at byte {offset}")
        self.offset = offset


class LengthError(CheckpointError):
    """The sender has more bytes than it has announced: it is in error."""


class Upload:
    """Collect the pieces of one blob in a partial file and publish it once it is verified.

    `BlobStore.receive` makes it. Any number of threads and processes may work on the same blob:
    a piece is written under the file's lock, and only where the file ends, so that two senders
    share one upload instead of mixing their bytes. A sender of wrong bytes spoils the upload for
    all, which `BlobStore.finish` notices: everybody starts again.

    Parameters
    ----------
    digest : str
        What the blob must be.
    total_bytes : int
        How long it must be.
    partial, target : Path
        The file that grows, and the blob that it becomes.
    """

    def __init__(self, digest: str, total_bytes: int, *, partial: Path, target: Path) -> None:
        self.digest = digest
        self.total_bytes = total_bytes
        self.partial = partial
        self._target = target
        self._lock = threading.Lock()
        self._hash = hashlib.sha256()
        self._hashed_bytes = 0
        self._seen = _NOTHING
        self._filled = _NOTHING
        self._begun = 0

    @property
    def offset(self) -> int:
        """Bytes that have arrived, in this process or before."""
        return self.total_bytes if self._target.exists() else partial_bytes(self.partial)

    def append(self, offset: int, chunk: Buffer) -> None:
        """Add the bytes that start at `offset`.

        Raises
        ------
        OffsetError
            The upload is elsewhere: send what it lacks.
        LengthError
            More bytes than announced.
        CheckpointError
            The disk refuses; a full disk drops the upload.
        """
        if offset + len(chunk) > self.total_bytes:
            raise LengthError(f"more than the announced {self.total_bytes} bytes arrive for {self.digest}")
        with self._lock, disk_errors(self.partial.parent):
            descriptor = open_locked(self.partial, is_new=offset == 0)
            if descriptor is None:
                raise OffsetError(0)
            try:
                self._append(descriptor, offset, chunk)
            finally:
                os.close(descriptor)

    def _append(self, descriptor: int, offset: int, chunk: Buffer) -> None:
        size = os.lseek(descriptor, 0, os.SEEK_END)
        if size != offset:
            raise OffsetError(size)
        self._notice_others(descriptor)
        self._write(descriptor, offset, chunk)
        if self._hashed_bytes == offset:
            self._hash.update(chunk)
            self._hashed_bytes += len(chunk)
            self._seen = _stamp(descriptor)

    def _write(self, descriptor: int, offset: int, chunk: Buffer) -> None:
        try:
            with disk_errors(self.partial.parent):
                write_all(descriptor, chunk)
        except CheckpointError as error:
            if is_disk_full(error):
                self.partial.unlink(missing_ok=True)
            raise
        end = offset + len(chunk)
        self._begun = min(self._begun, offset)  # less than before where the upload has begun anew
        if end - self._begun >= WRITEBACK_BYTES or end == self.total_bytes:
            start_writeback(descriptor, self._begun, end - self._begun)
            self._begun = end

    def fill(self, chunks: Iterable[Buffer]) -> None:
        """Write all at once: bytes of which the caller has computed the digest, which spares a second pass.

        Raises
        ------
        CheckpointError
            The disk refuses; a full disk drops the upload.
        """
        with self._lock, disk_errors(self.partial.parent):
            descriptor = open_locked(self.partial, is_new=True)
            if descriptor is None:
                raise OffsetError(0)
            try:
                if _stamp(descriptor) != self._filled:  # else another thread has come before
                    os.ftruncate(descriptor, 0)
                    self._forget()
                    end = 0
                    for chunk in chunks:
                        self._write(descriptor, end, chunk)
                        end += len(chunk)
                    self._filled = _stamp(descriptor)
            finally:
                os.close(descriptor)

    @contextmanager
    def completed(self) -> Iterator[int | None]:
        """Hold the file once it is complete and verified, so that nobody changes it meanwhile.

        Yields
        ------
        int or None
            Its descriptor, for the store to publish; None where the blob is there already.

        Raises
        ------
        OffsetError
            Bytes are missing: send them.
        CheckpointCorruptError
            The bytes do not match the digest: they are dropped, send all again.
        """
        with self._lock:
            descriptor = open_locked(self.partial, is_new=self.total_bytes == 0)
            if descriptor is None:
                if not self._target.exists():
                    raise OffsetError(0)
                yield None
                return
            try:
                yield descriptor if self._is_verified(descriptor) else None
            finally:
                os.close(descriptor)

    def _is_verified(self, descriptor: int) -> bool:
        size = os.fstat(descriptor).st_size
        if size < self.total_bytes:
            if self._target.exists():  # another sender has finished, this is the start of one more upload
                return False
            raise OffsetError(size)
        if _stamp(descriptor) == self._filled:
            return True
        self._notice_others(descriptor)
        if self._hashed_bytes < size:
            with os.fdopen(os.dup(descriptor), "rb") as file:
                file.seek(0)
                self._hash = hashlib.file_digest(file, "sha256")
        if f"sha256:{self._hash.hexdigest()}" != self.digest:
            self.partial.unlink(missing_ok=True)
            self._forget()
            raise CheckpointCorruptError(f"the bytes that arrived are not {self.digest}")
        return True

    def _notice_others(self, descriptor: int) -> None:
        """Forget the hash unless the file is as this upload has left it.

        Another process may have gone on with it, or have removed it and begun anew (under the same
        inode number): a hash of bytes that are gone could even make a wrong file look right.
        """
        if _stamp(descriptor) != self._seen:
            self._forget()

    def _forget(self) -> None:
        self._hash = hashlib.sha256()
        self._hashed_bytes = 0
        self._seen = _NOTHING


def _stamp(descriptor: int) -> _Stamp:
    status = os.fstat(descriptor)
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def partial_bytes(partial: Path) -> int:
    """Return the size of a partial file, 0 where there is none."""
    try:
        return partial.stat().st_size
    except FileNotFoundError:
        return 0
