"""Blobs on a disk as they are read: every byte is verified before anybody counts on it."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.storage import files
from flwr_ha.storage.digests import PREFIX, BlobCorruptError, BlobMissingError, is_digest, validate_digest
from flwr_ha.storage.files import CHUNK_BYTES, disk_errors, locked

_logger = logging.getLogger(__name__)

_Stamp = tuple[int, int, int]  # size, mtime in ns, inode: the file that was verified


class BlobFiles:
    """Read blobs, named by the SHA-256 of their bytes; `BlobStore` adds what writes them.

    Parameters
    ----------
    root : Path
        Folder of the store, made with mode 700 where it does not exist: ``blobs/`` and ``corrupt/`` lie in it.

    Raises
    ------
    CheckpointError
        The folder cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs, self._corrupt = root / "blobs", root / "corrupt"
        with disk_errors(root):
            for folder in (root, self._blobs, self._corrupt):
                files.make_folder(folder)
        self._verified: dict[str, _Stamp] = {}

    def path(self, digest: str) -> Path:
        """Return where the blob lies if it is there."""
        return self._blobs / validate_digest(digest).removeprefix(PREFIX)

    def has(self, digest: str) -> bool:
        """Whether a blob of that name is there, good or not."""
        return self.path(digest).is_file()

    def size(self, digest: str) -> int:
        """Return the bytes of a blob; raise `BlobMissingError` where it is not."""
        try:
            return self.path(digest).stat().st_size
        except FileNotFoundError:
            raise BlobMissingError(digest, f"{digest} is not in {self.root}") from None

    def digests(self) -> tuple[str, ...]:
        """Return the names of all blobs, sorted."""
        names = (PREFIX + entry.name for entry in os.scandir(self._blobs))
        return tuple(sorted(name for name in names if is_digest(name)))

    def is_good(self, digest: str) -> bool:
        """Whether the blob is there and its bytes match; one that does not match is moved away."""
        try:
            self.verify(digest)
        except CheckpointCorruptError:
            return False
        return True

    def verify(self, digest: str, *, is_forced: bool = False) -> None:
        """Hash the blob in pieces, unless this very file was verified by this process before.

        Parameters
        ----------
        digest : str
            The blob.
        is_forced : bool
            Hash it in any case: somebody has seen wrong bytes.

        Raises
        ------
        BlobMissingError, BlobCorruptError
            It is not there, or its bytes do not match (it is then in ``corrupt/``): fetch it.
        """
        if is_forced:
            self._verified.pop(digest, None)
        elif self._is_unchanged(digest):
            return
        self.open(digest).close()

    def _is_unchanged(self, digest: str) -> bool:
        """Whether the very file is there that was verified; asked for each part of each checkpoint, twice a second."""
        try:
            return self._verified.get(digest) == _stamp(self.path(digest).stat())
        except OSError:
            return False

    def open(self, digest: str) -> BufferedReader:
        """Open a verified blob for reading; errors as in `verify`."""
        file = self.open_unverified(digest)
        try:
            status = os.fstat(file.fileno())
            if self._verified.get(digest) != _stamp(status):
                with self._read_errors(digest):
                    self._accept(digest, hashlib.file_digest(file, "sha256").hexdigest(), status)
                file.seek(0)
        except BaseException:
            file.close()
            raise
        return file

    def open_unverified(self, digest: str) -> BufferedReader:
        """Open a blob for a reader that verifies it; raise `BlobMissingError` where it is not."""
        try:
            return self.path(digest).open("rb")
        except FileNotFoundError:
            raise BlobMissingError(digest, f"{digest} is not in {self.root}") from None
        except OSError as error:
            raise CheckpointError(f"cannot read {digest} in {self.root}: {error.strerror}") from error

    def read(self, digest: str) -> bytes:
        """Return the bytes of a blob, verified; errors as in `verify`."""
        with self.open_unverified(digest) as file, self._read_errors(digest):
            data = file.read()
            self._accept(digest, hashlib.sha256(data).hexdigest(), os.fstat(file.fileno()))
        return data

    def read_into(self, digest: str, buffer: memoryview) -> None:
        """Fill a writable buffer of the blob's size with its bytes, verified; errors as in `verify`."""
        sha, position = hashlib.sha256(), 0
        with self.open_unverified(digest) as file, self._read_errors(digest):
            while count := file.readinto(buffer[position : position + CHUNK_BYTES]):
                sha.update(buffer[position : position + count])
                position += count
            while rest := file.read(CHUNK_BYTES):  # longer than the buffer: the digest says what is wrong
                sha.update(rest)
                position += len(rest)
            self._accept(digest, sha.hexdigest(), os.fstat(file.fileno()))
        if position != len(buffer):
            raise BlobCorruptError(digest, f"{digest} has {position} bytes where {len(buffer)} are expected")

    @contextmanager
    def _read_errors(self, digest: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._move_away(digest)
            raise BlobCorruptError(digest, f"cannot read {digest} in {self.root}: {error.strerror}") from error

    def _accept(self, digest: str, found: str, status: os.stat_result) -> None:
        if PREFIX + found == digest:
            self._verified[digest] = _stamp(status)
            return
        self._move_away(digest, status)
        raise BlobCorruptError(digest, f"the bytes of {digest} in {self.root} have changed")

    def _move_away(self, digest: str, status: os.stat_result | None = None) -> None:
        """Put a bad blob where nobody reads it, unless a good one has already taken its place."""
        path = self.path(digest)
        self._verified.pop(digest, None)
        with disk_errors(self.root), locked(self.root / "lock"), suppress(FileNotFoundError):
            if status is None or os.path.samestat(status, path.stat()):
                path.replace(self._corrupt / path.name)
        _logger.warning("blob %s in %s is corrupt and was moved to %s", digest, self.root, self._corrupt)

    def _note_verified(self, digest: str, status: os.stat_result) -> None:
        self._verified[digest] = _stamp(status)


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ino
