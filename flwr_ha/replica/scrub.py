"""Read every copy on this disk once a day: one that went bad in silence is replaced while others are good."""

from __future__ import annotations

import logging
import os
import time

from flwr_ha.errors import HaError
from flwr_ha.replica.eventlog import EventLog
from flwr_ha.replica.holdings import FETCH_TIMEOUT_S, Storage
from flwr_ha.replica.periodic import Periodic
from flwr_ha.storage.blobs import BlobStore
from flwr_ha.storage.digests import BlobCorruptError, BlobMissingError

log = logging.getLogger(__name__)
SCRUB_EVERY_S = 24 * 3600.0
FIRST_SCRUB_S = 3600.0  # what is only here for a few rounds need not be read again
DUTY = 0.05  # of one core and of the disk


class Scrubber(Periodic):
    """Verify all blobs from time to time, slowly.

    Parameters
    ----------
    store : BlobStore
        This replica's blobs.
    storage : Storage
        Where good copies come from.
    events : EventLog
        Where a bad copy is told.
    first_s, every_s : float
        Seconds until the first pass begins, and from the end of one to the next.
    """

    def __init__(
        self,
        store: BlobStore,
        storage: Storage,
        events: EventLog,
        *,
        first_s: float = FIRST_SCRUB_S,
        every_s: float = SCRUB_EVERY_S,
    ) -> None:
        super().__init__("scrub", first_s=first_s, every_s=every_s)
        self._store = store
        self._storage = storage
        self._events = events

    def act(self) -> None:
        """Make one pass."""
        self.scrub()

    def scrub(self) -> None:
        """Verify each blob once; pause in between, so that no more than `DUTY` of the time is used."""
        for digest in self._store.digests():
            start_s = time.monotonic()
            self._check(digest)
            if self._stop.wait((time.monotonic() - start_s) / DUTY):
                return

    def _check(self, digest: str) -> None:
        try:
            self._forget(digest)
            self._store.verify(digest, is_forced=True)
            return
        except BlobMissingError:
            return  # nobody needed it any more
        except BlobCorruptError as error:
            self._events.add("copy-corrupt", f"a copy went bad on this disk: {error}")
        try:
            self._storage.fetch([digest], timeout_s=FETCH_TIMEOUT_S)
        except HaError as error:
            log.warning("no good copy of %s is to be had: %s", digest, error)
            return
        self._events.add("repaired", f"{digest} was fetched again")

    def _forget(self, digest: str) -> None:
        """Have the kernel drop its cached pages: what counts is what the disk gives."""
        with self._store.open_unverified(digest) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
