"""Bytes named by their SHA-256, on the disk of one replica."""

from __future__ import annotations

import hashlib
import logging
import os
import threading
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.failpoints import reach
from flwr_ha.storage import files
from flwr_ha.storage.digests import PREFIX, BlobCorruptError, BlobMissingError, is_digest, validate_digest
from flwr_ha.storage.files import CHUNK_BYTES, WRITEBACK_BYTES, Buffer, disk_errors, locked
from flwr_ha.storage.uploads import Upload, partial_bytes

_UPLOADS_AT_ONCE = 32
_logger = logging.getLogger(__name__)

_Stamp = tuple[int, int, int]  # size, mtime in ns, inode: the file that was verified


class BlobStore:
    """Keep blobs under the SHA-256 of their bytes.

    A blob is there as a whole or not at all: it is written to a temporary file, fsynced, renamed,
    and the folder fsynced. Any number of threads and processes may use one folder at once.

    Parameters
    ----------
    root : Path
        Folder of the store, made with mode 700 where it does not exist: ``blobs/``, ``partial/``
        (uploads), ``temporary/`` and ``corrupt/`` lie in it.

    Raises
    ------
    CheckpointError
        The folder cannot be made.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._blobs, self._partial = root / "blobs", root / "partial"
        self._temporary, self._corrupt = root / "temporary", root / "corrupt"
        with disk_errors(root):
            for folder in (root, self._blobs, self._partial, self._temporary, self._corrupt):
                files.make_folder(folder)
        self._verified: dict[str, _Stamp] = {}
        self._uploads: dict[str, Upload] = {}
        self._uploads_lock = threading.Lock()

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

    def partial_bytes(self, digest: str) -> int:
        """Return how much of a blob an unfinished upload has left here."""
        return partial_bytes(self._partial / self.path(digest).name)

    def digests(self) -> tuple[str, ...]:
        """Return the names of all blobs, sorted."""
        names = (PREFIX + entry.name for entry in os.scandir(self._blobs))
        return tuple(sorted(name for name in names if is_digest(name)))

    def put(self, data: Buffer) -> str:
        """Store bytes and return their digest; bytes that are there already are not written."""
        digest = PREFIX + hashlib.sha256(data).hexdigest()
        self.put_known(digest, (data,), is_hashed=True)
        return digest

    def write(self, chunks: Iterable[Buffer]) -> str:
        """Store chunks, hashed while they are written, and return the digest of the whole.

        Raises
        ------
        CheckpointError
            The disk refuses (full, read-only); nothing is left behind. The message names the folder.
        """
        return self._write(chunks)

    def put_known(self, digest: str, chunks: Iterable[Buffer], *, is_hashed: bool = False) -> None:
        """Store chunks under the digest that they must have.

        Parameters
        ----------
        digest : str
            Expected digest. Where a good copy is there, nothing is written nor read from `chunks`.
        chunks : iterable of Buffer
            The bytes.
        is_hashed : bool
            The caller has computed `digest` from these very bytes, which spares a second pass.

        Raises
        ------
        CheckpointCorruptError
            The chunks have another digest: take another copy.
        CheckpointError
            The disk refuses; nothing is left behind.
        """
        if self.refresh(digest):
            return
        self._write(chunks, expected=digest, is_hashed=is_hashed)

    def refresh(self, digest: str) -> bool:
        """Start the age of a blob again, so that `collect` spares it, and say whether it is good."""
        is_known = digest in self._verified
        if not self.touch(digest):
            return False
        if not is_known:  # another process may have renamed it but not yet have fsynced the folder
            with disk_errors(self.root):
                files.fsync_folder(self._blobs)
        return self.is_good(digest)

    def touch(self, digest: str) -> bool:
        """Start the age of a blob again, so that `collect` spares it, and say whether it is there, good or not."""
        path = self.path(digest)
        with disk_errors(self.root), locked(self.root / "lock"):
            try:
                status = path.stat()
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # sets the change time alone
            except FileNotFoundError:
                return False
        return True

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

    def receive(self, digest: str, total_bytes: int) -> Upload:
        """Return the upload of a blob, which goes on where an earlier one has stopped."""
        target = self.path(digest)
        partial = self._partial / target.name
        with self._uploads_lock, disk_errors(self.root):
            upload = self._uploads.pop(digest, None)
            if partial_bytes(partial) > total_bytes:
                partial.unlink(missing_ok=True)
            if upload is None or upload.total_bytes != total_bytes:
                upload = Upload(digest, total_bytes, partial=partial, target=target, publish=self._publish)
            self._uploads[digest] = upload
            while len(self._uploads) > _UPLOADS_AT_ONCE:  # an upload that is forgotten is hashed again, no more
                del self._uploads[next(iter(self._uploads))]
        return upload

    def delete(self, digest: str) -> None:
        """Remove a blob if it is there."""
        with disk_errors(self.root):
            self.path(digest).unlink(missing_ok=True)

    def collect(self, keep: Collection[str], *, min_age_s: float) -> tuple[str, ...]:
        """Remove what nobody names any more.

        Parameters
        ----------
        keep : collection of str
            Digests that stay.
        min_age_s : float
            Blobs, unfinished uploads, temporary files and corrupt blobs younger than this stay as
            well, in seconds: a checkpoint is written before anything names it.

        Returns
        -------
        tuple of str
            Digests of the removed blobs.
        """
        kept = {self.path(digest) for digest in keep}
        before_s = time.time() - min_age_s  # the file system stamps files with the wall clock
        gone = []
        for folder in (self._blobs, self._partial, self._temporary, self._corrupt):
            for path in sorted(set(folder.iterdir()) - kept):
                # The lock keeps a blob that `refresh` finds good from being removed on an older look at it.
                with disk_errors(self.root), locked(self.root / "lock"), suppress(FileNotFoundError):
                    if path.stat().st_ctime <= before_s:
                        path.unlink()
                        gone.append(path)
        return tuple(PREFIX + path.name for path in gone if path.parent == self._blobs)

    def _write(self, chunks: Iterable[Buffer], *, expected: str = "", is_hashed: bool = False) -> str:
        sha = hashlib.sha256()
        with disk_errors(self.root), files.temporary_file(self._temporary) as (descriptor, temporary):
            written = begun = 0
            for chunk in chunks:
                if not is_hashed:
                    sha.update(chunk)
                files.write_all(descriptor, chunk)
                written += len(chunk)
                if written - begun >= WRITEBACK_BYTES:
                    files.start_writeback(descriptor, begun, written - begun)
                    begun = written
            digest = expected if is_hashed else PREFIX + sha.hexdigest()
            if expected and digest != expected:
                raise CheckpointCorruptError(f"the bytes to be stored are {digest}, not {expected}")
            self._publish(digest, descriptor, temporary)
        return digest

    def _publish(self, digest: str, descriptor: int, path: Path) -> None:
        """Give a complete file its name; in this order a power cut leaves the whole blob or none."""
        os.fsync(descriptor)
        reach("blob.before-rename")
        path.replace(self.path(digest))
        reach("blob.after-rename")
        files.fsync_folder(self._blobs)
        self._verified[digest] = _stamp(os.fstat(descriptor))
        with self._uploads_lock:
            self._uploads.pop(digest, None)

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


def _stamp(status: os.stat_result) -> _Stamp:
    return status.st_size, status.st_mtime_ns, status.st_ino
