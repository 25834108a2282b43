"""Bytes named by their SHA-256, on the disk of one replica."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import ExitStack, suppress
from io import BufferedReader
from pathlib import Path

from flwr_ha.errors import CheckpointCorruptError, CheckpointError
from flwr_ha.failpoints import reach
from flwr_ha.storage import files
from flwr_ha.storage.blobfiles import BlobFiles
from flwr_ha.storage.digests import PREFIX
from flwr_ha.storage.files import WRITEBACK_BYTES, Buffer, disk_errors, locked
from flwr_ha.storage.uploads import OffsetError, Upload, partial_bytes

_UPLOADS_AT_ONCE = 4096
_FILES_AT_ONCE = 64  # held open until they are blobs


class BlobStore(BlobFiles):
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
        super().__init__(root)
        self._partial, self._temporary = root / "partial", root / "temporary"
        with disk_errors(root):
            for folder in (self._partial, self._temporary):
                files.make_folder(folder)
        self._uploads: dict[str, Upload] = {}
        self._uploads_lock = threading.Lock()

    def partial_bytes(self, digest: str) -> int:
        """Return how much of a blob an unfinished upload has left here."""
        return partial_bytes(self._partial / self.path(digest).name)

    def put(self, data: Buffer) -> str:
        """Store bytes and return their digest; bytes that are there already are not written."""
        digest = PREFIX + hashlib.sha256(data).hexdigest()
        self.put_known(digest, (data,), is_hashed=True)
        return digest

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
        self._write(digest, chunks, is_hashed=is_hashed)

    def refresh(self, digest: str) -> bool:
        """Start the age of a blob again, so that `collect` spares it, and say whether it is good."""
        is_known = digest in self._verified
        if not self.touch(digest):
            return False
        if not is_known:  # another process may have renamed it but not yet have fsynced the folder
            with disk_errors(self.root):
                files.fsync_folder(self._blobs)
        return self.is_good(digest)

    def is_kept(self, digest: str) -> bool:
        """Whether a good copy is here, which is not collected soon: whoever asks may commit a name for it."""
        try:
            return self.refresh(digest)
        except CheckpointError:  # a disk that cannot be written to can still be read
            return self.is_good(digest)

    def touch(self, digest: str) -> bool:
        """Start the age of a blob again, so that `collect` spares it, and say whether it is there, good or not."""
        path = self.path(digest)
        with disk_errors(self.root):
            if not path.exists():  # as for all that is new: no need for the lock
                return False
            with locked(self.root / "lock"):
                try:
                    status = path.stat()
                    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # sets the change time alone
                except FileNotFoundError:
                    return False
        return True

    def open_to_send(self, digest: str) -> BufferedReader:
        """Open a blob, or the complete upload that becomes it, for a reader that verifies it; errors as in `size`."""
        if not self.has(digest):
            with suppress(FileNotFoundError):  # it has just become a blob, or is nowhere
                return (self._partial / self.path(digest).name).open("rb")
        return self.open_unverified(digest)

    def size_to_send(self, digest: str) -> int:
        """Return the bytes of what `open_to_send` opens; errors as in `size`."""
        if not self.has(digest) and (size := self.partial_bytes(digest)):
            return size
        return self.size(digest)

    def receive(self, digest: str, total_bytes: int) -> Upload:
        """Return the upload of a blob, which goes on where an earlier one has stopped."""
        target = self.path(digest)
        partial = self._partial / target.name
        with self._uploads_lock, disk_errors(self.root):
            upload = self._uploads.pop(digest, None)
            if partial_bytes(partial) > total_bytes:
                partial.unlink(missing_ok=True)
            if upload is None or upload.total_bytes != total_bytes:
                upload = Upload(digest, total_bytes, partial=partial, target=target)
            self._uploads[digest] = upload
            while len(self._uploads) > _UPLOADS_AT_ONCE:  # an upload that is forgotten is hashed again, no more
                del self._uploads[next(iter(self._uploads))]
        return upload

    def finish(self, uploads: Iterable[Upload]) -> None:
        """Verify complete uploads and make them blobs that survive a power cut, with few waits for the disk.

        Raises
        ------
        OffsetError, CheckpointCorruptError
            One of them is not complete, or not what it must be (it is dropped); the others are blobs.
        CheckpointError
            The disk refuses; those that are no blobs yet are dropped.
        """
        for problem in self.finish_good(uploads).values():
            raise problem

    def finish_good(self, uploads: Iterable[Upload]) -> dict[str, OffsetError | CheckpointCorruptError]:
        """Do as `finish` does, but return what is wrong with those that are no blobs."""
        rest = sorted(uploads, key=lambda upload: upload.digest)  # each is locked: the same order for all
        problems: dict[str, OffsetError | CheckpointCorruptError] = {}
        while rest:
            group, rest = rest[:_FILES_AT_ONCE], rest[_FILES_AT_ONCE:]
            complete: list[tuple[str, int, Path]] = []
            with ExitStack() as stack:
                for upload in group:
                    try:
                        descriptor = stack.enter_context(upload.completed())
                    except (OffsetError, CheckpointCorruptError) as error:
                        problems[upload.digest] = error
                    else:
                        complete += [(upload.digest, descriptor, upload.partial)] if descriptor else []
                try:
                    with disk_errors(self.root):
                        self._publish(complete)
                except CheckpointError:
                    for _, _, partial in complete:  # after a failed fsync a second one may succeed without cause
                        partial.unlink(missing_ok=True)
                    raise
        return problems

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

    def _write(self, digest: str, chunks: Iterable[Buffer], *, is_hashed: bool) -> None:
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
            if not is_hashed and PREFIX + sha.hexdigest() != digest:
                raise CheckpointCorruptError(f"the bytes to be stored are {PREFIX}{sha.hexdigest()}, not {digest}")
            self._publish([(digest, descriptor, temporary)])

    def _publish(self, complete: Sequence[tuple[str, int, Path]]) -> None:
        """Give complete files (digest, descriptor, path) their names; a power cut leaves each blob whole or not at all.

        One fsync writes the file system's log for all files that were made before it: the others find little to do.
        """
        for _, descriptor, _ in complete:
            os.fsync(descriptor)
        reach("blob.before-rename")
        for digest, _, path in complete:
            path.replace(self.path(digest))
        reach("blob.after-rename")
        files.fsync_folder(self._blobs)
        for digest, descriptor, _ in complete:
            self._note_verified(digest, os.fstat(descriptor))
        with self._uploads_lock:
            for digest, _, _ in complete:
                self._uploads.pop(digest, None)
