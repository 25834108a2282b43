"""Durable file steps that blobs and uploads share; the standard library only."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flwr_ha.errors import CheckpointError

Buffer = bytes | bytearray | memoryview
CHUNK_BYTES = 1 << 20
WRITEBACK_BYTES = 8 << 20
FINISH_BYTES = (
    256 << 20
)  # uploads that are not finished get old and may be collected, and fill the memory of the system
_SYNC_FILE_RANGE_WRITE = 2  # <linux/fs.h>
_DISK_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)  # Linux has it


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn what the disk refuses into a `CheckpointError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot write a checkpoint in {folder}: {error.strerror or error}") from error


def is_disk_full(error: BaseException) -> bool:
    """Whether the disk, a quota or a file-size limit is behind the error."""
    cause = error if isinstance(error, OSError) else error.__cause__
    return isinstance(cause, OSError) and cause.errno in _DISK_FULL


def make_folder(folder: Path) -> None:
    """Make a folder that only its owner can enter."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)


def fsync_folder(folder: Path) -> None:
    """Make names that were changed in the folder survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_all(descriptor: int, data: Buffer) -> None:
    """Write every byte at the current position."""
    rest = memoryview(data).cast("B") if len(data) else memoryview(b"")
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def start_writeback(descriptor: int, start: int, count: int) -> None:
    """Have the disk begin with bytes that were written, so that the fsync at the end waits for the last ones only.

    Notes
    -----
    sync_file_range(2) promises nothing about what is on the disk, and nothing is made of it: a system
    or a file system that does not know it does all the work in the fsync.
    """
    if _sync_file_range is not None:
        _sync_file_range(descriptor, ctypes.c_int64(start), ctypes.c_int64(count), _SYNC_FILE_RANGE_WRITE)


def open_locked(path: Path, *, is_new: bool) -> int | None:
    """Open a file for reading and writing and lock it against every other opener.

    Parameters
    ----------
    path : Path
        The file.
    is_new : bool
        Whether to make it where it does not exist.

    Returns
    -------
    int or None
        The descriptor; closing it unlocks. None where the file does not exist.

    Notes
    -----
    Who held the lock before may have renamed or removed the file: only a descriptor that still
    is what `path` names may be written to.
    """
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if is_new else 0)
    while True:
        try:
            descriptor = os.open(path, flags, 0o600)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _is_named(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_named(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock file, which is made where it does not exist and is never removed."""
    descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def temporary_file(folder: Path) -> Iterator[tuple[int, Path]]:
    """Open a new file for writing that is gone afterwards, unless it was renamed.

    Yields
    ------
    tuple of (int, Path)
        Its descriptor and its path.
    """
    path = folder / f"{os.getpid()}-{secrets.token_hex(8)}"
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        yield descriptor, path
    finally:
        os.close(descriptor)
        path.unlink(missing_ok=True)
