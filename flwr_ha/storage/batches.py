"""Many blobs that one process writes and that reach the disk together."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from flwr_ha.errors import CheckpointCorruptError
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.files import FINISH_BYTES, Buffer
from flwr_ha.storage.uploads import OffsetError, Upload


class Batch:
    """Write blobs whose digests are known, and wait for the disk once for all of them, not once for each.

    Until `finish` they are complete uploads: `BlobStore.open_to_send` reads them, a power cut loses them.
    Several threads may use it.

    Parameters
    ----------
    store : BlobStore
        Where to.
    """

    def __init__(self, store: BlobStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._uploads: dict[str, Upload] = {}

    def put(self, digest: str, chunks: Sequence[Buffer]) -> None:
        """Write the bytes of a blob, from which the caller has computed the digest, unless a good copy is there.

        Raises
        ------
        CheckpointError
            The disk refuses.
        """
        if self._store.refresh(digest):
            return
        upload = self._store.receive(digest, sum(map(len, chunks)))
        upload.fill(chunks)
        with self._lock:
            self._uploads[digest] = upload
            is_enough = sum(each.total_bytes for each in self._uploads.values()) >= FINISH_BYTES
        if is_enough:
            self.finish()

    def finish(self) -> None:
        """Make blobs of all that were put.

        Raises
        ------
        CheckpointCorruptError
            One of them has changed, or was collected as this process was frozen for minutes: put all again.
        CheckpointError
            The disk refuses.
        """
        with self._lock:
            uploads, self._uploads = list(self._uploads.values()), {}
        try:
            self._store.finish(uploads)
        except OffsetError as error:
            raise CheckpointCorruptError(f"a part of the checkpoint is gone before it was a blob: {error}") from error
